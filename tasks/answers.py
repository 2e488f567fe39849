"""What a correct answer is. It belongs to the data set: `Problem.kind` names one of KINDS.

Rewards, metrics, evals and labels ask here. A data set with other answers than boxed mathematics
adds its own kind: how to find an answer in a text, and which answers are right.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

import grading
from evaluation import exploration
from harness.errors import UserError
from tasks import literals

Verdicts = Callable[[list[str], list[str]], list[bool]]  # (texts, golds) -> whether each is right


@dataclass(frozen=True)
class Kind:
    """find(text) is the answer in it, or None; right(texts, golds) grades a batch.

    lenient is like right, but also takes an answer outside a box; it is a metric, never a reward.
    None: the same as right. clusters(answers, groups) is like grading.clusters.
    """

    find: Callable[[str], str | None]
    right: Verdicts
    lenient: Verdicts | None = None
    clusters: Callable[[list[str | None], list[int]], list[int]] | None = None


# ------------------------------------------------------------------------------------ mathematics


def _lenient_math(texts: list[str], golds: list[str]) -> list[bool]:
    return grading.grader().grade([grading.lenient_answer(text) for text in texts], golds)


def all_boxed(text: str) -> str | None:
    """The contents of all boxes, each once, joined by commas; None if a box is empty or open."""
    parts = [grading.last_boxed("\\boxed" + part) for part in text.split("\\boxed")[1:]]
    return None if None in parts or not parts else ", ".join(dict.fromkeys(parts))


def _right_list(texts: list[str], golds: list[str]) -> list[bool]:
    """The last box holds the whole list, or every box holds an element of it."""
    last = grading.correct(texts, golds)
    joined = grading.grader().grade([all_boxed(text) for text in texts], golds)
    return [a or b for a, b in zip(last, joined, strict=True)]


def _lenient_list(texts: list[str], golds: list[str]) -> list[bool]:
    strict, lenient = _right_list(texts, golds), _lenient_math(texts, golds)
    return [a or b for a, b in zip(strict, lenient, strict=True)]


# A number of digits, with a power of ten, and maybe a unit in \text{} behind it.
NUMBER = re.compile(
    r"(?P<digits>[+-]?\d{1,40}(?:\.\d{0,40})?|[+-]?\.\d{1,40})"
    r"(?:[eE](?P<e>[+-]?\d{1,3})|\s*(?:\\times|\\cdot|\*)\s*10\^\{?(?P<ten>[+-]?\d{1,3})\}?)?"
    r"(?:[\s~\\,;:]*\\(?:text|mathrm|rm|mbox)\s*\{[^{}]{0,60}\})?"
)


def number(text: str | None) -> tuple[Decimal, Decimal] | None:
    """(value, one unit of its last digit) of a plain number, with or without a unit; else None."""
    match = NUMBER.fullmatch((text or "").strip().strip("$").replace("{,}", "").strip())
    if not match:
        return None
    try:
        digits, power = Decimal(match["digits"]), int(match["e"] or match["ten"] or 0)
    except InvalidOperation:
        return None
    return digits.scaleb(power), Decimal(1).scaleb(digits.as_tuple().exponent + power)


def rounds_to(answer: str | None, gold: str) -> bool:
    """Whether the answer is a number that is the gold number to the digits that this one has."""
    a, g = number(answer), number(gold)
    return a is not None and g is not None and abs(a[0] - g[0]) <= g[1] / 2


def _or_rounded(strict: Verdicts, find: Callable[[str], str | None]) -> Verdicts:
    def right(texts: list[str], golds: list[str]) -> list[bool]:
        verdicts = strict(texts, golds)
        rows = zip(verdicts, texts, golds, strict=True)
        return [bool(verdict) or rounds_to(find(text), gold) for verdict, text, gold in rows]

    return right


# --------------------------------------------------------------------------------- Python literals


def _right_literal(texts: list[str], golds: list[str]) -> list[bool]:
    return [literals.same(literals.boxed(t), g) for t, g in zip(texts, golds, strict=True)]


def _lenient_literal(texts: list[str], golds: list[str]) -> list[bool]:
    """Without a box too, and a string in a box without its quotes."""
    rows = [(literals.loose(text), gold) for text, gold in zip(texts, golds, strict=True)]
    return [literals.same(a, g) or a is not None and a == literals.read(g) for a, g in rows]


# ------------------------------------------------------------------------------------------- kinds


# Looked up in `grading` when called, so that a fork or a test may replace either.
KINDS = {
    # the last box is equivalent to the gold answer (docs/GRADING.md)
    "math": Kind(
        find=lambda text: grading.last_boxed(text),
        right=lambda texts, golds: grading.correct(texts, golds),
        lenient=_lenient_math,
    ),
    # several answers, all of them asked for: in one box, or each in its own (OlympiadBench)
    "list": Kind(
        find=lambda text: grading.last_boxed(text),
        right=_right_list,
        lenient=_lenient_list,
    ),
    # measured quantities: as math, or a number that rounds to the gold one (Minerva)
    "rounded": Kind(
        find=lambda text: grading.last_boxed(text),
        right=_or_rounded(lambda t, g: grading.correct(t, g), lambda t: grading.last_boxed(t)),
        lenient=_or_rounded(_lenient_math, lambda t: grading.lenient_answer(t)),
    ),
    # a Python value, compared by ast.literal_eval (CRUXEval)
    "python": Kind(
        find=literals.boxed,
        right=_right_literal,
        lenient=_lenient_literal,
        clusters=literals.clusters,
    ),
    # A search trace. Its "answer" is the number of permutations found; right: all, by valid moves.
    "permutations": Kind(
        find=exploration.answer,
        right=lambda texts, golds: [
            exploration.solved(*pair) for pair in zip(texts, golds, strict=True)
        ],
    ),
}


def correct(
    texts: Sequence[str], problems: Sequence[Any], golds: Sequence[str] | None = None
) -> list[bool]:
    """Whether texts[i] holds the right answer to problems[i]; golds replaces their own answers."""
    return _grade(texts, problems, golds, lambda kind: kind.right)


def lenient(texts: Sequence[str], problems: Sequence[Any]) -> list[bool]:
    """As correct, but an answer outside a box counts too: a metric, never a reward."""
    return _grade(texts, problems, None, lambda kind: kind.lenient or kind.right)


def found(texts: Sequence[str], problems: Sequence[Any]) -> list[str | None]:
    """The answer in each text, None where there is none."""
    return [kind_of(problem).find(text) for text, problem in zip(texts, problems, strict=True)]


def clusters(texts: Sequence[str], problems: Sequence[Any], groups: Sequence[int]) -> list[int]:
    """The first row with an equivalent answer in each row's group; -1 for no answer."""
    answers, cluster = found(texts, problems), [-1] * len(texts)
    for kind, rows in _by_kind(problems):
        part = (kind.clusters or grading.clusters)(
            [answers[i] for i in rows], [groups[i] for i in rows]
        )
        for i, head in zip(rows, part, strict=True):
            cluster[i] = rows[head] if head >= 0 else -1
    return cluster


def kind_of(problem: Any) -> Kind:
    """The kind of a problem. Raises UserError for an unknown name."""
    name = getattr(problem, "kind", "math")
    if name not in KINDS:
        raise UserError(f"kind={name}: unknown kind of answer: it is one of {', '.join(KINDS)}")
    return KINDS[name]


def _grade(
    texts: Sequence[str],
    problems: Sequence[Any],
    golds: Sequence[str] | None,
    rule: Callable[[Kind], Verdicts],
) -> list[bool]:
    golds = [problem.answer for problem in problems] if golds is None else golds
    verdicts = [False] * len(texts)
    for kind, rows in _by_kind(problems):
        right = rule(kind)([texts[i] for i in rows], [golds[i] for i in rows])
        for i, verdict in zip(rows, right, strict=True):
            verdicts[i] = bool(verdict)
    return verdicts


def _by_kind(problems: Sequence[Any]) -> list[tuple[Kind, list[int]]]:
    """The kinds of the problems, each with the numbers of its rows."""
    rows: dict[str, list[int]] = {}
    for i, problem in enumerate(problems):
        rows.setdefault(getattr(problem, "kind", "math"), []).append(i)
    return [(kind_of(problems[part[0]]), part) for part in rows.values()]
