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
import words
from guards import MAX_EXPONENT, readable
from spelling import normalize, spell

MAX_CHARS = 500  # a longer answer is right only if it is the gold string itself

# ---------------------------------------------------------------------------- taking answers apart

Decide = Callable[[str, str], bool | None]
LISTED = (",", ";", r"\and", r"\or")
_OPEN, _CLOSE = ("(", "[", r"\{", "{"), (")", "]", r"\}", "}")


def _tokens(text: str) -> list[str]:
    return re.findall(r"\\[A-Za-z]+|\\.|.", text, re.DOTALL)


def _split(text: str, separators: tuple[str, ...]) -> list[str]:
    """Parts of `text` between separators that stand outside all brackets."""
    if not any(separator in text for separator in separators):
        return [text.strip()]
    parts, depth, last = [""], 0, ""
    for token in _tokens(text):
        depth += (token in _OPEN) - (token in _CLOSE)
        if token in separators and depth == 0:
            if not (token in (r"\and", r"\or") and last == ","):  # "2, and 4" has one separator
                parts.append("")
        else:
            parts[-1] += token
        last = token if token.strip() else last
    return [part.strip() for part in parts]


def _shape(text: str) -> tuple[str, list[str]]:
    """(kind, parts): a union, a matrix, a tuple or interval by its brackets, else a list.

    A set and a list are one kind, compared without order; a lone expression is a list of one.
    """
    text = re.sub(r"^[A-Za-z]\\in(?![A-Za-z])\s*", "", text)
    text = re.sub(r"^\]([^\[\]]*[\[\]])$", r"(\1", re.sub(r"^([\[\](][^\[\]]*)\[$", r"\1)", text))
    if len(parts := _split(text, (r"\cup",))) > 1:
        return "union", parts
    matrix = re.fullmatch(r"[(\[]?\\begin\{pmatrix\}(.*)\\end\{pmatrix\}[)\]]?", text)
    if matrix:
        rows = [_split(row, ("&",)) for row in re.sub(r"\\\\$", "", matrix[1]).split(r"\\")]
        return f"matrix {[len(row) for row in rows]}", [cell for row in rows for cell in row]
    tokens = _tokens(text) if text.startswith(_OPEN) else []
    depths = list(accumulate((t in _OPEN) - (t in _CLOSE) for t in tokens))
    if len(tokens) > 2 and depths[-1] == 0 and min(depths[:-1]) > 0:  # one bracket around it all
        brackets, inside = tokens[0] + tokens[-1], _split("".join(tokens[1:-1]), LISTED)
        if brackets == r"\{\}":
            return "list", _with_both_signs(inside)
        if len(inside) > 1:
            return brackets, inside
    return "list", _with_both_signs(_split(text, LISTED))


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


def _unit(text: str) -> tuple[str, object]:
    """(value, unit): what stands behind a number or before it; a string where it is not known."""
    if text.endswith("%"):
        return text[:-1], (("pct", 1),)
    if degrees := re.fullmatch(r"([^^]*)\^\\circ ?(?:([CF])|\\text\{([CF])\})?", text):
        return degrees[1], ((degrees[2] or degrees[3] or "deg", 1),)
    if minutes := re.fullmatch(r"([\d.]+)('{1,2})", text):
        return minutes[1], minutes[2]
    if text.lstrip("-").startswith((r"\$", "€", "£")):
        sign = text.lstrip("-")[0]
        name = {"\\": "USD", "€": "EUR", "£": "GBP"}[sign]
        return text.replace(r"\$" if sign == "\\" else sign, "", 1), ((name, 1),)
    start = text.find(r"\text{")
    bare = start < 0
    if bare:
        tail = re.search(r"[\d)}]([A-Za-z][A-Za-z. ]+(?:\^\{[23]\})?)$", text)
        start = tail.start(1) if tail else -1
    value, behind = text[:start].rstrip(), text[start:]
    if start <= 0 or value.endswith(("+", "-", "=", "*", "/", "^", ",", r"\cdot", r"\times")):
        return text, ""
    ordinal = re.match(r"\\text\{(?:st|nd|rd|th)\}", behind) if value.isdigit() else None
    behind = behind[ordinal.end() :] if ordinal else behind
    if ordinal and not behind:
        return value, ""
    named = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", behind.replace(".", " "))
    known = words.unit(named, bare, bool(ordinal) or value == "1")
    return (value, known) if known else (text, "") if bare else (value, named.strip())


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
    return [text] if len(_split(text, LISTED)) > 1 else _split(text, ("=",))


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
    if unit != gold_unit and (isinstance(unit or gold_unit, str) or (unit and gold_unit)):
        return False
    percent, gold_percent = (u == (("pct", 1),) for u in (unit, gold_unit))
    exact, gold_exact = _fraction(value), _fraction(gold_value)
    if exact is not None and gold_exact is not None:
        if percent != gold_percent and exact * (100 if gold_percent else 1) == gold_exact * (
            100 if percent else 1
        ):
            return True  # 50% is 0.5; it is also 50, where a percentage was asked for
        return exact == gold_exact
    if percent != gold_percent:
        return False
    spoken = [_words(v) for v in (value, gold_value)]
    if r"\text" in value + gold_value or all(len(s or "") > 1 for s in spoken):
        if None in spoken:
            return False
        if r"\text" in value + gold_value:
            spoken = [s.casefold() for s in spoken]
        return spoken[0] == spoken[1] or _product_of_variables(*spoken)
    if "_{" in value + gold_value:
        bases = [re.fullmatch(_BASE, v) for v in (value, gold_value)]
        if all(bases):
            (digits, base), (gold_digits, gold_base) = (match.groups() for match in bases)
            return digits == gold_digits and base in (None, gold_base or "10")
    degree = (("deg", 1),)
    if degree in (unit, gold_unit) and unit != gold_unit and r"\pi" in value + gold_value:
        value = rf"({value})\cdot\pi/180" if unit else value  # 30 degrees are pi/6
        gold_value = rf"({gold_value})\cdot\pi/180" if gold_unit else gold_value
    return value == gold_value or _decide(value, gold_value, decide)


def _words(text: str) -> str | None:
    """Words, or a run of letters, without \\text, parentheses and a leading article."""
    plain = re.sub(r"\\text\{([^{}]*)\}", r"\1 ", text).strip("() ")
    plain = re.sub(r"^(?:an|a|the) (?=.)", "", plain)
    return plain if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 :'.]*", plain) else None


def _product_of_variables(a: str, b: str) -> bool:
    """xy is yx, but LQSX is not LXQS and no is not on: other letters make words, in order."""
    named = any(set(a) <= set(letters) for letters in ("xyz", "abc", "pqr", "mnk", "uvw"))
    return named and sorted(a) == sorted(b)


def _decide(answer: str, gold: str, decide: Decide) -> bool | None:
    """Ask, unless a part of either would be lost on the way (guards.py)."""
    read, gold_read = readable(answer), readable(gold)
    if read is None or gold_read is None:
        return False
    same = decide(read, gold_read)
    if not same and (general := _general(answer, gold)):
        return decide(readable(general), gold_read)
    return same


def _general(answer: str, gold: str) -> str | None:
    """The answer with the gold letter for any integer: n pi for k pi, the only letter."""
    found = [set(re.findall(r"(?<![\\A-Za-z])[a-zA-Z]", re.sub(r"\\[A-Za-z]+", " ", t)))
             for t in (answer, gold)]  # fmt: skip
    both = all(len(f) == 1 and f <= set("knm") for f in found) and found[0] != found[1]
    if not both or r"\pi" not in answer or r"\pi" not in gold:
        return None
    return re.sub(r"(?<![\\A-Za-z])[knm](?![A-Za-z])", found[1].pop(), answer)


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
