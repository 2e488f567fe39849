"""Decide whether two expressions are equal, with Math-Verify and sympy.

Math-Verify's numeric test takes 1/2^99 and 1/2^98 as equal, so values are compared to 300 digits
first. Both libraries are imported when first needed, because that takes a second.
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
    """Whether two normalised expressions are equal. False if Math-Verify cannot read one of them.

    May take arbitrarily long. Raises ImportError if Math-Verify is not installed.
    """
    import math_verify
    import sympy

    _parser()  # outside of try, so that a failing import is raised
    try:
        a, b = _parse(answer), _parse(gold)
        # Quick checks come first: most wrong answers have other values, and many right ones equal
        # the gold answer when expanded. Math-Verify's time limit is off, because it uses SIGALRM
        # and so works only on the main thread (Math-Verify#65).
        if not _agree(a, b):
            return False
        expressions = all(isinstance(side.tree, sympy.Expr) for side in (a, b))
        if expressions and (_identical(a, b) or _same_values(a, b)):
            return True
        return math_verify.verify(b.tree, a.tree, strict=True, timeout_seconds=None)
    except Exception:  # parser and sympy raise nearly anything on odd text, which is not right
        return False


# Five points (low, high, scale). There, a variable has the value (low + h) / scale, where its name
# determines h < high. Two points are above 1, two between 0 and 1, and one below 0.
POINTS = [(11, 97, 5), (11, 97, 6), (1, 97, 101), (2, 97, 103), (-107, 97, 7)]


class _Parsed(NamedTuple):
    """A sympy object, the same with decimals as fractions, and its values at POINTS.

    For an equation or inequality the last two are those of left - right. Sets and chains have none.
    """

    tree: object
    exact: object
    values: tuple | None


@functools.cache
def _parser() -> Callable[[str], object]:
    """Math-Verify's LaTeX parser with the settings of `math_verify.parse`, but much faster."""
    import sympy
    from antlr4.atn.PredictionMode import PredictionMode
    from antlr4.error.ErrorStrategy import BailErrorStrategy
    from latex2sympy2_extended import NormalizationConfig, normalize_latex
    from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy
    from math_verify.grader import should_treat_as_complex

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # no warning about no time limit
    rules = NormalizationConfig(malformed_operators=True, boxed="last")

    class Parser(_Latex2Sympy):
        def create_parser(self, text: str):
            parser = super().create_parser(text)
            if self.quick:  # a tree found in this mode is the one that the full mode finds
                parser._interp.predictionMode = PredictionMode.SLL
                parser._errHandler = BailErrorStrategy()
            return parser

        def parse_number(self, text: str):  # theirs evaluates the text as Python: 1 ms each
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


@functools.lru_cache(maxsize=4096)  # the responses to a problem share their gold answer
def _parse(text: str) -> _Parsed:
    """Parse an expression. Raises nearly anything if it is not one."""
    import sympy

    text = re.sub(r"(?<![A-Za-z\\])i(?![A-Za-z])", " i ", text)  # else 2i is read as real
    if "_" not in text:  # the quick mode may read the x^2 of x^2 + 1 as the start of x^2_1
        text = re.sub(r"(?<![A-Za-z\\])([a-cf-hj-zA-CF-HJ-Z])(?=\^)", r"{\1}", text)
    tree = exact = _parser()(text)
    if isinstance(tree, sympy.Rel):
        exact = tree.lhs - tree.rhs
    if not isinstance(exact, sympy.Expr):
        return _Parsed(tree, None, None)
    floats = {number: sympy.Rational(str(number)) for number in exact.atoms(sympy.Float)}
    exact = exact.xreplace(floats).doit()
    values = []
    for low, high, scale in POINTS if exact.free_symbols else POINTS[:1]:
        at = {
            s: sympy.Rational(low + crc32(s.name.encode()) % high, scale)
            for s in exact.free_symbols
        }
        value = exact.xreplace(at)
        values.append(value if value.is_Rational else value.evalf(320, maxn=400))
    return _Parsed(tree, exact, tuple(values) if all(v.is_number for v in values) else None)


def _agree(a: _Parsed, b: _Parsed) -> bool:
    """Whether two expressions have the same values to 300 digits. True if one has no values.

    Two equations or inequalities agree if their left - right are proportional.
    """
    import sympy

    relations = [isinstance(side.tree, sympy.Rel) for side in (a, b)]
    if all(relations) and not a.exact.free_symbols | b.exact.free_symbols:
        return False  # 0.56 = 6% has no variable: it is a statement, not an equation
    if a.values is None or b.values is None or any(relations) and not all(relations):
        return True
    if all(relations):
        (a0, a1, *_), (b0, b1, *_) = a.values, b.values
        return _close(a0 * b1, a1 * b0)
    pairs = list(zip(a.values, b.values, strict=False))
    if a.exact.free_symbols and not (a.exact.has(sympy.I) or b.exact.has(sympy.I)):
        pairs = [(u, v) for u, v in pairs if u.is_real and v.is_real]  # where both are defined
    return all(_close(u, v) for u, v in pairs)


def _close(u, v) -> bool:
    """Whether two values are equal: exactly if both are fractions, else to 300 digits."""
    if u == v:
        return True
    if u.is_Rational and v.is_Rational or not (u.is_finite and v.is_finite):
        return False
    return bool(abs(u - v) <= 1e-300 * max(abs(u), abs(v)))


def _same_values(a: _Parsed, b: _Parsed) -> bool:
    """Whether equal values at the points prove that two expressions are equal.

    Both must be real at the same points, two or more, and have only small numbers in them, so that
    300 digits show every difference. Call it after `_agree`.
    """
    import sympy

    if not (a.values and b.values and len(a.values) == len(b.values)):
        return False
    for side in (a.exact, b.exact):
        if any(max(abs(n.p), n.q) > 10**12 for n in side.atoms(sympy.Rational)):
            return False
        if any(p.exp.is_number and abs(p.exp) > 20 for p in side.atoms(sympy.Pow)):
            return False
        if side.has(sympy.I) or not all(v.is_finite for v in side.atoms(sympy.Number)):
            return False
    real = [(u.is_real, v.is_real) for u, v in zip(a.values, b.values, strict=True)]
    enough = min(2, len(a.values))
    return all(u == v for u, v in real) and sum(u is True for u, _ in real) >= enough


def _identical(a: _Parsed, b: _Parsed) -> bool:
    """Whether expanding proves two expressions equal. False means unknown."""
    import sympy

    if not all(value.is_finite for value in a.values or (sympy.nan,)):
        return False
    return a.exact == b.exact or sympy.expand(a.exact - b.exact) == 0
