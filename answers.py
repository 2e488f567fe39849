"""The grading rule: find the answer in a text, and decide whether it is the gold one.

`last_boxed` finds the answer, `is_equiv` compares it with the gold one. What is decided for units,
lists or equations, and an audit of it, are in docs/GRADING.md; batches belong to grade.py.

The comparison takes answers apart here (lists, tuples, intervals, matrices, units, `x =`), settles
plain numbers exactly as fractions, and leaves single expressions to Math-Verify, whose yes is
checked to 40 digits: its own numeric test holds 1/2^99 and 1/2^98 for equal.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import accumulate

MAX_CHARS = 500  # a longer answer is right only if it is the gold string itself
MAX_EXPONENT = 9999  # beyond it sympy may build numbers that never end

# ---------------------------------------------------------------------------- finding the answer


def _group_end(text: str, start: int) -> int | None:
    """Index of the brace that closes the one at `start`; linear, escaped braces skipped."""
    depth = 0
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        if match[0] == "{":
            depth += 1
        elif match[0] == "}":
            depth -= 1
            if depth == 0:
                return match.start()
    return None


def _box_at(text: str, start: int) -> str | None:
    """Content of the box whose backslash is at `start`; None if unterminated or empty."""
    brace = re.compile(r"\\boxed\s*\{").match(text, start)
    end = _group_end(text, brace.end() - 1) if brace else None
    return (text[brace.end() : end].strip() or None) if end is not None else None


def last_boxed(text: str) -> str | None:
    r"""Content of the last \boxed{} by brace matching, stripped; None without one.

    The last \boxed decides: when it is unterminated or empty there is no answer, whatever earlier
    boxes or prose say. Linear in the length of the text.
    """
    start = text.rfind(r"\boxed")
    return _box_at(text, start) if start >= 0 else None


def lenient_answer(text: str) -> str | None:
    """A second, separate metric, never a reward: what a kind reader would take for the answer.

    The last complete box anywhere; else what follows the last "answer is", "answer:" or "####" on
    its line; else the last number.
    """
    end = len(text)
    for _ in range(20):  # enough for any honest text, and keeps hostile text linear
        end = text.rfind(r"\boxed", 0, end)
        if end < 0:
            break
        if (box := _box_at(text, end)) is not None:
            return box
    phrases = list(re.finditer(r"(?i)answer(?: is|:)|####", text))
    if phrases:
        line = text[phrases[-1].end() :].lstrip(" :*").split("\n", 1)[0].rstrip(" *.")
        if line:
            return line
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+", text)
    return numbers[-1].rstrip(",") if numbers else None


# ------------------------------------------------------------------------------------ normal form

_UNICODE = str.maketrans(
    {"−": "-", "×": r"\times ", "÷": r"\div ", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le "}
    | {"≥": r"\ge ", "∪": r"\cup ", "∈": r"\in ", "√": r"\sqrt ", "°": r"^\circ ", "±": r"\pm "}
    | {"²": "^2", "³": "^3", "\u00a0": " ", "\u202f": " ", "≈": r"\approx "}
)
# Commas that are all of one number; with spaces, or in brackets, they make a list.
_THOUSANDS = re.compile(r"^[^,\d(\[{]*\d{1,3}(?:,\d{3})+(?!\d)[^,]*$")
_DEGREE = r"(?:\{\})?\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))|\\degree(?![A-Za-z])"
_FONTS = r"\\(?:text(?:bf|it|rm|normal)|mbox|math(?:rm|bf|it)|operatorname)\s*\{"
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"(?<!\\)\$|\\(?:displaystyle|textstyle|limits)(?![A-Za-z])", ""),
        (r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])\.?", ""),
        (r"(?<!\\)\\[()\[\]]", ""),
        (r"(?<=\d)(?:\{,\}|\s*,\s*\\!|\\,|\\ )\s*(?=\d{3}(?!\d))", ""),  # thousands
        (r"(?<!\\)\\!", ""),
        (r"(?<!\\)\\[,;:> ]|\\q?quad(?![A-Za-z])|~|\s+", " "),
        (r"\\%", "%"),
        (r"<=|\\leq(?:slant)?(?![A-Za-z])", r"\\le "),
        (r">=|\\geq(?:slant)?(?![A-Za-z])", r"\\ge "),
        (r"\\lbrace(?![A-Za-z])", r"\\{"),
        (r"\\rbrace(?![A-Za-z])", r"\\}"),
        (r"\\(begin|end)\s*\{[bp]?matrix\}", r"\\\1{pmatrix}"),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(frac|sqrt)(?:\s+(?=[A-Za-z])|\s*(?=\d))([A-Za-z0-9])", r"\\\1{\2}"),
        (r"(\\frac\s*\{[^{}]*\})\s*([A-Za-z0-9])", r"\1{\2}"),
        (_DEGREE, r"^\\circ "),
        (r"([\^_])\s*(-?\d+|[A-Za-z])", r"\1{\2}"),
        (_FONTS, r"\\text{"),
        (r"\\text\s*\{\s*([^{}]*?)\s*\}", r"\\text{\1}"),
        (r"(\d) *\\text\{([mghsL])\}", r"\1\\text{unit \2}"),  # metres, not the variable m
        (r"\\text\{((?![^{}]*[A-Za-z]{2})[^{}]*|[^{}]*\d[^{}]*)\}", r" \1"),  # no words in it
        (r"\s*,?\s*(?:\\text\{,? ?(?:and|or)\}|\b(?:and|or)\b)\s*,?\s*", ","),
        (r"(?<!\d)\.(?=\d)", "0."),
        (r"^\s*(?:\\approx(?![A-Za-z])|=)", ""),
        (r"^([+-]?\d{1,3}) (\d{3})(?: (\d{3}))?$", r"\1\2\3"),
        (r"(?<![A-Za-z0-9]) +| +(?![A-Za-z0-9])|(?<=\d) +(?=[A-Za-z])", ""),
    ]
]


def normalize(answer: str) -> str:
    """One spelling for what LaTeX can spell in many ways; meaning is left alone.

    Spaces, `$`, a trailing `.`, sizes (`left`, `big`), `dfrac`, missing braces, thousands
    separators, matrix brackets, common Unicode. Units, percent signs and `x =` stay: whether they
    matter depends on the other side.
    """
    return _spell(_THOUSANDS.sub(lambda number: number[0].replace(",", ""), answer))


def _spell(text: str) -> str:
    """`normalize`, with the commas of 1,234 left in, since they may be those of a list."""
    text = text.translate(_UNICODE)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    while True:
        before = text
        if text.endswith(".") and not text.endswith(".."):
            text = text[:-1].rstrip()
        if text.startswith("{") and _group_end(text, 0) == len(text) - 1:
            text = text[1:-1].strip()
        if text == before:
            break
    return text


# ---------------------------------------------------------------------------- taking answers apart

Decide = Callable[[str, str], bool | None]
_OPEN, _CLOSE = ("(", "[", r"\{", "{"), (")", "]", r"\}", "}")


def _tokens(text: str) -> list[str]:
    return re.findall(r"\\[A-Za-z]+|\\.|.", text, re.DOTALL)


def _split(text: str, separators: tuple[str, ...]) -> list[str]:
    """Parts of `text` between separators that stand outside all brackets."""
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
    tokens = _tokens(text)
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
_NAME = re.compile(r"(?=.*[A-Za-z])(?:\\[A-Za-z]+|[A-Za-z'{} ]|_\{[^{}]*\}|\|[^|]*\||\([^()]*\))+")
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
    r"\d \d|\d_|\^\{[\d^{}]*\^|\^\{-?\d{5,}\}|(?:\d{4,}|[)}\]!])!|\\text|[\x00-\x1f\ud800-\udfff]"
)


def _decide(answer: str, gold: str, decide: Decide) -> bool | None:
    """Ask, unless it is hostile or differs in capitals: Math-Verify lowers all letters."""
    letters = [set(re.sub(r"\\[A-Za-z]+|[^A-Za-z]", "", text)) for text in (answer, gold)]
    lowered = [{letter.lower() for letter in group} for group in letters]
    if _REFUSED.search(answer) or (letters[0] != letters[1] and lowered[0] == lowered[1]):
        return False
    return decide(answer, gold)


def _math_verify(answer: str, gold: str) -> bool:
    """Math-Verify on two expressions, each yes confirmed; what it cannot handle is wrong."""
    import math_verify

    try:
        a, b = _parse(answer), _parse(gold)
        # Confirmed first, as that is far quicker to say no. No time limit of Math-Verify's own: it
        # needs SIGALRM, hence the main thread (Math-Verify#65).
        return bool(a and b and _confirmed(a[0], b[0])) and math_verify.verify(
            b, a, strict=True, timeout_seconds=None
        )
    except Exception:  # parser and sympy raise nearly anything on odd text; odd is not right
        return False


@functools.lru_cache(maxsize=1000)  # a group shares its gold answer
def _parse(text: str) -> list:
    """[sympy object] of a boxed expression, [] if it is none."""
    import math_verify
    from latex2sympy2_extended import NormalizationConfig

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that it has no time limit
    text = re.sub(r"(?<![A-Za-z\\])i(?![A-Za-z])", " i ", text)  # else 2i is real and 2 \cdot i not
    rules = NormalizationConfig(malformed_operators=True, boxed="last")
    target = math_verify.LatexExtractionConfig(False, 0, rules)
    return math_verify.parse(rf"\boxed{{{text}}}", [target], "no_fallback", "first_match", None)


def _confirmed(a, b) -> bool:
    """Whether two sympy expressions agree to 40 digits at two points, decimals taken as exact.

    Two equations agree if their left - right are proportional. Sets and inequalities pass.
    """
    import sympy

    proportional = isinstance(a, sympy.Eq) and isinstance(b, sympy.Eq)
    if proportional:
        a, b = a.lhs - a.rhs, b.lhs - b.rhs
    if not (isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr)):
        return True
    names = sorted(symbol.name for symbol in a.free_symbols | b.free_symbols)
    if proportional and not names:
        return False  # 0.56 = 6% is not an equation but a statement

    def at(expression, point: int):
        exact = {f: sympy.Rational(str(f)) for f in expression.atoms(sympy.Float)}
        exact |= {s: sympy.Rational(7 * names.index(s.name) + 11, point + 5)
                  for s in expression.free_symbols}  # fmt: skip
        return expression.xreplace(exact).doit().evalf(60)

    (a1, a2), (b1, b2) = ([at(e, point) for point in (0, 1)] for e in (a, b))
    if proportional:
        a1, a2, b1, b2 = a1 * b2, 0, a2 * b1, 0
    if not all(sympy.sympify(v).is_number for v in (a1, a2, b1, b2)):
        return True  # an unknown function, say: no number to check
    return all(u == v or abs(u - v) <= 1e-40 * max(abs(u), abs(v)) for u, v in ((a1, b1), (a2, b2)))


def quick_verdict(answer: str | None, gold: str) -> bool | None:
    """What can be settled without sympy, in microseconds; None is for `_math_verify`."""
    if answer is None or not answer.strip():
        return False
    if len(answer) > MAX_CHARS or len(gold) > MAX_CHARS:
        return answer.strip() == gold.strip()
    if _spell(answer) == _spell(gold):
        return True
    with contextlib.suppress(RecursionError):
        return _compare(normalize(answer), normalize(gold), lambda *_: None)
    return False


def is_equiv(answer: str | None, gold: str) -> bool:
    """Whether `answer` is the gold answer (docs/GRADING.md); neither side is boxed.

    Runs here and may take arbitrarily long on hostile answers: batches belong to `Grader`.
    """
    verdict = quick_verdict(answer, gold)
    if verdict is None:
        verdict = _compare(normalize(answer), normalize(gold), _math_verify)
    return bool(verdict)
