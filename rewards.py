"""Every reward, one short function each, and expressions of them.

python rewards.py                                                    list the rewards
python rewards.py --reward='format & ~python' --completions=FILE     score saved completions

A new reward is one function of a `Rollouts` (data.py) that returns float32 [B]:

    @reward(formula="1 if the response holds a question mark", source="ours")
    def asks(rollouts) -> Tensor:
        return _float("?" in text for text in rollouts.text)

It may take parameters with defaults, `asks(3)` or `asks(n=3)` in an expression. Fields that are
only filled on request (`self_certainty`, ...) are named in `needs`. No reward sees the model.

An expression is parsed, never evaluated: names, calls, `a & b` (both) and `~a` (not) of rewards
that are 0 or 1, `+`, `-`, `*` by a number, parentheses. As in Python, `&` binds last.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import grade
from configurator import UserError, configure, run

RANDOM = 201  # first key of the random reward's stream: no other use of the seed shares it


@dataclass(frozen=True)
class Entry:
    """A registered reward; `bounds` maps a numeric parameter to its (lowest, highest) value."""

    function: Callable[..., Tensor]
    formula: str
    source: str
    needs: tuple[str, ...]
    bounds: dict[str, tuple[float, float]]

    @property
    def parameters(self) -> list[inspect.Parameter]:
        return list(inspect.signature(self.function, eval_str=True).parameters.values())[1:]


REGISTRY: dict[str, Entry] = {}


def reward(
    formula: str,
    source: str,
    needs: tuple[str, ...] = (),
    bounds: dict[str, tuple[float, float]] | None = None,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register the decorated function under its own name."""

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        name = function.__name__
        if name in REGISTRY:
            raise ValueError(f"two rewards are called {name}")
        REGISTRY[name] = Entry(function, formula, source, needs, bounds or {})
        return function

    return register


def _float(values: Iterable[float]) -> Tensor:
    return torch.tensor([float(value) for value in values], dtype=torch.float32)


# ---- the rewards


@reward(formula="1 if the last box is equivalent to the gold answer", source="SR 2506.10947")
def ground_truth(rollouts) -> Tensor:
    return _float(grade.correct(rollouts.text, [p.answer for p in rollouts.problem]))


@reward(formula=r"1 if the response's last \boxed{} is not empty", source="SR 2506.10947")
def format(rollouts) -> Tensor:
    return _float(grade.last_boxed(text) is not None for text in rollouts.text)


@reward(
    formula="1 with probability p, drawn from (seed, step, prompt, sample) and not from the text",
    source="SR 2506.10947",
    bounds={"p": (0, 1)},
)
def random(rollouts, p: float = 0.5) -> Tensor:
    key = (RANDOM, rollouts.seed, rollouts.step)
    rows = zip(rollouts.prompt_index.tolist(), rollouts.sample_index.tolist(), strict=True)
    return _float(np.random.default_rng((*key, i, j)).random() < p for i, j in rows)


@reward(formula='1 if "python" is in the lower-cased response', source="SR 2506.10947")
def python(rollouts) -> Tensor:
    return _float("python" in text.lower() for text in rollouts.text)


@reward(
    formula="0 if a pattern of 10 to 256 characters stands 10 times in a row, else 1",
    source="SR 2506.10947",
)
def no_repetition(rollouts) -> Tensor:
    return _float(not _repeats(text) for text in rollouts.text)


@reward(
    formula="mean over response tokens of KL(U || p_t) = logsumexp(z_t) - mean(z_t) - log V",
    source="INT 2505.19590",
    needs=("self_certainty",),
)
def self_certainty(rollouts) -> Tensor:
    total = (rollouts.self_certainty * rollouts.mask).sum(1)
    return total / rollouts.mask.sum(1).clamp(min=1)


def _repeats(text: str, shortest: int = 10, longest: int = 256, times: int = 10) -> bool:
    """Whether a pattern of shortest to longest characters stands `times` in a row in the text.

    With period d, text[i] == text[i + d] along (times - 1) d characters. Every d-th of these
    comparisons is made first: only where times - 1 of them in a row hold is it worth the rest.
    """
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    for d in range(shortest, min(longest, len(codes) // times) + 1):
        every = codes[::d]
        if b"\1" * (times - 1) in (every[1:] == every[:-1]).tobytes():
            if b"\1" * ((times - 1) * d) in (codes[d:] == codes[:-d]).tobytes():
                return True
    return False


# ---- expressions


@dataclass(frozen=True)
class Reward:
    """A parsed expression: call it on rollouts for float32 [B] on the CPU."""

    expression: str
    names: tuple[str, ...]  # the rewards in it, in order, each once
    needs: tuple[str, ...]  # the Rollouts fields that must be filled, over all of them
    compute: Callable[[Any], Tensor]

    def __call__(self, rollouts: Any) -> Tensor:
        """Raises UserError where a needed field is missing or `&`, `~` meet other than 0 and 1."""
        for field in self.needs:
            if getattr(rollouts, field, None) is None:
                lacks = f"needs {field}, which only rollouts scored by a model have"
                raise UserError(f"reward {self.expression!r} {lacks}")
        return self.compute(rollouts)

    def __str__(self) -> str:
        return self.expression


def parse(expression: str) -> Reward:
    """The reward an expression stands for. Raises UserError, naming what is wrong in it."""
    short = expression if len(expression) <= 80 else expression[:77] + "..."
    try:
        if len(expression) > 500:  # so nothing in it is nested deeper than Python's stack
            raise ValueError("longer than 500 characters")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's own, on such things as 0.5format
            body = ast.parse(expression.strip(), mode="eval").body
        found: list[str] = []
        compute = _build(body, found)
    except (RecursionError, MemoryError):
        raise UserError(f"reward {short!r}: nested too deep") from None
    except SyntaxError:
        wanted = "an expression such as 'format & ~python' or 'ground_truth + 0.1*format'"
        raise UserError(f"reward {short!r}: cannot be read: write {wanted}") from None
    except ValueError as error:
        raise UserError(f"reward {short!r}: {error}") from None
    names = tuple(dict.fromkeys(found))
    needs = tuple(dict.fromkeys(need for name in names for need in REGISTRY[name].needs))
    return Reward(expression.strip(), names, needs, compute)


def _build(node: ast.expr, found: list[str]) -> Callable[[Any], Tensor]:
    """The node as a function of rollouts; names of rewards met are appended to `found`."""
    match node:
        case ast.Name():
            return _leaf(node.id, [], [], found)
        case ast.Call(func=ast.Name()):
            return _leaf(node.func.id, node.args, node.keywords, found)
        case ast.BinOp(op=ast.Mult()):
            for number, other in ((node.left, node.right), (node.right, node.left)):
                if (factor := _number(number)) is not None:
                    part = _build(other, found)
                    return lambda r: factor * part(r)
            raise ValueError("`*` wants a number on one side; `&` is for two rewards")
        case ast.BinOp(op=ast.Add() | ast.Sub() | ast.BitAnd()):
            left, right = _build(node.left, found), _build(node.right, found)
            if isinstance(node.op, ast.BitAnd):
                return lambda r: _binary(left(r), "&") * _binary(right(r), "&")
            sign = 1 if isinstance(node.op, ast.Add) else -1
            return lambda r: left(r) + sign * right(r)
        case ast.UnaryOp(op=ast.Invert() | ast.USub() | ast.UAdd()):
            part = _build(node.operand, found)
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
    name: str, args: list[ast.expr], keywords: list[ast.keyword], found: list[str]
) -> Callable[[Any], Tensor]:
    if name not in REGISTRY:
        near = difflib.get_close_matches(name, REGISTRY, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(REGISTRY))}"
        raise ValueError(f"no reward {name!r}: {hint}")
    entry = REGISTRY[name]
    known = [parameter.name for parameter in entry.parameters]
    takes = f"it takes {', '.join(map(str, entry.parameters))}" if known else "it takes none"
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
    found.append(name)

    def compute(rollouts: Any) -> Tensor:
        out = entry.function(rollouts, **values).float().cpu()
        if out.shape != (len(rollouts.text),) or not out.isfinite().all():
            raise ValueError(f"reward {name} gave {out}: it owes one finite number a row")
        return out

    return compute


def _argument(name: str, entry: Entry, key: str, node: ast.expr) -> Any:
    kind = next(p.annotation for p in entry.parameters if p.name == key)
    number = _number(node)
    value = node.id if isinstance(node, ast.Name) else number
    if isinstance(node, ast.Constant) and isinstance(node.value, str | bool):
        value = node.value
    if kind is float and number is not None:
        value = number
    elif kind is int and number is not None and number == int(number):
        value = int(number)
    elif not (kind in (str, bool) and isinstance(value, kind)):
        raise ValueError(f"{name}: {key} wants {kind.__name__}, got {ast.unparse(node)[:40]}")
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


# ---- scoring saved completions


def auroc(score: np.ndarray, label: np.ndarray) -> float:
    """P(score of a positive > score of a negative), a tie counting half; nan without both.

    By ranks, ties averaged: (sum of the positives' ranks - n+ (n+ + 1) / 2) / (n+ n-), which is
    the Mann-Whitney U over n+ n-. `label` is bool [n].
    """
    label = np.asarray(label, dtype=bool)
    _, which, counts = np.unique(np.asarray(score), return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[which]
    positive, negative = int(label.sum()), int((~label).sum())
    if not positive or not negative:
        return math.nan
    return float((rank[label].sum() - positive * (positive + 1) / 2) / (positive * negative))


@dataclass
class ScoreConfig:
    """List the rewards, or score saved completions with one."""

    reward: str = ""  # an expression, such as 'format & ~python'
    completions: str = ""  # a .jsonl with problem, answer, completions and, if any, correct


def read_completions(path: str) -> tuple[SimpleNamespace, list[bool] | None]:
    """(rollouts without a model's fields, the `correct` column or None) of saved completions."""
    rows = grade.load_completions(path)
    flat = [(i, j, row) for i, row in enumerate(rows) for j in range(len(row["completions"]))]
    rollouts = SimpleNamespace(
        text=[row["completions"][j] for _, j, row in flat],
        problem=[SimpleNamespace(problem=row["problem"], answer=row["answer"]) for *_, row in flat],
        group_size=max(len(row["completions"]) for row in rows),
        seed=0,
        step=0,
        prompt_index=torch.tensor([i for i, _, _ in flat]),
        sample_index=torch.tensor([j for _, j, _ in flat]),
    )
    if not all(row.get("correct") for row in rows):
        return rollouts, None
    return rollouts, [bool(row["correct"][j]) for _, j, row in flat]


def main(argv: list[str]) -> None:
    cfg, _ = configure(ScoreConfig, argv)
    if not cfg.reward and not cfg.completions:
        for name, entry in sorted(REGISTRY.items()):
            call = f"{name}({', '.join(map(str, entry.parameters))})" if entry.parameters else name
            needs = f"; needs {', '.join(entry.needs)}" if entry.needs else ""
            print(f"{call:24} {entry.formula} [{entry.source}{needs}]")
        return
    if not cfg.reward or not cfg.completions:
        missing = "--completions=FILE" if cfg.reward else "--reward=EXPRESSION"
        raise UserError(f"scoring needs both --reward and --completions: add {missing}")
    score_fn = parse(cfg.reward)
    rollouts, marks = read_completions(cfg.completions)
    score = score_fn(rollouts).numpy()
    golds = [p.answer for p in rollouts.problem]
    label = np.array(grade.correct(rollouts.text, golds) if marks is None else marks)
    print(f"reward      {score_fn}, {len(score)} completions")
    print(f"mean        {score.mean():.4f}")
    print(f"share > 0   {(score > 0).mean():.4f}")
    print(f"correct     {label.mean():.4f} ({'graded here' if marks is None else 'their column'})")
    if np.isin(score, (0, 1)).all():
        print(f"agreement   {((score == 1) == label).mean():.4f}")
    area = auroc(score, label)
    print(
        f"AUROC       {'undefined: all right or all wrong' if math.isnan(area) else f'{area:.4f}'}"
    )


if __name__ == "__main__":
    run(main)
