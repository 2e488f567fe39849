"""Bring an answer and the gold answer into one form (`align`).

Examples: an interval written as an inequality, a point as `x=8, y=-2`, a column as a sum of unit
vectors, "two" for 2. The rules are in docs/GRADING.md.
"""

from __future__ import annotations

import re

from grading import words
from grading.structure import LISTED, fraction, matrix_of, split, tokens

_RELATIONS = {"<": "<", ">": ">", r"\le": "<=", r"\ge": ">="}
MINUS, PLUS = r"(-\infty", r"\infty)"
_TIME = re.compile(r"(\d{1,2}(?::\d\d)*)(?:\\text\{(am|pm)\}|(am|pm))", re.IGNORECASE)
_MATRIX = re.compile(r"(.*?)([(\[]?)\\begin\{pmatrix\}(.*)\\end\{pmatrix\}[)\]]?", re.DOTALL)
_EACH = re.compile(r",?(?:\\text\{for (?:all|every|any)(?: real)?\}|for (?:all|any)) ?[a-zA-Z]$")
_INTEGER = re.compile(r",(?:\\text\{where\})?[kmn]\\in ?\\mathbb\{Z\}$")
_LABEL = re.compile(r"\\text\{(min|max)(?:imum)?\}:|(min|max)(?:imum)?:|\\(min|max):")


def align(answer: str, gold: str) -> tuple[str, str] | None:
    """Both sides in one form, or None if the answer says what the gold answer does not."""
    answer, gold = _meaning(answer), _meaning(gold)
    relations = [_has_relation(side) for side in (answer, gold)]
    if all(relations) and (r"\or" in answer) != (r"\or" in gold):
        return None
    if any(relations):
        sets = [_interval(side) for side in (answer, gold)]
        if all(sets):
            return (sets[0][1], sets[1][1]) if sets[0][0] == sets[1][0] else None
        if sets[0] and not relations[1] and _is_set(gold, sets[0][0]):
            answer = sets[0][1]
        if sets[1] and not relations[0] and _is_set(answer, sets[1][0]):
            gold = sets[1][1]
    answer, gold = _point(answer, gold), _point(gold, answer)
    for text, other in ((answer, gold), (gold, answer)):
        either = re.findall(r"(?:^|\\or) ?([a-z])=", text) if r"\or" in text else []
        if "=" not in other and len(set(either)) > 1:
            return None  # "x = 5 or y = 6" is not a list of values
    answer, gold = _column(answer, gold), _column(gold, answer)
    return _ratio(answer, gold), _ratio(gold, answer)


def _meaning(text: str) -> str:
    """Rewrite what needs no other side: number words, sets, times of day, a factor of a matrix."""
    text = _unlabelled(_INTEGER.sub("", _EACH.sub("", text)))
    said = re.sub(r"\\text\{([^{}]*)\}", r"\1", text).lower()
    if said in words.EMPTY:
        return r"\varnothing"
    if said in words.REALS or re.sub(r"^[a-z]\\in ?", "", text) in words.REALS:
        return r"(-\infty,\infty)"
    if said in words.NUMBERS:
        return words.NUMBERS[said]
    if time := _TIME.fullmatch(text):
        return rf"\text{{{time[1]} {(time[2] or time[3]).lower()}}}"
    if text[1:].startswith(r"\approx") and text[0].isalpha():
        return text[1:].removeprefix(r"\approx").strip()
    matrix = _MATRIX.fullmatch(text)
    if matrix and matrix[1] and not re.search(r"[,;=(){]\\?$|\\begin|[,;=]", matrix[1]):
        factor = matrix[1].removesuffix(r"\cdot").strip()
        times = f"{factor}(%s)" if factor in ("-", "+") else rf"({factor})\cdot(%s)"
        rows = [
            "&".join(times % cell for cell in split(row, ("&",)))
            for row in matrix[3].split(r"\\")
            if row.strip()
        ]
        return matrix_of(rows)
    return text


def _has_relation(text: str) -> bool:
    return any(token in _RELATIONS for token in tokens(text))


def _is_set(text: str, letter: str) -> bool:
    """Whether `text` is an interval or a union of them, for `letter` if it names a variable."""
    named = re.match(r"([A-Za-z])\\in ?", text)
    if named and named[1] != letter:
        return False
    text = text[named.end() :] if named else text
    pieces = split(text, (r"\cup",))
    return all(p[:1] in ("(", "[", "]") and len(split(p[1:-1], (",",))) == 2 for p in pieces)


def _interval(text: str) -> tuple[str, str] | None:
    """(variable, interval) of inequalities in one letter. `or` unites, `and` intersects."""
    either = split(text, (r"\or",))
    if len(either) > 1:
        found = [_interval(part) for part in either]
        if None in found or len({letter for letter, _ in found}) > 1:
            return None
        return found[0][0], r"\cup".join(sorted(piece for _, piece in found))
    both = split(text, (r"\and",))
    if len(both) == 2 and (found := [_bounds(part) for part in both]) and None not in found:
        (letter, low, high), (other, low2, high2) = found
        one_each = (low is None) != (low2 is None) and (high is None) != (high2 is None)
        if letter == other and one_each:
            return letter, f"{low or low2},{high or high2}"
        return None
    bounds = _bounds(text) if len(both) == 1 and len(split(text, LISTED)) == 1 else None
    return bounds and (bounds[0], f"{bounds[1] or MINUS},{bounds[2] or PLUS}")


def _bounds(text: str) -> tuple[str, str | None, str | None] | None:
    """(letter, low, high) of inequalities: ("x", "(a", "b]") of `a < x <= b`; None is unbounded."""
    found = [_RELATIONS[t] for t in tokens(text) if t in _RELATIONS]
    sides = split(text, tuple(_RELATIONS))
    if len(sides) != len(found) + 1 or len(found) > 2 or not found:
        return None
    if len({sign[0] for sign in found}) > 1:
        return None
    if found[0][0] == ">":
        sides, found = sides[::-1], found[::-1]
    middle = 1 if len(sides) == 3 else 0 if re.fullmatch("[A-Za-z]", sides[0]) else 1
    if not re.fullmatch("[A-Za-z]", sides[middle]) or "" in sides:
        return None
    low = ("[" if "=" in found[0] else "(") + sides[0] if middle == 1 else None
    last = len(sides) - 1
    high = sides[last] + ("]" if "=" in found[-1] else ")") if last > middle else None
    return sides[middle], low, high


def _unlabelled(text: str) -> str:
    """Drop the labels of `min: 1, max: 3` if they are true."""
    labels = ["".join(found) for found in _LABEL.findall(text)]
    plain = _LABEL.sub("", text)
    values = [fraction(part) for part in split(plain, LISTED)]
    if sorted(labels) != ["max", "min"] or len(values) != 2 or None in values:
        return text
    low, high = values if labels[0] == "min" else values[::-1]
    return plain if low <= high else text


def _point(text: str, other: str) -> str:
    """Write `x=8, y=-2`, `(x,y)=(8,-2)` and `P(8,-2)` as a tuple if the other side is one."""
    if not other.startswith("("):
        return text
    if re.fullmatch(r"[A-Z]\(.+\)", text) and len(split(text[2:-1], (",",))) > 1:
        return text[1:]
    if names := re.match(r"\(([a-z](?:,[a-z])+)\)=(?=\()", text):
        listed = names[1].split(",")
        return text[names.end() :] if listed == sorted(set(listed)) else text
    given = [re.fullmatch(r"([a-z])=([^=]+)", p) for p in split(text, (",", ";", r"\and"))]
    if len(given) < 2 or None in given or len({g[1] for g in given}) < len(given):
        return text
    return f"({','.join(g[2] for g in sorted(given, key=lambda g: g[1]))})"


def _column(text: str, other: str) -> str:
    """Write a sum of unit vectors as a column or tuple, whichever the other side is."""
    if r"\vec{" not in text or r"\vec{" in other:
        return text
    terms = re.findall(r"([+-]?)([^+-]*?)(?:\\cdot)?\\vec\{([ijk])\}", text)
    whole = "".join(f"{s}{c}\\vec{{{v}}}" for s, c, v in terms)
    parts = {v: s.strip("+") + (c or "1") for s, c, v in terms}
    if whole != text.replace(r"\cdot\vec", r"\vec") or len(parts) < len(terms):
        return text
    matrix = _MATRIX.fullmatch(other)
    rows = matrix[3].split(r"\\") if matrix else split(other[1:-1], (",",))
    size = sum(1 for row in rows if row)
    column = [parts.pop(v, "0") for v in "ijk"[:size]]
    if parts or size not in (2, 3):
        return text
    if matrix:
        return matrix_of(column)
    return f"({','.join(column)})"


def _ratio(text: str, other: str) -> str:
    """Write a:b as a fraction, and a longer ratio as its quotients to the first number."""
    parts = split(text, (":",))
    if len(parts) < 2 or "=" in text or r"\text" in text or len(split(text, LISTED)) > 1:
        return text
    if len(parts) == 2:
        return rf"\frac{{{parts[0]}}}{{{parts[1]}}}"
    values = [fraction(part) for part in parts]
    if None in values or 0 in values:
        return "(ratio;" + ";".join(parts) + ")"
    return "(ratio;" + ";".join(str(value / values[0]) for value in values[1:]) + ")"
