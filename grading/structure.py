"""Split normalised answers into parts, and compute the exact value of plain numbers."""

from __future__ import annotations

import re
from fractions import Fraction
from itertools import accumulate

MAX_EXPONENT = 9999  # longest power to compute, in digits; longer ones are refused
LISTED = (",", ";", r"\and", r"\or")
_OPEN, _CLOSE = ("(", "[", r"\{", "{"), (")", "]", r"\}", "}")


def tokens(text: str) -> list[str]:
    return re.findall(r"\\[A-Za-z]+|\\.|.", text, re.DOTALL)


def split(text: str, separators: tuple[str, ...]) -> list[str]:
    """The parts of `text` between separators that are outside all brackets."""
    if not any(separator in text for separator in separators):
        return [text.strip()]
    parts, depth, last = [""], 0, ""
    for token in tokens(text):
        depth += (token in _OPEN) - (token in _CLOSE)
        if token in separators and depth == 0:
            if not (token in (r"\and", r"\or") and last == ","):  # "2, and 4" has one separator
                parts.append("")
        else:
            parts[-1] += token
        last = token if token.strip() else last
    return [part.strip() for part in parts]


def shape(text: str) -> tuple[str, list[str]]:
    """(kind, parts) of an answer: "union", "matrix" with its shape, its brackets, or "list".

    Brackets are the kind of a tuple or interval. A set is a list. A single expression is a list of
    one part.
    """
    text = re.sub(r"^[A-Za-z]\\in(?![A-Za-z])\s*", "", text)
    text = re.sub(r"^\]([^\[\]]*[\[\]])$", r"(\1", re.sub(r"^([\[\](][^\[\]]*)\[$", r"\1)", text))
    if len(parts := split(text, (r"\cup",))) > 1:
        return "union", parts
    matrix = re.fullmatch(r"[(\[]?\\begin\{pmatrix\}(.*)\\end\{pmatrix\}[)\]]?", text)
    if matrix:
        rows = [split(row, ("&",)) for row in re.sub(r"\\\\$", "", matrix[1]).split(r"\\")]
        return f"matrix {[len(row) for row in rows]}", [cell for row in rows for cell in row]
    found = tokens(text) if text.startswith(_OPEN) else []
    depths = list(accumulate((t in _OPEN) - (t in _CLOSE) for t in found))
    if len(found) > 2 and depths[-1] == 0 and min(depths[:-1]) > 0:  # one bracket around it all
        brackets, inside = found[0] + found[-1], split("".join(found[1:-1]), LISTED)
        if brackets == r"\{\}":
            return "list", _with_both_signs(inside)
        if len(inside) > 1:
            return brackets, inside
    return "list", _with_both_signs(split(text, LISTED))


def matrix_of(rows: list[str]) -> str:
    return r"\begin{pmatrix}" + r"\\".join(rows) + r"\end{pmatrix}"


def _with_both_signs(parts: list[str]) -> list[str]:
    """Replace each `a \\pm b` by the two values it stands for."""
    both = []
    for part in parts:
        if r"\pm" in part:
            plus, minus = part.replace(r"\pm", "+"), part.replace(r"\pm", "-")
            both += [plus.replace(r"\mp", "-").lstrip("+"), minus.replace(r"\mp", "+")]
        else:
            both.append(part)
    return both


_NUMBER = r"\d+(?:\.\d+)?"
_POWER = rf"({_NUMBER})(?:\^\{{(-?\d+)\}})?"


def fraction(text: str) -> Fraction | None:
    """The exact value of a decimal, fraction, mixed number or power; None for anything else."""
    sign, text = (-1, text[1:]) if text.startswith("-") else (1, text.removeprefix("+"))
    if mixed := re.fullmatch(r"(\d+) ?(?:\\frac\{(\d+)\}\{(\d+)\}|(?<= )(\d+)/(\d+))", text):
        whole, top, bottom = int(mixed[1]), int(mixed[2] or mixed[4]), int(mixed[3] or mixed[5])
        return sign * (whole + Fraction(top, bottom)) if top < bottom else None
    ratio = re.fullmatch(r"\\frac\{([^{}]*(?:\{-?\d+\})?)\}\{([^{}]*(?:\{-?\d+\})?)\}", text)
    over = ratio.groups() if ratio else text.split("/")
    values = [product(part) for part in over]
    if len(values) > 2 or None in values or values[1:] == [0]:
        return None
    return sign * values[0] / (values[1] if len(values) == 2 else 1)


def product(text: str) -> Fraction | None:
    """The exact value of a product of numbers and powers; None for anything else."""
    sign, text = (-1, text[1:]) if text.startswith("-") else (1, text)
    value = Fraction(sign)
    for factor in re.split(r"\\times ?|\\cdot ?|\*", text):
        power = re.fullmatch(_POWER, factor)
        exponent = int(power[2] or 1) if power else 0
        if not power or abs(exponent) * len(power[1]) > MAX_EXPONENT:
            return None
        base = Fraction(power[1])
        if base == 0 and exponent <= 0:
            return None
        value *= base**exponent
    return value
