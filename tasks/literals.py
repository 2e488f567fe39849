"""Answers that are Python values: find them in a text and compare them. Nothing is executed.

A value is what ast.literal_eval reads: numbers, strings, bytes, booleans, None, and lists, tuples,
sets and dicts of these.
"""

import ast
import re
import warnings
from typing import Any

from grading import last_boxed

MAX_CHARS = 5000  # a longer answer is no value
MAX_ENDS = 200  # closing braces that are tried as the end of a box
NOTHING = object()  # what is read from a text that is no literal


def read(text: str | None) -> Any:
    """The value of a Python literal, or NOTHING if the text is none."""
    if text is None or not 0 < len(text.strip()) <= MAX_CHARS:
        return NOTHING
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as an unknown escape in a string
            return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return NOTHING


def undress(text: str) -> str:
    """The text without the LaTeX or Markdown around and inside it."""
    text = text.strip().strip("`$").strip()
    while match := re.fullmatch(r"\\(?:text|texttt|mathrm|mathtt|mbox)\s*\{(.*)\}", text, re.S):
        text = match[1].strip().strip("`").strip()
    return re.sub(r"\\([{}_#%&$])", r"\1", text)


def boxed(text: str) -> str | None:
    """The answer in the last box, None where there is none.

    A box may hold braces that do not match, as in \\boxed{'}'}. It therefore ends at the first
    brace at which its content is a literal, and only otherwise at the matching brace.
    """
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    body = text[start + len("\\boxed{") :][:MAX_CHARS]
    ends = [i for i, character in enumerate(body) if character == "}"][:MAX_ENDS]
    for end in ends:
        for candidate in (body[:end].strip(), undress(body[:end])):
            if read(candidate) is not NOTHING:
                return candidate
    return last_boxed(text)


def loose(text: str) -> str | None:
    """The answer of a text that may have no box: the last box, assertion, code span or line."""
    lines = [line for line in text.strip().splitlines() if line.strip().strip("`")]
    spans = re.findall(r"`([^`\n]+)`", text)
    asserted = [line.split("==", 1)[1] for line in lines if line.lstrip().startswith("assert ")]
    asserted = [one for one in asserted if "==" not in one]
    candidates = [boxed(text), *asserted[-1:], *spans[-1:], *lines[-1:]]
    return next((one for one in candidates if read(one) is not NOTHING), candidates[0])


def same(answer: str | None, gold: str) -> bool:
    """Whether two literals are equal as Python compares them (1 == True, dicts in any order)."""
    a, b = read(answer), read(gold)
    return a is not NOTHING and b is not NOTHING and bool(a == b)


def clusters(answers: list[str | None], groups: list[int]) -> list[int]:
    """The first row of each row's cluster of equal values in its group; -1 without an answer."""
    heads: dict[int, list[tuple[int, Any]]] = {}
    found = []
    for row, (answer, group) in enumerate(zip(answers, groups, strict=True)):
        if answer is None or not answer.strip():
            found.append(-1)
            continue
        value = read(answer)
        value = ("no literal", answer.strip()) if value is NOTHING else ("literal", value)
        known = heads.setdefault(group, [])
        head = next((i for i, other in known if other == value), row)
        if head == row:
            known.append((row, value))
        found.append(head)
    return found
