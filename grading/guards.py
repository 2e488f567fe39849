r"""Check an expression before Math-Verify's parser reads it, and write it so that nothing is lost.

The parser drops marks, dots and subscripts, adds the factors of `(3)(4)` and turns letters into
lower case. So only expressions of known commands and signs pass. Products are written out, and
capitals get names of their own.
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
# Number bases, towers of powers, huge powers and factorials, two numbers or two signs in a row.
_REFUSED = re.compile(
    r"\d \d|(?<!sqrt)\[|[\d)}\]|!']_|\^\{-?[\d.]+\^|\^\{-?\d{5,}\}|\d{4,}!|!!|^[^A-Za-z]*[)}\]]!"
    r"|\^\{[^{}]*\}\^|\d/\d+(?:[A-Za-z(]|\\(?!cdot|times|le|ge|ne))|\.(?!\d)|(?<![\\A-Za-z])[A-Za-z]\d|\^_|__"
)


def readable(text: str) -> str | None:
    """The expression as the parser may read it, or None if it would lose a part."""
    text = re.sub(r"(\d+)\.(\d*)\\overline\{(\d+)\}", _recurring, text)
    text = re.sub(r"\\vec\{([ijk])\}", r"v_{\1}", text)
    text = text.replace(r"^\circ", " u_{99}").replace(r"{}", "")
    text = re.sub(r"(\\log_\{[^{}]*\})(\d+)", r"\1{\2}", text)
    text = re.sub(r"(?<=\})(?=\d)|(?<=[\d)])(?=\()|(?<=\))(?=\d)", r"\\cdot ", text)
    bare = re.sub(r"[uv]_\{\w+\}", "", text)
    tokens = _TOKEN.findall(bare)
    mixed = re.findall(r"\d\\frac\{(\d+)\}\{(\d+)\}", bare)  # the parser reads a sum
    if any(int(top) >= int(bottom) for top, bottom in mixed):
        return None
    known = all(t in _KNOWN or t[0].isdigit() or t.isascii() and t.isalpha() for t in tokens)
    if not known or _REFUSED.search(bare):
        return None
    return re.sub(r"(?<![\\A-Za-z])[A-Z]+(?![a-z]*\()|(?<=[a-z])[A-Z]+", _capitals, text)


def _recurring(match: re.Match) -> str:
    """A recurring decimal as a fraction: 0.1\\overline{6} is 15/90."""
    whole, digits, period = match.groups()
    top = int(whole + digits + period) - int(whole + digits)
    return rf"\frac{{{top}}}{{{(10 ** len(period) - 1) * 10 ** len(digits)}}}"


def _capitals(match: re.Match) -> str:
    """A name for a run of capitals: the parser would lower them and sort them as factors."""
    return f"w_{{{''.join(str(ord(letter)) for letter in match[0])}}}"
