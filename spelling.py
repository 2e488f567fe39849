"""Find the answer in a text (`last_boxed`) and give it one spelling (`normalize`), as strings."""

from __future__ import annotations

import re

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
# The number of 12th, 12^{th} or 12^{\text{th}}, where it stands alone.
_TH = r"(?:(?:st|nd|rd|th)|\\text\{(?:st|nd|rd|th)\})"
_ORDINAL = rf"(?<![\w^{{}}.)+*/-])(\d+) ?\^? ?(?:{_TH}|\{{ ?{_TH} ?\}})(?![A-Za-z])"
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"(?<!\\)\$|\\(?:displaystyle|textstyle|limits)(?![A-Za-z])", ""),
        (r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])\.?", ""),
        (r"(?<!\\)\\[()\[\]]", ""),
        (r"(?<=\d)(?:\{,\}|\s*,\s*\\!|\\,|\\ )\s*(?=\d{3}(?!\d))", ""),  # thousands
        (r"(?<!\\)\\!", ""),
        (r"(?<!\\)\\[,;:> ]|\\q?quad(?![A-Za-z])|~|\s+", " "),
        (r"  +", " "),  # one at most, so that no pattern below runs along spaces
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
        (_FONTS, r"\\text{"),
        (r"\\text\s*\{\s*([^{}]*?)\s*\}", r"\\text{\1}"),
        (r"(\d) *\\text\{([mghsL])\}", r"\1\\text{unit \2}"),  # metres, not the variable m
        (r"\\text\{((?![^{}]*[A-Za-z]{2})[^{}]*|[^{}]*\d[^{}]*)\}", r" \1"),  # no words in it
        (_ORDINAL, r"\1"),
        (r"([\^_])\s*(-?\d+|[A-Za-z])", r"\1{\2}"),
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
    return spell(_THOUSANDS.sub(lambda number: number[0].replace(",", ""), answer))


def spell(text: str) -> str:
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
