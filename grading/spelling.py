"""Find the answer in a text (`last_boxed`) and give it one spelling (`normalize`), as strings.

All of it takes time linear in the text, as it runs in the trainer's own process.
"""

from __future__ import annotations

import re
import unicodedata

from grading import words
from grading.speller import Odd, Speller

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
    brace = re.compile(r"\\boxed\s*+\{").match(text, start)
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
    numbers = re.findall(r"-?\d[\d,]*+(?:\.\d++)?|-?\.\d++", text)
    return numbers[-1].rstrip(",") if numbers else None


# ------------------------------------------------------------------------------------ normal form

# Commas that are all of one number; with spaces, or in brackets, they make a list.
_THOUSANDS = re.compile(r"[^,\d(\[{]*+\d{1,3}(?:,\d{3})++(?!\d)[^,]*+")
_LATEX_THOUSANDS = re.compile(
    r"(?<=\d)(?:\{\s?,\s?\}|\s?,\s?\\!|\\,|\\ |\\!,\\!)\s?(?=\d{3}(?!\d))"
)
_SPACED_THOUSANDS = re.compile(r"\s*+([+-]?\d{1,3})((?: \d{3})++)\s*+")
# 6.72e-5 and 1e-05 as programs write them; 2e-1 is left, as it may be 2 times e.
_SCIENTIFIC = re.compile(
    r"(?<![\w.])(?:(\d*+\.\d++|1)[eE]([+-]?\d++)|(\d++)[eE](\d++|[+-]0\d++))(?![\w.])"
)


def normalize(answer: str) -> str:
    """One spelling for what LaTeX can spell in many ways; meaning is left alone.

    Spaces, `$`, a trailing `.`, sizes (`left`, `big`), fonts, `dfrac`, missing braces, thousands
    separators, matrix brackets, Unicode, program spelling (`2*pi`). Units, percent signs and `x =`
    stay: whether they matter depends on the other side.
    """
    whole = _THOUSANDS.fullmatch(answer)
    return spell(answer.replace(",", "") if whole else answer)


def spell(text: str) -> str:
    """`normalize`, with the commas of 1,234 left in, since they may be those of a list."""
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
    """Unicode as LaTeX: raised and lowered signs, fractions, Greek, and NFKC for the rest."""
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
            out.append(
                f" {words.SIGNS[char]} " if len(words.SIGNS[char]) > 2 else words.SIGNS[char]
            )
        elif kind == "fraction" and plain[-1].isdigit():
            top, bottom = plain.split("⁄")
            out.append(rf" \frac{{{top}}}{{{bottom}}}")
        elif greek in words.GREEK:
            out.append(rf"\{greek} ")
        else:
            out.append("".join(words.SIGNS.get(c, c) for c in plain))
    return "".join(out) + ("}" if script else "")
