"""Reward expressions: `format & ~python`, `random(0.3)`, `ground_truth + 0.1*length` as functions.

An expression is parsed, never evaluated: names, calls, `a & b` (both) and `~a` (not) of rewards
that are 0 or 1, `+`, `-`, `*` by a number, parentheses. As in Python, `&` binds last. Arguments are
numbers, text in quotes, or one bare word, as in `self_certainty(base)`.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import math
import types
import typing
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from harness.errors import UserError

# What to do about a field that the rollouts at hand do not have.
MISSING = {
    "label": "majority labels in the data: make them by `python eval.py --labels=FILE`",
    "cross_logp": "the scores of a second model, which training alone fills",
}


@dataclass(frozen=True)
class Entry:
    """A registered reward.

    needs: names of the Rollouts fields it reads, or a function of its parameters that gives them;
    `cross_logp:NAME` is one entry of a dict. bounds: (lowest, highest) of a numeric parameter.
    """

    function: Callable[..., Tensor]
    formula: str
    source: str
    needs: tuple[str, ...] | Callable[..., tuple[str, ...]]
    bounds: dict[str, tuple[float, float]]

    @property
    def parameters(self) -> list[inspect.Parameter]:
        return list(inspect.signature(self.function, eval_str=True).parameters.values())[1:]

    @property
    def call(self) -> str:
        """How it is written, with its parameters: `random(p=0.5)`."""
        shown = []
        for parameter in self.parameters:
            choices = typing.get_args(parameter.annotation)
            if typing.get_origin(parameter.annotation) is Literal:
                ordered = [parameter.default, *(c for c in choices if c != parameter.default)]
                shown.append("|".join(ordered))
            else:
                default = parameter.default
                shown.append(parameter.name + f"={default}" * (default is not parameter.empty))
        return f"{self.function.__name__}({', '.join(shown)})" if shown else self.function.__name__


@dataclass(frozen=True)
class Reward:
    """A parsed expression: call it on rollouts for float32 [B] on the CPU."""

    expression: str
    names: tuple[str, ...]  # the rewards in it, in order, each once
    needs: tuple[str, ...]  # the Rollouts fields that must be filled, over all of them
    compute: Callable[[Any], Tensor]

    def missing(self, rollouts: Any) -> list[str]:
        """The needed fields that these rollouts do not have."""
        lacking = []
        for need in self.needs:
            field, _, key = need.partition(":")
            value = getattr(rollouts, field, None)
            if value is None or (key and key not in value):
                lacking.append(need)
        return lacking

    def __call__(self, rollouts: Any) -> Tensor:
        """Raises UserError where a needed field is missing or `&`, `~` meet other than 0 and 1."""
        for need in self.missing(rollouts):
            default = f"{need}, which only rollouts scored by a model have"
            what = MISSING.get(need.partition(":")[0], default)
            raise UserError(f"reward {self.expression!r} needs {what}")
        return self.compute(rollouts)

    def __str__(self) -> str:
        return self.expression


def parse(expression: str, registry: dict[str, Entry]) -> Reward:
    """The reward an expression stands for. Raises UserError, naming what is wrong in it."""
    short = expression if len(expression) <= 80 else expression[:77] + "..."
    try:
        if len(expression) > 500:  # so nothing in it is nested deeper than Python's stack
            raise ValueError("longer than 500 characters")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's own, on such things as 0.5format
            body = ast.parse(expression.strip(), mode="eval").body
        found: dict[str, None] = {}
        needs: dict[str, None] = {}
        compute = _Builder(registry, found, needs).build(body)
    except (RecursionError, MemoryError):
        raise UserError(f"reward {short!r}: nested too deep") from None
    except SyntaxError:
        wanted = "an expression such as 'format & ~python' or 'ground_truth + 0.1*format'"
        raise UserError(f"reward {short!r}: cannot be read: write {wanted}") from None
    except ValueError as error:
        raise UserError(f"reward {short!r}: {error}") from None
    return Reward(expression.strip(), tuple(found), tuple(needs), compute)


@dataclass
class _Builder:
    """Turns nodes into functions of rollouts; notes the rewards met and the fields they need."""

    registry: dict[str, Entry]
    found: dict[str, None]  # used as ordered sets
    needs: dict[str, None]

    def build(self, node: ast.expr) -> Callable[[Any], Tensor]:
        match node:
            case ast.Name():
                return self._leaf(node.id, [], [])
            case ast.Call(func=ast.Name()):
                return self._leaf(node.func.id, node.args, node.keywords)
            case ast.BinOp(op=ast.Mult()):
                for number, other in ((node.left, node.right), (node.right, node.left)):
                    if (factor := _number(number)) is not None:
                        part = self.build(other)
                        return lambda r: factor * part(r)
                raise ValueError("`*` wants a number on one side; `&` is for two rewards")
            case ast.BinOp(op=ast.Add() | ast.Sub() | ast.BitAnd()):
                left, right = self.build(node.left), self.build(node.right)
                if isinstance(node.op, ast.BitAnd):
                    return lambda r: _binary(left(r), "&") * _binary(right(r), "&")
                sign = 1 if isinstance(node.op, ast.Add) else -1
                return lambda r: left(r) + sign * right(r)
            case ast.UnaryOp(op=ast.Invert() | ast.USub() | ast.UAdd()):
                part = self.build(node.operand)
                if isinstance(node.op, ast.Invert):
                    return lambda r: 1 - _binary(part(r), "~")
                sign = -1 if isinstance(node.op, ast.USub) else 1
                return lambda r: sign * part(r)
        if _number(node) is not None:
            raise ValueError("a number alone is no reward: multiply a reward by it")
        raise ValueError(
            f"{ast.unparse(node)[:40]!r} has no meaning here: "
            "use names, calls, `a & b`, `~a`, `+`, `-`, `*` by a number and parentheses"
        )

    def _leaf(
        self, name: str, args: list[ast.expr], keywords: list[ast.keyword]
    ) -> Callable[[Any], Tensor]:
        if name not in self.registry:
            near = difflib.get_close_matches(name, self.registry, n=1, cutoff=0.5)
            there = f"there are {', '.join(sorted(self.registry))}"
            hint = f"did you mean {near[0]}?" if near else there
            raise ValueError(f"no reward {name!r}: {hint}")
        entry = self.registry[name]
        known = [parameter.name for parameter in entry.parameters]
        takes = f"write {entry.call}" if known else "it takes none"
        if len(args) > len(known):
            raise ValueError(f"{name} got {len(args)} arguments: {takes}")
        given = list(zip(known, args, strict=False)) + [(k.arg, k.value) for k in keywords]
        values: dict[str, Any] = {}
        for key, node in given:
            if key not in known:
                raise ValueError(f"{name} has no argument {key!r}: {takes}")
            if key in values:
                raise ValueError(f"{name} got {key} twice")
            values[key] = _argument(name, entry, key, node)
        required = [p.name for p in entry.parameters if p.default is p.empty]
        if absent := [key for key in required if key not in values]:
            raise ValueError(f"{name} wants {', '.join(absent)}: {takes}")
        self.found[name] = None
        needs = entry.needs(**values) if callable(entry.needs) else entry.needs
        self.needs |= dict.fromkeys(needs)

        def compute(rollouts: Any) -> Tensor:
            out = entry.function(rollouts, **values).float().cpu()
            if out.shape != (len(rollouts.text),) or not out.isfinite().all():
                raise ValueError(f"reward {name} gave {out}: it owes one finite number a row")
            return out

        return compute


def _argument(name: str, entry: Entry, key: str, node: ast.expr) -> Any:
    """The value of an argument, as its parameter's annotation wants it."""
    kind = next(p.annotation for p in entry.parameters if p.name == key)
    number = _number(node)
    value = node.id if isinstance(node, ast.Name) else number
    if isinstance(node, ast.Constant) and isinstance(node.value, str | bool | None):
        value = node.value
    got = f"got {ast.unparse(node)[:40]}"
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise ValueError(f"{name}: {key} is one of {', '.join(typing.get_args(kind))}, {got}")
        return value
    if isinstance(kind, types.UnionType):  # X | None
        if isinstance(node, ast.Constant) and node.value is None:
            return None
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if kind is float and number is not None:
        value = number
    elif kind is int and number is not None and number == int(number):
        value = int(number)
    elif not (kind in (str, bool) and isinstance(value, kind)):
        raise ValueError(f"{name}: {key} wants {kind.__name__}, {got}")
    low, high = entry.bounds.get(key, (-math.inf, math.inf))
    if key in entry.bounds and not low <= value <= high:
        raise ValueError(f"{name}: {key} must be within [{low}, {high}], got {value}")
    return value


def _number(node: ast.expr) -> float | None:
    """A finite literal number, with any signs; None for anything else."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        inner = _number(node.operand)
        return None if inner is None else -inner if isinstance(node.op, ast.USub) else inner
    if not isinstance(node, ast.Constant) or type(node.value) not in (int, float):
        return None
    if not abs(node.value) <= 1e30:
        raise ValueError("a number in it is too large")
    return node.value


def _binary(values: Tensor, operator: str) -> Tensor:
    odd = values[(values != 0) & (values != 1)]
    if len(odd):
        raise UserError(f"`{operator}` joins rewards that are 0 or 1, and met {odd[0].item():.4g}")
    return values
