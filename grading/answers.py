"""The grading rule: `is_equiv` decides whether an answer equals the gold answer.

How a pair is compared: give both sides one spelling (spelling.py) and one form (forms.py), split
them (structure.py), and compare the parts here. Remaining single expressions pass guards.py and go
to symbolic.py. words.py lists the words, units, commands and signs that are known.

docs/GRADING.md states the rule for units, lists, equations and so on, with an audit of it.
grading/workers.py grades batches.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from fractions import Fraction

from grading import symbolic, words
from grading.forms import align
from grading.guards import readable
from grading.spelling import normalize, spell
from grading.structure import LISTED, fraction, shape, split

MAX_CHARS = 500  # a longer answer is right only if it equals the gold string

# Compares two expressions; None if it does not know.
Decide = Callable[[str, str], bool | None]

_BASE = r"([0-9A-F]*\d[0-9A-F]*)(?:_\{(\d+)\})?"
_NAME = re.compile(
    r"(?=.*[A-Za-z])(?>\\[A-Za-z]++|[A-Za-z'{} ]|_\{[^{}]*+\}|\|[^|]*+\||\([^()]*+\))++"
)


def _unit(text: str) -> tuple[str, object]:
    """Split off the unit after (or currency sign before) a value: (value, unit).

    A known unit is a tuple of (name, power) pairs, an unknown one the text itself, none is "".
    """
    if text.endswith("%"):
        return text[:-1], (("pct", 1),)
    if degrees := re.fullmatch(r"([^^]*)\^\\circ ?(?:([CF])|\\text\{([CF])\})?", text):
        return degrees[1], ((degrees[2] or degrees[3] or "deg", 1),)
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
    if ordinal:  # the 12th grade is 12, but the 5th root is not 5
        return (value, "") if named.strip() in words.RANKED else (text, named.strip())
    known = words.unit(named, bare, value == "1")
    return (value, known) if known else (text, "") if bare else (value, named.strip())


def _all(verdicts: Iterator[bool | None]) -> bool | None:
    """`all` with unknowns: False if any is False, else None if any is None, else True."""
    known = set(verdicts)
    return False if False in known else None if None in known else True


def _compare(answer: str, gold: str, decide: Decide) -> bool | None:
    """Compare two normalised answers part by part. Returns None if `decide` does not know."""
    if answer == gold:
        return True
    if (aligned := align(answer, gold)) is None or _misnamed(*aligned):
        return False
    answer, gold = aligned
    sides, gold_sides = _equation(answer), _equation(gold)
    if len(sides) > 1 or len(gold_sides) > 1:
        return _compare_equations(sides, gold_sides, decide)
    (kind, parts), (gold_kind, gold_parts) = shape(answer), shape(gold)
    if kind != gold_kind or len(parts) != len(gold_parts):
        return False
    if kind not in ("list", "union"):
        return _all(_compare(a, g, decide) for a, g in zip(parts, gold_parts, strict=True))
    if parts == [answer] and gold_parts == [gold]:
        return _compare_scalars(answer, gold, decide)
    verdicts = []
    for gold_part in gold_parts:  # in any order: each gold part uses up one part of the answer
        found = []
        while len(found) < len(parts) and True not in found:
            found.append(_compare(parts[len(found)], gold_part, decide))
        verdicts.append(True if True in found else None if None in found else False)
        parts.pop(found.index(verdicts[-1]))
    return _all(verdicts)


def _equation(text: str) -> list[str]:
    """The sides of an equation or a chain of equations; a single side if there is no `=`."""
    return [text] if len(split(text, LISTED)) > 1 else split(text, ("=",))


def _compare_equations(sides: list[str], gold_sides: list[str], decide: Decide) -> bool | None:
    named, gold_named = _is_name(sides[0]), _is_name(gold_sides[0])
    if len(sides) == len(gold_sides) == 2 and named and gold_named:
        sides = _renamed(sides, gold_sides)
    if len(gold_sides) == 1:  # "x = 6/4 = 3/2" for 3/2: plain numbers in between must agree too
        asked = named or fraction(gold_sides[0]) is not None and len(_letters(sides[0])) > 1
        shown = [s for s in sides[1:-1] if fraction(s) is not None] if asked else sides[:-1]
        return _all(_compare(side, gold_sides[0], decide) for side in [*shown, sides[-1]])
    if len(sides) == 1:
        return bool(gold_named) and _compare(sides[0], gold_sides[-1], decide)
    if named and sides[0] == gold_sides[0]:
        return _compare_equations(sides, gold_sides[-1:], decide)
    if len(sides) == len(gold_sides) == 2:
        return _decide("=".join(sides), "=".join(gold_sides), decide)
    return False


def _letters(text: str) -> set[str]:
    return set(re.sub(r"\\[A-Za-z]+|[^A-Za-z]", "", text))


def _is_name(text: str) -> bool:
    """Whether an equation's left side can name the value: a letter, f(2), an angle, a ratio a/b.

    2x or the root of x cannot, because their value is not that of x. A ratio or a root of several
    letters can, because it does not determine a single letter.
    """
    commands = set(re.findall(r"\\[A-Za-z]+", text))
    return (
        bool(_NAME.fullmatch(text))
        and commands <= words.NAMING
        and (not re.search(r"\\sqrt|\\frac", text) or len(_letters(text)) > 1)
    )


def _misnamed(answer: str, gold: str) -> bool:
    """Whether a tuple has named entries in an unusual order, as in (y,x)=(2,4)."""
    names = [re.match(r"\(([^()=]*)\)=(?=\()", side) for side in (answer, gold)]
    texts = [name and name[1] for name in names]
    if not any(texts) or texts[0] == texts[1]:
        return False
    listed = (texts[0] or texts[1]).split(",")
    usual = listed in ([r"r", r"\theta"], [r"r", r"\theta", "z"], [r"\rho", r"\theta", r"\phi"])
    return all(texts) or not usual and listed != sorted(set(listed))


def _renamed(sides: list[str], gold_sides: list[str]) -> list[str]:
    """Rename a function's argument to that of the gold answer: f(z) = z becomes f(x) = x."""
    found = [re.fullmatch(r"([A-Za-z])\(([a-z])\)", s[0]) for s in (sides, gold_sides)]
    if None in found or found[0][1] != found[1][1] or found[1][2] in _letters(sides[1]):
        return sides
    letter = rf"(?<![\\A-Za-z]){found[0][2]}(?![A-Za-z])"
    return [gold_sides[0], re.sub(letter, found[1][2], sides[1])]


def _compare_scalars(answer: str, gold: str, decide: Decide) -> bool | None:
    """Compare single expressions: units, plain numbers, words, number bases, then `decide`."""
    answer = re.split(r" ?\\approx(?![A-Za-z])", answer)[0]
    (value, unit), (gold_value, gold_unit) = _unit(answer), _unit(gold)
    if unit != gold_unit and (isinstance(unit or gold_unit, str) or (unit and gold_unit)):
        return False
    percent, gold_percent = (u == (("pct", 1),) for u in (unit, gold_unit))
    exact, gold_exact = fraction(value), fraction(gold_value)
    if exact is not None and gold_exact is not None:
        if percent != gold_percent and exact * (100 if gold_percent else 1) == gold_exact * (
            100 if percent else 1
        ):
            return True  # 50% is 0.5; if a percentage was asked for, it is also 50
        return exact == gold_exact
    if percent != gold_percent:
        return False
    spoken = [_words(v) for v in (value, gold_value)]
    if r"\text" in value + gold_value or all(len(s or "") > 1 for s in spoken):
        if None in spoken:
            return False
        if r"\text" in value + gold_value:
            spoken = [s.casefold() for s in spoken]
        same = spoken[0] == spoken[1]
        return same or r"\text" not in value + gold_value and _product_of_variables(*spoken)
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
    """Words or a run of letters, without \\text, parentheses and a leading article; else None."""
    plain = re.sub(r"\\text\{([^{}]*)\}", r"\1 ", text).strip("() ")
    plain = re.sub(r"^(?:an|a|the) (?=.)", "", plain)
    plain = re.sub(r"(?<=[A-Za-z]) (?=\d)", "", plain)  # October 30, in \text or not
    return plain if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 :'.]*", plain) else None


def _product_of_variables(a: str, b: str) -> bool:
    """Whether two runs of letters are the same product: xy is yx.

    Only certain letters make a product. Others make a word or a name: LQSX is not LXQS.
    """
    named = any(set(a) <= set(letters) for letters in ("xyz", "abc", "pqr", "mnk", "uvw"))
    return named and sorted(a) == sorted(b)


def _decide(answer: str, gold: str, decide: Decide) -> bool | None:
    """Ask `decide`, unless the parser would lose a part of either side (guards.py)."""
    read, gold_read = readable(answer), readable(gold)
    if read is None or gold_read is None:
        return False
    same = decide(read, gold_read)
    if not same and (general := _general(answer, gold)):
        return decide(readable(general), gold_read)
    return same


def _general(answer: str, gold: str) -> str | None:
    """The answer with the gold answer's letter for "any integer": n pi becomes k pi. Else None."""
    found = [
        set(re.findall(r"(?<![\\A-Za-z])[a-zA-Z]", re.sub(r"\\[A-Za-z]+", " ", t)))
        for t in (answer, gold)
    ]
    both = all(len(f) == 1 and f <= set("knm") for f in found) and found[0] != found[1]
    if not both or r"\pi" not in answer or r"\pi" not in gold:
        return None
    return re.sub(r"(?<![\\A-Za-z])[knm](?![A-Za-z])", found[1].pop(), answer)


_spelt = functools.lru_cache(maxsize=4096)(spell)
_normal = functools.lru_cache(maxsize=4096)(normalize)


def quick_verdict(answer: str | None, gold: str) -> bool | None:
    """The verdict if it can be found in linear time, else None: a worker must decide.

    Compares spellings and plain numbers, which settles most rows. Everything that splits answers
    runs in a worker process, which can be killed.
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
    """The value of a short integer, decimal or fraction of integers, else None."""
    plain = re.fullmatch(
        r"([+-]?)(?:(\d{1,60}+(?:\.\d{1,60}+)?)|\\frac\{(\d{1,60}+)\}\{(\d{1,60}+)\})", text
    )
    if not plain or (plain[4] and int(plain[4]) == 0):
        return None
    value = Fraction(plain[2]) if plain[2] else Fraction(int(plain[3]), int(plain[4]))
    return -value if plain[1] == "-" else value


def is_equiv(answer: str | None, gold: str) -> bool:
    """Whether `answer` equals the gold answer by the rule in docs/GRADING.md. No side is boxed.

    It runs in this process and may take arbitrarily long on hostile answers. Use `Grader` for
    batches and for the texts of a model.
    """
    verdict = quick_verdict(answer, gold)
    if verdict is None:
        with contextlib.suppress(RecursionError):
            verdict = _compare(_normal(answer), _normal(gold), symbolic.equal)
    return bool(verdict)
