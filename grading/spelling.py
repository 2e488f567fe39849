"""Find the answer in a text (`last_boxed`) and give it one spelling (`normalize`).

Everything here takes time linear in the text, because it runs in the trainer's process.
"""

from __future__ import annotations

import re
import unicodedata

from grading import words
from grading.speller import Odd, Speller

# ---------------------------------------------------------------------------- finding the answer


def _group_end(text: str, start: int) -> int | None:
    """Index of the brace that closes the one at `start`, or None. Escaped braces do not count."""
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
    """Content of the box whose backslash is at `start`, or None if it is unterminated or empty."""
    brace = re.compile(r"\\boxed\s*+\{").match(text, start)
    end = _group_end(text, brace.end() - 1) if brace else None
    return (text[brace.end() : end].strip() or None) if end is not None else None


def last_boxed(text: str) -> str | None:
    r"""Content of the last \boxed{} by brace matching, stripped, or None.

    If the last \boxed is unterminated or empty, there is no answer. No earlier box and no prose is
    taken instead.
    """
    start = text.rfind(r"\boxed")
    return _box_at(text, start) if start >= 0 else None


def lenient_answer(text: str) -> str | None:
    """The answer that a lenient reader would find, or None. For a metric, never for a reward.

    It is the last complete box, else the rest of the line after the last "answer is", "answer:" or
    "####", else the last number.
    """
    end = len(text)
    for _ in range(20):  # enough for ordinary text, and keeps hostile text linear
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
    numbers = re.findall(r"-?\d[\d,]*+(?:\.\d++)?|-?\.\d++", text)
    return numbers[-1].rstrip(",") if numbers else None


# ------------------------------------------------------------------------------------ normal form

# A single number with thousands commas. With spaces or in brackets, commas make a list.
_THOUSANDS = re.compile(r"[^,\d(\[{]*+\d{1,3}(?:,\d{3})++(?!\d)[^,]*+")
_LATEX_THOUSANDS = re.compile(
    r"(?<=\d)(?:\{\s?,\s?\}|\s?,\s?\\!|\\,|\\ |\\!,\\!)\s?(?=\d{3}(?!\d))"
)
_SPACED_THOUSANDS = re.compile(r"\s*+([+-]?\d{1,3})((?: \d{3})++)\s*+")
# 6.72e-5 and 1e-05 as programs write them. 2e-1 is left alone, because it may be 2 times e.
_SCIENTIFIC = re.compile(
    r"(?<![\w.])(?:(\d*+\.\d++|1)[eE]([+-]?\d++)|(\d++)[eE](\d++|[+-]0\d++))(?![\w.])"
)


def normalize(answer: str) -> str:
    """Write an answer in one spelling, without changing its meaning.

    It unifies spaces, `$`, a trailing `.`, sizes (`left`, `big`), fonts, `dfrac`, missing braces,
    thousands separators, matrix brackets, Unicode and program spelling (`2*pi`). Units, percent
    signs and `x =` stay, because whether they matter depends on the other side.
    """
    whole = _THOUSANDS.fullmatch(answer)
    return spell(answer.replace(",", "") if whole else answer)


def spell(text: str) -> str:
    """`normalize`, but keep the commas of 1,234: they may separate the items of a list."""
    if number := _SPACED_THOUSANDS.fullmatch(text):
        text = number[1] + number[2].replace(" ", "")
    text = _LATEX_THOUSANDS.sub("", _ascii(text))
    text = _SCIENTIFIC.sub(
        lambda m: rf"{m[1] or m[3]}\times10^{{{int(m[2] or m[4])}}}" if len(m[0]) < 40 else m[0],
        text,
    )
    try:
        out = Speller(text).all()
    except Odd:
        return " ".join(text.split())
    while True:
        before = out
        if out.endswith((".", ",")) and not out.endswith(("..", r"\,")):
            out = out[:-1].rstrip()
        if out.startswith("{") and _group_end(out, 0) == len(out) - 1:
            out = out[1:-1].strip()
        if out == before:
            return out.removeprefix("=").removeprefix(r"\approx").strip()


def _ascii(text: str) -> str:
    """Write Unicode as LaTeX: scripts, fractions, Greek, words.SIGNS, and NFKC for the rest."""
    if text.isascii():
        return text
    out, script = [], ""
    for char in text:
        form = unicodedata.decomposition(char)
        kind = form[1 : form.index(">")] if form.startswith("<") else ""
        plain = unicodedata.normalize("NFKC", char)
        here = {"super": "^", "sub": "_"}.get(kind, "") if char not in words.SIGNS else ""
        if here != script:
            out.append(("}" if script else "") + (here + "{" if here else ""))
            script = here
        name = unicodedata.name(plain, "") if len(plain) == 1 else ""
        greek = name.removeprefix("GREEK SMALL LETTER ").lower()
        if char in words.SIGNS:
            out.append(words.SIGNS[char])
        elif kind == "fraction" and plain[-1].isdigit():
            top, bottom = plain.split("⁄")
            out.append(rf" \frac{{{top}}}{{{bottom}}}")
        elif greek in words.GREEK:
            out.append(rf"\{greek} ")
        else:
            out.append("".join(words.SIGNS.get(c, c) for c in plain))
    return "".join(out) + ("}" if script else "")
