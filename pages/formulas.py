"""Formulas in a text as MathML, which a browser draws without a network and without a script."""

import html
import re
from collections.abc import Iterable
from xml.etree import ElementTree

from latex2mathml import converter

# The pieces of a text that are not plain: fenced code, and formulas between the usual delimiters.
# page.js splits a text by the same expression, so it is written in what Python and JavaScript
# share. Code comes first: a dollar sign in it begins no formula.
PIECES = (
    r"```[\s\S]*?(?:```|$)|\$\$[\s\S]+?\$\$|\\\[[\s\S]+?\\\]|\\\([\s\S]+?\\\)"
    r"|\$(?!\s)[^$`\n]*[^$`\s]\$(?!\d)"
)
LONGEST = 2000  # characters; what is longer is text that holds two stray delimiters

TAGS = frozenset(
    "math mrow mi mn mo mtext mspace ms msup msub msubsup mfrac msqrt mroot mover munder "
    "munderover mtable mtr mtd mlabeledtr mstyle mpadded mphantom menclose merror "
    "mmultiscripts mprescripts none".split()
)
# Layout alone. href and style are left out: a formula must not link or load anything.
ATTRIBUTES = frozenset(
    "display displaystyle scriptlevel mathvariant mathcolor mathsize stretchy fence separator form "
    "symmetric maxsize minsize largeop movablelimits accent accentunder linethickness notation "
    "width height depth lspace rspace voffset columnalign rowalign columnspacing rowspacing "
    "columnlines rowlines frame bevelled".split()
)


def formulas(texts: Iterable[str]) -> dict[str, str]:
    """The MathML of each distinct formula in the texts, by its source with its delimiters.

    A formula that cannot be converted is left out, so that the page shows its source.
    """
    pieces = re.compile(PIECES)
    found = dict.fromkeys(piece for text in texts for piece in pieces.findall(text))
    converted = ((source, to_mathml(source)) for source in found)
    return {source: mathml for source, mathml in converted if mathml}


def to_mathml(source: str) -> str | None:
    """The MathML of one formula with its delimiters, or None for code or what cannot be read."""
    if source.startswith("```") or len(source) > LONGEST:
        return None
    size = 1 if source.startswith("$") and not source.startswith("$$") else 2
    display = "block" if source.startswith((r"\[", "$$")) else "inline"
    try:
        tree = converter.convert_to_element(source[size:-size], display=display)
        return ElementTree.tostring(_allowed(tree), encoding="unicode")
    except Exception:  # the source is a model's text: any fault in it means that it stays text
        return None


def _allowed(element: ElementTree.Element) -> ElementTree.Element:
    """A copy with the allowed elements and attributes. ValueError for any other element.

    The converter writes some characters as entities within text and leaves others bare, so the
    entities are resolved here and the serialiser escapes all of it again.
    """
    if element.tag not in TAGS:
        raise ValueError(f"<{element.tag}> is no element of MathML")
    kept = {
        name: value
        for name, value in element.attrib.items()
        if name in ATTRIBUTES and "(" not in value
    }
    copy = ElementTree.Element(element.tag, kept)
    copy.text = html.unescape(element.text) if element.text else None
    copy.tail = html.unescape(element.tail) if element.tail else None
    copy.extend(_allowed(child) for child in element)
    return copy
