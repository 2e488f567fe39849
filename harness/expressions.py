"""Parse reward expressions such as `format & ~python`, `random(0.3)`, `ground_truth + 0.1*length`.

An expression holds names of rewards, calls, `+`, `-`, `*` by a number, and parentheses. Rewards
that are 0 or 1 also have `a & b` (both) and `~a` (not). As in Python, `&` binds less tightly than
`+`. Arguments are numbers, text in quotes, or a bare word, as in `self_certainty(base)`. An
expression is never run as Python.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import math
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.configurator import as_type
from harness.errors import UserError

# What the user lacks, by the field of the rollouts that is missing.
MISSING = {
    "label": "majority labels in the data: make them with `python eval.py --labels=FILE`",
    "to_permute": "problems of the kind permutations: `python -m tools.exploration --build=FOLDER`",
    "cross_logp": "the scores of a second model, which only training computes",
}


@dataclass(frozen=True)
class Entry:
    """A registered reward.

    needs are the names of the Rollouts fields that it reads, or a function of its arguments that
    returns them. `cross_logp:NAME` is an entry of a dict. bounds maps a numeric parameter to its
    (lowest, highest) value.
    """

    function: Callable[..., Tensor]
    formula: str
    source: str
    needs: tuple[str, ...] | Callable[..., tuple[str, ...]]
    bounds: dict[str, tuple[float, float]]

    @property
    def signature(self) -> inspect.Signature:
        """The signature of the function. Its first parameter is the rollouts."""
        return inspect.signature(self.function, eval_str=True)

    @property
    def parameters(self) -> list[inspect.Parameter]:
        """All parameters except the rollouts."""
        return list(self.signature.parameters.values())[1:]

    @property
    def call(self) -> str:
        """How to write it in an expression, such as `random(p=0.5)`."""
        shown = [str(p.replace(annotation=p.empty)) for p in self.parameters]
        name = self.function.__name__.rstrip("_")
        return f"{name}({', '.join(shown)})" if shown else name


@dataclass(frozen=True)
class Reward:
    """A parsed expression. Calling it on rollouts gives float32 [B] on the CPU."""

    expression: str
    names: tuple[str, ...]  # the rewards in it, in order, without repetition
    needs: tuple[str, ...]  # the Rollouts fields that any of them needs
    compute: Callable[[Any], Tensor]

    def missing(self, rollouts: Any) -> list[str]:
        """The needed fields that these rollouts do not have."""

        def is_there(need: str) -> bool:
            field, _, key = need.partition(":")
            value = getattr(rollouts, field, None)
            return value is not None and (not key or key in value)

        return [need for need in self.needs if not is_there(need)]

    def __call__(self, rollouts: Any) -> Tensor:
        """Compute the reward.

        Raises UserError if a needed field is missing, if a reward fails, or if `&` or `~` is
        applied to a value other than 0 and 1.
        """
        for need in self.missing(rollouts):
            default = f"{need}, which only scoring by a model computes"
            what = MISSING.get(need.partition(":")[0], default)
            raise UserError(f"reward {self.expression!r} needs {what}")
        out = self.compute(rollouts)
        if not out.isfinite().all():
            raise UserError(f"reward {self.expression!r} is not finite: its sum is too large")
        return out

    def __str__(self) -> str:
        return self.expression


def parse(expression: str, registry: dict[str, Entry]) -> Reward:
    """Parse an expression. Raises UserError that names the mistake in it."""
    short = expression if len(expression) <= 80 else expression[:77] + "..."
    try:
        if len(expression) > 500:  # deep nesting would exceed Python's stack
            raise ValueError("longer than 500 characters")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns of 0.5format, for example
            body = ast.parse(expression.strip(), mode="eval").body
        leaves: list[Leaf] = []
        compute = _build(body, registry, leaves)
    except (RecursionError, MemoryError):
        raise UserError(f"reward {short!r}: nested too deeply") from None
    except SyntaxError:
        wanted = "an expression such as 'format & ~python' or 'ground_truth + 0.1*format'"
        raise UserError(f"reward {short!r}: cannot be read: write {wanted}") from None
    except ValueError as error:
        raise UserError(f"reward {short!r}: {error}") from None
    names = dict.fromkeys(leaf.name for leaf in leaves)
    needs = dict.fromkeys(need for leaf in leaves for need in leaf.needs)
    return Reward(expression.strip(), tuple(names), tuple(needs), compute)


@dataclass(frozen=True)
class Leaf:
    """One reward of an expression, with its arguments."""

    name: str
    entry: Entry
    arguments: dict[str, Any]

    @property
    def needs(self) -> tuple[str, ...]:
        needs = self.entry.needs
        return needs(**self.arguments) if callable(needs) else needs

    def __call__(self, rollouts: Any) -> Tensor:
        """Compute the reward, float32 [B]. Raises UserError that names the reward if it fails."""
        rows = len(rollouts.text)
        try:
            out = self.entry.function(rollouts, **self.arguments)
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            where = f"{Path(frame.filename).name}:{frame.lineno}"
            raise UserError(f"reward {self.name!r} failed at {where}: {reason}") from error
        if not isinstance(out, Tensor) or out.is_complex():
            raise UserError(f"reward {self.name!r} gives {type(out).__name__}, not a float tensor")
        out = out.detach().float().cpu()
        if out.shape != (rows,):
            shape = tuple(out.shape)
            raise UserError(f"reward {self.name!r} has shape {shape}: it must give {rows} numbers")
        if not out.isfinite().all():
            row = int((~out.isfinite()).nonzero()[0])
            raise UserError(f"reward {self.name!r} is {out[row].item()} for response {row}")
        return out


def _build(
    node: ast.expr, registry: dict[str, Entry], leaves: list[Leaf]
) -> Callable[[Any], Tensor]:
    """Turn a node into a function of rollouts. Its rewards are added to leaves."""
    build = partial(_build, registry=registry, leaves=leaves)
    if _number(node) is not None:
        raise ValueError("a number alone is not a reward: multiply a reward by it")
    match node:
        case ast.Name() | ast.Call(func=ast.Name()):
            leaves.append(_leaf(node, registry))
            return leaves[-1]
        case ast.BinOp(op=ast.Mult()):
            for number, other in ((node.left, node.right), (node.right, node.left)):
                if (factor := _number(number)) is not None:
                    part = build(other)
                    return lambda r: factor * part(r)
            raise ValueError("`*` wants a number on one side: use `&` for two rewards")
        case ast.BinOp(left, ast.Add() | ast.Sub() | ast.BitAnd() as op, right):
            left, right = build(left), build(right)
            if isinstance(op, ast.BitAnd):
                return lambda r: _binary(left(r), "&") * _binary(right(r), "&")
            sign = 1 if isinstance(op, ast.Add) else -1
            return lambda r: left(r) + sign * right(r)
        case ast.UnaryOp(ast.Invert() | ast.USub() as op, operand):
            part = build(operand)
            if isinstance(op, ast.Invert):
                return lambda r: 1 - _binary(part(r), "~")
            return lambda r: -part(r)
    raise ValueError(
        f"{ast.unparse(node)[:40]!r} has no meaning here: "
        "use names, calls, `a & b`, `~a`, `+`, `-`, `*` by a number and parentheses"
    )


def _leaf(node: ast.Name | ast.Call, registry: dict[str, Entry]) -> Leaf:
    """Look up a reward by its name and check its arguments."""
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    name = call.func.id
    if name not in registry:
        near = difflib.get_close_matches(name, registry, n=1, cutoff=0.5)
        there = f"there are {', '.join(sorted(registry))}"
        hint = f"did you mean {near[0]}?" if near else there
        raise ValueError(f"no reward {name!r}: {hint}")
    entry = registry[name]
    try:
        given = {keyword.arg or "**": _value(keyword.value) for keyword in call.keywords}
        bound = entry.signature.bind(None, *map(_value, call.args), **given)  # None: the rollouts
    except TypeError as error:
        raise ValueError(f"{name}: {error}: write {entry.call}") from None
    values = dict(list(bound.arguments.items())[1:])
    for key, value in values.items():
        try:
            values[key] = as_type(value, entry.signature.parameters[key].annotation)
        except ValueError as error:
            raise ValueError(f"{name}: {key} {error}") from None
        low, high = entry.bounds.get(key, (-math.inf, math.inf))
        if key in entry.bounds and not low <= value <= high:
            raise ValueError(f"{name}: {key} must be within [{low}, {high}], got {value}")
    return Leaf(name, entry, values)


def _value(node: ast.expr) -> Any:
    """The value of an argument: a literal, or a bare word, which means text."""
    if isinstance(node, ast.Name):
        return node.id
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ValueError(f"{ast.unparse(node)[:40]} is not a number or a word") from None


def _number(node: ast.expr) -> float | None:
    """The value of a literal number, or None for anything else."""
    try:
        value = ast.literal_eval(node)
    except ValueError:
        return None
    if type(value) in (int, float) and not abs(value) <= 1e30:
        raise ValueError("a number in it is too large")
    return value if type(value) in (int, float) else None


def _binary(values: Tensor, operator: str) -> Tensor:
    """Return the values. Raises UserError if one of them is not 0 or 1."""
    odd = values[(values != 0) & (values != 1)]
    if len(odd):
        raise UserError(f"`{operator}` wants rewards that are 0 or 1, got {odd[0].item():.4g}")
    return values
