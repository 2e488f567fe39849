r"""What must hold of two spelt expressions before anything symbolic reads them.

Math-Verify's parser drops marks, dots and subscripts, adds the factors of `(3)(4)` and lowers
letters. So it gets nothing but commands and signs of a known list, with products written out and
capitals under names of their own.
"""

from __future__ import annotations

import re

from grading import words

_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|[A-Za-z]|\d+(?:\.\d+)?|.", re.DOTALL)
_KNOWN = set("+-*/^_(){}[]|!=<> ") | {
    "\\" + name
    for name in "frac sqrt pi infty cdot times div binom le ge ne lfloor rfloor lceil rceil".split()
    + [*words.FUNCTIONS.values(), *words.GREEK]
}
# Bases, towers of numbers, huge powers and factorials, two numbers or two signs in a row.
_REFUSED = re.compile(
    r"\d \d|(?<!sqrt)\[|[\d)}\]|!']_|\^\{-?[\d.]+\^|\^\{-?\d{5,}\}|\d{4,}!|!!|^[^A-Za-z]*[)}\]]!"
    r"|\^\{[^{}]*\}\^|\d/\d+(?:[A-Za-z(]|\\(?!cdot|times|le|ge|ne))|\.(?!\d)|(?<![\\A-Za-z])[A-Za-z]\d|\^_|__"
)


def readable(text: str) -> str | None:
    """The expression as the parser may have it; None where a part of it would be lost."""
    text = re.sub(r"(\d+)\.(\d*)\\overline\{(\d+)\}", _recurring, text)
    text = re.sub(r"\\vec\{([ijk])\}", r"v_{\1}", text)
    text = text.replace(r"^\circ", " u_{99}").replace(r"{}", "")
    text = re.sub(r"(\\log_\{[^{}]*\})(\d+)", r"\1{\2}", text)
    text = re.sub(r"(?<=\})(?=\d)|(?<=[\d)])(?=\()|(?<=\))(?=\d)", r"\\cdot ", text)
    bare = re.sub(r"[uv]_\{\w+\}", "", text)
    tokens = _TOKEN.findall(bare)
    mixed = re.findall(r"\d\\frac\{(\d+)\}\{(\d+)\}", bare)  # read as a sum
    if any(int(top) >= int(bottom) for top, bottom in mixed):
        return None
    known = all(t in _KNOWN or t[0].isdigit() or t.isascii() and t.isalpha() for t in tokens)
    if not known or _REFUSED.search(bare):
        return None
    return re.sub(r"(?<![\\A-Za-z])[A-Z]+(?![a-z]*\()|(?<=[a-z])[A-Z]+", _capitals, text)


def _recurring(match: re.Match) -> str:
    whole, digits, period = match.groups()
    top = int(whole + digits + period) - int(whole + digits)
    return rf"\frac{{{top}}}{{{(10 ** len(period) - 1) * 10 ** len(digits)}}}"


def _capitals(match: re.Match) -> str:
    """A capital, or a run of them as one name, as the parser lowers letters and sorts factors."""
    return f"w_{{{''.join(str(ord(letter)) for letter in match[0])}}}"
