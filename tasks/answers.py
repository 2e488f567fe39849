"""What a correct answer is. It belongs to the data set: `Problem.kind` names one of KINDS.

Rewards, metrics, evals and labels ask here. A data set with other answers than boxed mathematics
adds its own kind: how to find an answer in a text, and which answers are right.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grading
from evaluation import exploration


@dataclass(frozen=True)
class Kind:
    """find(text) is the answer in it, or None; right(texts, golds) grades a batch."""

    find: Callable[[str], str | None]
    right: Callable[[list[str], list[str]], list[bool]]


# Looked up in `grading` when called, so that a fork or a test may replace either.
KINDS = {
    "math": Kind(
        find=lambda text: grading.last_boxed(text),
        right=lambda texts, golds: grading.correct(texts, golds),
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
    golds = [problem.answer for problem in problems] if golds is None else golds
    kinds = [_kind(problem) for problem in problems]
    verdicts = [False] * len(texts)
    for kind in dict.fromkeys(kinds):
        rows = [i for i, other in enumerate(kinds) if other is kind]
        right = kind.right([texts[i] for i in rows], [golds[i] for i in rows])
        for i, verdict in zip(rows, right, strict=True):
            verdicts[i] = bool(verdict)
    return verdicts


def found(texts: Sequence[str], problems: Sequence[Any]) -> list[str | None]:
    """The answer in each text, None where there is none."""
    return [_kind(problem).find(text) for text, problem in zip(texts, problems, strict=True)]


def _kind(problem: Any) -> Kind:
    return KINDS[getattr(problem, "kind", "math")]
