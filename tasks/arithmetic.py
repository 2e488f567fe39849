"""Generated arithmetic: problems that no model can have seen in training.

Problems of `arithmetic` have two operations, those of `arithmetic_5` five, and so on up to twenty.
The idea is RandomCalculation of "Reasoning or Memorization?" (arXiv 2507.10532). That paper shows
that random rewards help on benchmarks that a model may have memorised, but not on new arithmetic.

A problem is a function of (number of operations, index), so every machine makes the same problems.
The train and test splits never share a problem.
"""

import re
from fractions import Fraction
from zlib import crc32

import numpy as np

from harness.errors import UserError

OPERATIONS = 2  # the number of operations of plain `arithmetic`
MOST_OPERATIONS = 20
N_TRAIN, N_TEST = 4000, 500
STREAM = 301  # first key of the generator; nothing else uses this key


def operations_of(name: str) -> int | None:
    """The number of operations in the name of a data set; None if it is another data set.

    Raises UserError if the number is not from 1 to 20.
    """
    match = re.fullmatch(r"arithmetic(?:_(\d{1,4}))?", name)
    if not match:
        return None
    operations = int(match[1] or OPERATIONS)
    if not 1 <= operations <= MOST_OPERATIONS:
        raise UserError(f"{name}: arithmetic has 1 to {MOST_OPERATIONS} operations")
    return operations


def make_rows(operations: int, split: str) -> list[dict[str, str]]:
    """The N_TRAIN or N_TEST problems of a split, as rows of a data set."""
    rows: dict[str, dict[str, str]] = {}
    wanted, index = (N_TRAIN if split == "train" else N_TEST), 0
    while len(rows) < wanted:
        text, value = _expression(np.random.default_rng((STREAM, operations, index)), operations)
        index += 1
        # The text decides the split, so equal problems are in the same split.
        in_test = crc32(text.encode()) % 9 == 0
        if in_test == (split == "test") and text not in rows:
            id_ = f"arithmetic_{operations}/{index - 1}"
            level = str(operations)
            problem = f"What is {text}?"
            rows[text] = {"problem": problem, "answer": str(value), "id": id_, "level": level}
    return list(rows.values())


def _expression(rng: np.random.Generator, operations: int) -> tuple[str, Fraction]:
    """A random expression of integers from 0 to 100 and its exact value."""
    if operations == 0:
        number = int(rng.integers(0, 101))
        return str(number), Fraction(number)
    left_operations = int(rng.integers(0, operations))
    left, a = _expression(rng, left_operations)
    right, b = _expression(rng, operations - 1 - left_operations)
    sign = "+-*/"[rng.choice(4, p=(0.35, 0.35, 0.2, 0.1))]
    if sign == "/" and b == 0:
        sign = "+"
    value = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else a}[sign]
    if left_operations:
        left = f"({left})"
    if operations - 1 - left_operations:
        right = f"({right})"
    return f"{left} {sign} {right}", value
