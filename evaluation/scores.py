"""The figures of graded completions.

A row is one problem with its k samples. It has completions, correct and maybe finish_reason and
tokens, each a list of k, and problem, answer and maybe id, subject, level and kind.
"""

from collections.abc import Callable

import numpy as np

import grading
import rewards
from data import Problem
from evaluation.statistics import (
    bootstrap_interval,
    majority_is_right,
    pass_curve,
    standard_error,
)
from tasks import answers


def problem_of(row: dict) -> Problem:
    """The problem of a saved row."""
    columns = {key: str(row.get(key) or "") for key in ("id", "subject", "level")}
    return Problem(row["problem"], row["answer"], **columns, kind=row.get("kind") or "math")


def flat(rows: list[dict]) -> tuple[list[str], list[Problem]]:
    """The completions of all rows, and the problem of each."""
    problems = [problem_of(row) for row in rows]
    texts = [text for row in rows for text in row["completions"]]
    return texts, [
        problem for row, problem in zip(rows, problems, strict=True) for _ in row["completions"]
    ]


def grade(rows: list[dict]) -> list[dict]:
    """The rows with new `correct` columns, by the rule of each problem's data set."""
    verdicts = iter(answers.correct(*flat(rows)))
    return [{**row, "correct": [bool(next(verdicts)) for _ in row["completions"]]} for row in rows]


def disagreements(rows: list[dict], graded: list[dict]) -> list[tuple[int, int]] | None:
    """[(row, sample)] whose verdict differs from a saved `correct` column; None without columns."""
    if not all(isinstance(row.get("correct"), list) for row in rows):
        return None
    pairs = zip(rows, graded, strict=True)
    return [
        (i, j)
        for i, (old, new) in enumerate(pairs)
        for j, (a, b) in enumerate(zip(old["correct"], new["correct"], strict=True))
        if bool(a) != b
    ]


# ---- what one response is


def uses_code(text: str) -> bool:
    """The measure of code reasoning in "Spurious Rewards" (arXiv 2506.10947)."""
    return "python" in text.lower()


def is_boxed(text: str) -> bool:
    return grading.last_boxed(text) is not None


def length_of(row: dict, i: int) -> int:
    """Tokens of sample i with its end token, or characters where the tokens were not saved."""
    return len(row["tokens"][i]) if row.get("tokens") else len(row["completions"][i])


# name -> (row, sample) -> value; None where it is unknown
MEASURES: dict[str, Callable[[dict, int], float | None]] = {
    "accuracy": lambda row, i: row["correct"][i],
    "boxed": lambda row, i: is_boxed(row["completions"][i]),
    "code_frequency": lambda row, i: uses_code(row["completions"][i]),
    "truncated": lambda row, i: (
        row["finish_reason"][i] == "length" if row.get("finish_reason") else None
    ),
    "repetition": lambda row, i: rewards.repeats(row["completions"][i]),
    "length": length_of,
}


def per_problem(rows: list[dict], name: str) -> np.ndarray | None:
    """The mean of a measure over the samples of each problem, [n]; None where it is unknown."""
    measure = MEASURES[name]
    values = [[measure(row, i) for i in range(len(row["completions"]))] for row in rows]
    if any(value is None for row in values for value in row):
        return None
    return np.array([np.mean(row) for row in values])


# ---- summaries


def summarize(rows: list[dict]) -> dict:
    """The figures of graded rows that are numbers.

    accuracy        mean of correct: avg@k, and greedy accuracy where k = 1
    stderr          its standard error over problems (k samples of one problem are not k problems)
    low, high       its 95 % bootstrap interval over problems
    pass_at_k       pass@k for k = the number of samples: the share of problems with a right one
    boxed           share with a box that is not empty
    code_frequency  share that contains "python"
    accuracy_code, accuracy_language   accuracy with and without code; None if there are none
    truncated       share that ran out of tokens; None if unknown
    repetition      share in which a pattern of 10 to 256 characters stands 10 times in a row
    length, length_right, length_wrong   mean length in length_unit: tokens, or characters where
                    the tokens were not saved
    n, k            problems, and samples of the first of them
    """
    samples = [(row, i) for row in rows for i in range(len(row["completions"]))]
    correct = np.array([bool(row["correct"][i]) for row, i in samples])
    code = np.array([uses_code(row["completions"][i]) for row, i in samples])
    length = np.array([length_of(row, i) for row, i in samples], dtype=float)
    reasons = [reason for row in rows for reason in row.get("finish_reason") or []]
    accuracy = per_problem(rows, "accuracy")
    low, high = bootstrap_interval(accuracy) or (None, None)

    def mean(values: np.ndarray) -> float | None:
        return float(values.mean()) if len(values) else None

    return {
        "accuracy": float(accuracy.mean()),
        "stderr": standard_error(accuracy),
        "low": low,
        "high": high,
        "pass_at_k": float(np.mean([any(row["correct"]) for row in rows])),
        "boxed": float(per_problem(rows, "boxed").mean()),
        "code_frequency": float(code.mean()),
        "accuracy_code": mean(correct[code]),
        "accuracy_language": mean(correct[~code]),
        "truncated": mean(np.array([reason == "length" for reason in reasons])),
        "repetition": float(per_problem(rows, "repetition").mean()),
        "length": float(length.mean()),
        "length_right": mean(length[correct]),
        "length_wrong": mean(length[~correct]),
        "length_unit": "tokens" if all(row.get("tokens") for row in rows) else "characters",
        "n": len(rows),
        "k": len(rows[0]["completions"]),
    }


def details(rows: list[dict]) -> dict:
    """The figures of graded rows that need a grader again, or that are tables.

    lenient_accuracy also takes answers outside a box (docs/GRADING.md). maj_at_k is the accuracy of
    the most common answer among the k samples, by clusters of equivalent answers. pass_curve is
    [[pass@k, standard error]] for k = 1, 2, ... by_level and by_subject: value -> accuracy, stderr
    and number of problems, where the rows have these columns.
    """
    texts, problems = flat(rows)
    lenient = iter(answers.lenient(texts, problems))
    shares = [float(np.mean([next(lenient) for _ in row["completions"]])) for row in rows]
    groups = [i for i, row in enumerate(rows) for _ in row["completions"]]
    cluster = iter(answers.clusters(texts, problems, groups))
    majority = [
        majority_is_right([next(cluster) for _ in row["completions"]], row["correct"])
        for row in rows
    ]
    found = {
        "lenient_accuracy": float(np.mean(shares)),
        "lenient_stderr": standard_error(shares),
        "maj_at_k": float(np.mean(majority)),
        "maj_stderr": standard_error(majority),
        "pass_curve": [list(point) for point in pass_curve([row["correct"] for row in rows])],
        "grader_timeouts": grading.grader().timeouts,
    }
    for key in ("level", "subject"):
        if table := by_column(rows, key):
            found[f"by_{key}"] = table
    return found


def by_column(rows: list[dict], key: str) -> dict[str, dict]:
    """accuracy, stderr and n of the problems of each value of a column; {} without the column."""
    accuracy = per_problem(rows, "accuracy")
    parts: dict[str, list[float]] = {}
    for row, value in zip(rows, accuracy, strict=True):
        if row.get(key):
            parts.setdefault(str(row[key]), []).append(float(value))
    return {
        name: {"accuracy": float(np.mean(v)), "stderr": standard_error(v), "n": len(v)}
        for name, v in sorted(parts.items())
    }
