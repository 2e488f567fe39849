"""Whether two expressions are equal: Math-Verify and sympy, made quick and checked.

Math-Verify's own numeric test holds 1/2^99 and 1/2^98 for equal, so a yes is checked to 300 digits.
Both are imported when first needed, as that takes a second.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from collections.abc import Callable
from typing import NamedTuple
from zlib import crc32


def equal(answer: str, gold: str) -> bool:
    """Whether two normalised expressions are equal; what Math-Verify cannot handle is not.

    May take arbitrarily long. Raises ImportError where Math-Verify is not installed.
    """
    import math_verify

    _parser()  # its imports must not fail in silence
    try:
        a, b = _parse(answer), _parse(gold)
        # Most wrong answers differ as numbers, and many right ones are the gold one when expanded:
        # both are quick to see. No time limit of Math-Verify's own: it needs SIGALRM, hence the
        # main thread (Math-Verify#65).
        if not _agree(a, b):
            return False
        return _identical(a, b) or math_verify.verify(
            b.tree, a.tree, strict=True, timeout_seconds=None
        )
    except Exception:  # parser and sympy raise nearly anything on odd text; odd is not right
        return False


class _Parsed(NamedTuple):
    """A sympy object, the same with decimals as fractions, and its values at two points.

    An equation or inequality has those of left - right. Sets, chains and the like have none.
    """

    tree: object
    exact: object
    values: tuple | None


@functools.cache
def _parser() -> Callable[[str], object]:
    """Math-Verify's LaTeX parser, with the settings of `math_verify.parse` but much quicker."""
    import sympy
    from antlr4.atn.PredictionMode import PredictionMode
    from antlr4.error.ErrorStrategy import BailErrorStrategy
    from latex2sympy2_extended import NormalizationConfig, normalize_latex
    from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy
    from math_verify.grader import should_treat_as_complex

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that it has no time limit
    rules = NormalizationConfig(malformed_operators=True, boxed="last")

    class Parser(_Latex2Sympy):
        def create_parser(self, text: str):
            parser = super().create_parser(text)
            if self.quick:  # a tree it finds is that of the full mode; else the full mode decides
                parser._interp.predictionMode = PredictionMode.SLL
                parser._errHandler = BailErrorStrategy()
            return parser

        def parse_number(self, text: str):  # theirs evaluates the text as Python, 1 ms each
            text = text.replace(",", "")
            return sympy.Integer(int(text)) if text.isdigit() else super().parse_number(text)

    def parse(text: str):
        text = normalize_latex(rf"\boxed{{{text}}}", rules)
        parser = Parser(is_real=not should_treat_as_complex(text))
        with contextlib.suppress(Exception):
            parser.quick = True
            return parser.parse(text)
        parser.quick = False
        return parser.parse(text)

    return parse


@functools.lru_cache(maxsize=4096)  # a group shares its gold answer
def _parse(text: str) -> _Parsed:
    """An expression as sympy has it; raises nearly anything if it is none."""
    import sympy

    text = re.sub(r"(?<![A-Za-z\\])i(?![A-Za-z])", " i ", text)  # else 2i is real and 2 \cdot i not
    if "_" not in text:  # else the quick mode takes the x^2 of x^2 + 1 for that of x^2_1
        text = re.sub(r"(?<![A-Za-z\\])([a-cf-hj-zA-CF-HJ-Z])(?=\^)", r"{\1}", text)
    tree = exact = _parser()(text)
    if isinstance(tree, sympy.Rel):
        exact = tree.lhs - tree.rhs
    if not isinstance(exact, sympy.Expr):
        return _Parsed(tree, None, None)
    floats = {number: sympy.Rational(str(number)) for number in exact.atoms(sympy.Float)}
    exact = exact.xreplace(floats).doit()
    values = []
    for point in (5, 6):
        at = {
            s: sympy.Rational(11 + crc32(s.name.encode()) % 97, point) for s in exact.free_symbols
        }
        value = exact.xreplace(at)
        values.append(value if value.is_Rational else value.evalf(320, maxn=400))
    return _Parsed(tree, exact, tuple(values) if all(v.is_number for v in values) else None)


def _agree(a: _Parsed, b: _Parsed) -> bool:
    """Whether two expressions have the same values to 300 digits, as far as they have any.

    Two equations or inequalities agree if those of their left - right are proportional.
    """
    import sympy

    relations = [isinstance(side.tree, sympy.Rel) for side in (a, b)]
    if all(relations) and not a.exact.free_symbols | b.exact.free_symbols:
        return False  # 0.56 = 6% is not an equation but a statement
    if a.values is None or b.values is None or any(relations) and not all(relations):
        return True
    pairs = list(zip(a.values, b.values, strict=True))
    if all(relations):
        pairs = [(a.values[0] * b.values[1], a.values[1] * b.values[0])]
    if any(u != v and u.is_Rational and v.is_Rational for u, v in pairs):
        return False
    return all(u == v or abs(u - v) <= 1e-300 * max(abs(u), abs(v)) for u, v in pairs)


def _identical(a: _Parsed, b: _Parsed) -> bool:
    """Whether expanding proves two expressions equal; a no leaves it open."""
    import sympy

    if not (isinstance(a.tree, sympy.Expr) and isinstance(b.tree, sympy.Expr)):
        return False
    if not all(value.is_finite for value in a.values or (sympy.nan,)):
        return False
    return a.exact == b.exact or sympy.expand(a.exact - b.exact) == 0
