"""The grading rule: whether an answer, spelt by spelling.py, is the gold one (`is_equiv`).

What is decided for units, lists or equations, and an audit of it, are in docs/GRADING.md; batches
belong to grade.py.

The comparison takes answers apart here (lists, tuples, intervals, matrices, units, `x =`), settles
plain numbers exactly as fractions, and leaves single expressions to symbolic.py.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import accumulate

import symbolic
from spelling import normalize, spell

MAX_CHARS = 500  # a longer answer is right only if it is the gold string itself
MAX_EXPONENT = 9999  # beyond it sympy may build numbers that never end

# ---------------------------------------------------------------------------- taking answers apart

Decide = Callable[[str, str], bool | None]
_OPEN, _CLOSE = ("(", "[", r"\{", "{"), (")", "]", r"\}", "}")


def _tokens(text: str) -> list[str]:
    return re.findall(r"\\[A-Za-z]+|\\.|.", text, re.DOTALL)


def _split(text: str, separators: tuple[str, ...]) -> list[str]:
    """Parts of `text` between separators that stand outside all brackets."""
    if not any(separator in text for separator in separators):
        return [text.strip()]
    parts, depth = [""], 0
    for token in _tokens(text):
        depth += (token in _OPEN) - (token in _CLOSE)
        if token in separators and depth == 0:
            parts.append("")
        else:
            parts[-1] += token
    return [part.strip() for part in parts]


def _shape(text: str) -> tuple[str, list[str]]:
    """(kind, parts): a union, a matrix, a tuple or interval by its brackets, else a list.

    A set and a list are one kind, compared without order; a lone expression is a list of one.
    """
    text = re.sub(r"^[A-Za-z]\\in(?![A-Za-z])\s*", "", text)
    if len(parts := _split(text, (r"\cup",))) > 1:
        return "union", parts
    matrix = re.fullmatch(r"[(\[]?\\begin\{pmatrix\}(.*)\\end\{pmatrix\}[)\]]?", text)
    if matrix:
        rows = [_split(row, ("&",)) for row in re.sub(r"\\\\$", "", matrix[1]).split(r"\\")]
        return f"matrix {[len(row) for row in rows]}", [cell for row in rows for cell in row]
    tokens = _tokens(text) if text.startswith(_OPEN) else []
    depths = list(accumulate((t in _OPEN) - (t in _CLOSE) for t in tokens))
    if len(tokens) > 2 and depths[-1] == 0 and min(depths[:-1]) > 0:  # one bracket around it all
        brackets, inside = tokens[0] + tokens[-1], _split("".join(tokens[1:-1]), (",", ";"))
        if brackets == r"\{\}":
            return "list", _with_both_signs(inside)
        if len(inside) > 1:
            return brackets, inside
    return "list", _with_both_signs(_split(text, (",", ";")))


def _with_both_signs(parts: list[str]) -> list[str]:
    """Write each `a \\pm b` as the two answers it stands for."""
    both = []
    for part in parts:
        if r"\pm" in part:
            plus, minus = part.replace(r"\pm", "+"), part.replace(r"\pm", "-")
            both += [plus.replace(r"\mp", "-").lstrip("+"), minus.replace(r"\mp", "+")]
        else:
            both.append(part)
    return both


# ------------------------------------------------------------------------------------- comparing

_NUMBER = r"\d+(?:\.\d+)?"
_BASE = r"([0-9A-F]*\d[0-9A-F]*)(?:_\{(\d+)\})?"
_POWER = rf"({_NUMBER})(?:\^\{{(-?\d+)\}})?"
_NAME = re.compile(
    r"(?=.*[A-Za-z])(?>\\[A-Za-z]++|[A-Za-z'{} ]|_\{[^{}]*+\}|\|[^|]*+\||\([^()]*+\))++"
)
# Words that are units without \text around them, in the singular.
_PLAIN = (
    "(?:(?:square|cubic|sq\\.?) )?(?:[ckm]m|f(?:oo|ee)?t|in(?:che?)?|yard|mile|unit|met(?:er|re)|"
    "(?:centi|kilo)met(?:er|re))|[km]g|m[il]|mph|pound|second|minute|hour|day|week|month|year|cent|"
    "dollar|degree|percent"
)
_UNIT = re.compile(
    rf"(.*[^ ,;=+*/^-]) ?(?:\\text\{{([A-Za-z /.]+)\}}|(?<=[\d)}}])({_PLAIN})s?)(\^\{{[23]\}})?"
)
# Words after a number that change it instead of naming what it counts.
_NOT_UNITS = re.compile(
    r"(?i)\b(?:hundred|thousand|[mbtr]+illion|dozen|score|hal(?:f|ve)|third|quarter|base|mod|pi|is|if|"
    r"(?:fif|six|seven|eigh|nin|ten|hundred|thousand)th|plus|minus|times|over|squared|cubed|below|"
    r"factorial|not|negative)s?\b"
)


def _fraction(text: str) -> Fraction | None:
    """The exact value of a plain number: decimals, fractions, mixed numbers, powers; else None."""
    sign, text = (-1, text[1:]) if text.startswith("-") else (1, text.removeprefix("+"))
    if mixed := re.fullmatch(r"(\d+) ?(?:\\frac\{(\d+)\}\{(\d+)\}|(?<= )(\d+)/(\d+))", text):
        whole, top, bottom = int(mixed[1]), int(mixed[2] or mixed[4]), int(mixed[3] or mixed[5])
        return sign * (whole + Fraction(top, bottom)) if top < bottom else None
    ratio = re.fullmatch(r"\\frac\{([^{}]*(?:\{-?\d+\})?)\}\{([^{}]*(?:\{-?\d+\})?)\}", text)
    over = ratio.groups() if ratio else text.split("/")
    values = [_product(part) for part in over]
    if len(values) > 2 or None in values or values[1:] == [0]:
        return None
    return sign * values[0] / (values[1] if len(values) == 2 else 1)


def _product(text: str) -> Fraction | None:
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


def _unit(text: str) -> tuple[str, str]:
    """(value, unit): degrees, percent, dollars, or a word that names what is counted."""
    if text.endswith("%"):
        return text[:-1], "percent"
    if text.endswith(r"^\circ"):
        return text.removesuffix(r"^\circ"), "degree"
    if text.lstrip("-").startswith(r"\$"):
        return text.replace(r"\$", "", 1), "dollar"
    match = _UNIT.fullmatch(text)
    if not match or _NOT_UNITS.search(match[2] or ""):
        return text, ""
    unit = re.sub(r"[ .]", "", match[2] or match[3]).lower().removesuffix("s")
    return match[1], unit + (match[4] or "")


def _all(verdicts: Iterator[bool | None]) -> bool | None:
    """Three-valued `all`: False if any is, else None (not settled) if any is."""
    known = set(verdicts)
    return False if False in known else None if None in known else True


def _compare(answer: str, gold: str, decide: Decide) -> bool | None:
    """Compare two normalised answers part by part; None where `decide` does not know."""
    if answer == gold:
        return True
    sides, gold_sides = _equation(answer), _equation(gold)
    if len(sides) > 1 or len(gold_sides) > 1:
        return _compare_equations(sides, gold_sides, decide)
    (kind, parts), (gold_kind, gold_parts) = _shape(answer), _shape(gold)
    if kind != gold_kind or len(parts) != len(gold_parts):
        return False
    if kind not in ("list", "union"):
        return _all(_compare(a, g, decide) for a, g in zip(parts, gold_parts, strict=True))
    if parts == [answer] and gold_parts == [gold]:
        return _compare_scalars(answer, gold, decide)
    verdicts = []
    for gold_part in gold_parts:  # without order: each gold part takes one part of the answer
        found = []
        while len(found) < len(parts) and True not in found:
            found.append(_compare(parts[len(found)], gold_part, decide))
        verdicts.append(True if True in found else None if None in found else False)
        parts.pop(found.index(verdicts[-1]))
    return _all(verdicts)


def _equation(text: str) -> list[str]:
    """The sides of an equation or of a chain of them; one side where there is none."""
    return [text] if len(_split(text, (",", ";"))) > 1 else _split(text, ("=",))


def _compare_equations(sides: list[str], gold_sides: list[str], decide: Decide) -> bool | None:
    named, gold_named = _NAME.fullmatch(sides[0]), _NAME.fullmatch(gold_sides[0])
    if len(gold_sides) == 1:  # "x = 6/4 = 3/2" for 3/2: plain numbers on the way must agree too
        shown = [s for s in sides[1:-1] if _fraction(s) is not None] if named else sides[:-1]
        return _all(_compare(side, gold_sides[0], decide) for side in [*shown, sides[-1]])
    if len(sides) == 1:
        return bool(gold_named) and _compare(sides[0], gold_sides[-1], decide)
    if named and sides[0] == gold_sides[0]:
        return _compare(sides[-1], gold_sides[-1], decide)
    if len(sides) == len(gold_sides) == 2:
        return _decide("=".join(sides), "=".join(gold_sides), decide)
    return False


def _compare_scalars(answer: str, gold: str, decide: Decide) -> bool | None:
    """Single expressions: units, words and number bases here, plain numbers as fractions."""
    answer = re.split(r" ?\\approx(?![A-Za-z])", answer)[0]
    (value, unit), (gold_value, gold_unit) = _unit(answer), _unit(gold)
    if unit and gold_unit and unit != gold_unit:
        return False
    exact, gold_exact = _fraction(value), _fraction(gold_value)
    if exact is not None and gold_exact is not None:
        percent = "percent" in (unit, gold_unit) and unit != gold_unit
        if percent and exact * (100 if gold_unit else 1) == gold_exact * (100 if unit else 1):
            return True  # 50% is 0.5; it is also 50, where a percentage was asked for
        return exact == gold_exact
    if "percent" in (unit, gold_unit) and unit != gold_unit:
        return False
    if r"\text" in value + gold_value:
        words = [re.sub(r"\\text\{([^{}]*)\}", r"\1", v).strip("() ") for v in (value, gold_value)]
        return words[0].casefold() == words[1].casefold()
    if "_{" in value + gold_value:
        bases = [re.fullmatch(_BASE, v) for v in (value, gold_value)]
        if all(bases):
            (digits, base), (gold_digits, gold_base) = (match.groups() for match in bases)
            return digits == gold_digits and base in (None, gold_base or "10")
    return value == gold_value or _decide(value, gold_value, decide)


# What must not reach sympy: "3 4" (read as a sum), bases inside an expression (dropped), towers of
# exponents, huge powers or factorials.
_REFUSED = re.compile(
    r"\d \d|[\d)}\]]_|\^\{[\d^{}]*\^|\^\{-?\d{5,}\}|(?:\d{4,}|[)}\]!])!|\\text"
    r"|[\x00-\x1f\ud800-\udfff]"
)


def _decide(answer: str, gold: str, decide: Decide) -> bool | None:
    """Ask, unless it is hostile or differs in capitals: Math-Verify lowers all letters."""
    letters = [set(re.sub(r"\\[A-Za-z]+|[^A-Za-z]", "", text)) for text in (answer, gold)]
    lowered = [{letter.lower() for letter in group} for group in letters]
    if _REFUSED.search(answer) or (letters[0] != letters[1] and lowered[0] == lowered[1]):
        return False
    return decide(answer, gold)


_spelt = functools.lru_cache(maxsize=4096)(spell)
_normal = functools.lru_cache(maxsize=4096)(normalize)


def quick_verdict(answer: str | None, gold: str) -> bool | None:
    """What can be settled in the caller's process, in linear time; None is for a worker.

    Equal spellings, plain numbers and plain words: most rows. Everything that takes answers apart
    runs where it can be killed.
    """
    if answer is None or not answer.strip():
        return False
    if answer.strip() == gold.strip():
        return True
    if len(answer) > MAX_CHARS or len(gold) > MAX_CHARS:
        return False
    if _spelt(answer) == _spelt(gold):
        return True
    numbers = [_decimal(_normal(text)) for text in (answer, gold)]
    if None not in numbers:
        return numbers[0] == numbers[1]
    return None


def _decimal(text: str) -> Fraction | None:
    """The value of a short integer, decimal or fraction of integers."""
    plain = re.fullmatch(
        r"([+-]?)(?:(\d{1,60}+(?:\.\d{1,60}+)?)|\\frac\{(\d{1,60}+)\}\{(\d{1,60}+)\})", text
    )
    if not plain or (plain[4] and int(plain[4]) == 0):
        return None
    value = Fraction(plain[2]) if plain[2] else Fraction(int(plain[3]), int(plain[4]))
    return -value if plain[1] == "-" else value


def is_equiv(answer: str | None, gold: str) -> bool:
    """Whether `answer` is the gold answer (docs/GRADING.md); neither side is boxed.

    Runs here and may take arbitrarily long on hostile answers: batches belong to `Grader`.
    """
    verdict = quick_verdict(answer, gold)
    if verdict is None:
        with contextlib.suppress(RecursionError):
            verdict = _compare(_normal(answer), _normal(gold), symbolic.equal)
    return bool(verdict)
