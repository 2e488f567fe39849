"""Tables of what the grader knows by name: commands, signs, words and units.

The grader refuses an answer that contains anything else. `unit` reads the words after a value.
"""

from __future__ import annotations

import re


def _by_spelling(table: str) -> dict[str, str]:
    """Map each spelling to the one that replaces it: the first of its row. `;` ends a row."""
    rows = [row.split() for row in re.split(r"[;\n]", table) if row.strip()]
    return {spelling: first for first, *others in rows for spelling in others}


# ------------------------------------------------------------------------------------- commands

# Functions that may stand without a backslash, as programs write them, and their LaTeX names.
FUNCTIONS = dict.fromkeys(
    "sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan ln log lg exp sqrt".split()
)
FUNCTIONS |= {name: name for name in FUNCTIONS}
FUNCTIONS |= {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "cosec": "csc"}
GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau "
    "upsilon phi chi psi omega"
).split()
CONSTANTS = {name: name for name in GREEK} | dict.fromkeys(("inf", "infinity", "oo"), "infty")

# Commands that only change the layout.
SILENT = set(
    r"$ \( \) \[ \] \! \left \right \middle \big \Big \bigg \Bigg \bigl \bigr \Bigl \Bigr \biggl "
    r"\biggr \Biggl \Biggr \displaystyle \textstyle \limits \nolimits \, \; \: \> \  \quad \qquad "
    r"\rm \bf \it \thinspace \enspace ~".split()
) | {"\\ "}
ALIASES = _by_spelling(
    r"""
    \frac \dfrac \tfrac \cfrac; \binom \dbinom \tbinom; \overline \bar; \cdot \ast *; % \%
    \le \leq \leqslant <=; \ge \geq \geqslant >=; \ne \neq !=; < \lt; > \gt; \approx \simeq
    \{ \lbrace; \} \rbrace; [ \lbrack; ] \rbrack; | \vert \lvert \rvert \mid; : \colon; ' \prime
    \ldots \dots \cdots \dotsc; \varnothing \emptyset; \phi \varphi; \epsilon \varepsilon
    \and \land \wedge; \or \lor \vee; \Rightarrow \implies
    \mathbb{R} \R; \mathbb{Z} \Z; \mathbb{N} \N
    """
)
# Commands that may occur in the name of a value: \angle ABC, \overline{AB}, \cos\theta.
NAMING = {"\\" + name for name in [*GREEK, *FUNCTIONS.values()]} | set(
    r"\angle \triangle \overline \overrightarrow \vec \hat \widehat \measuredangle \text \frac "
    r"\sqrt \cdot \Delta \Gamma \Omega \Theta \Phi \Sigma \Lambda \det \deg \min \max \gcd".split()
)
TEXT_FONTS = set(
    r"\text \mbox \hbox \textbf \textit \textrm \textnormal \textsf \texttt \emph \mathrm \mathsf "
    r"\operatorname".split()
)
MATH_FONTS = {r"\boldsymbol", r"\bm", r"\mathbf", r"\mathit", r"\underline"}
MATRICES = {"matrix", "pmatrix", "bmatrix", "smallmatrix", "array"}

# Unicode signs that its compatibility form (NFKC) does not turn into LaTeX.
SIGNS = _by_spelling(
    r"""
    - − ‐ ‑; * ∗; / ⁄ ∕; : ∶; | ∣; ' ′ ’; '' ″; \times ×; \div ÷; \cdot · ⋅ ∙; sqrt √; \pm ±; \mp ∓
    \le ≤ ⩽; \ge ≥ ⩾; \ne ≠; \approx ≈; \and ∧; \or ∨; \cup ∪; \cap ∩; \in ∈; \varnothing ∅
    \infty ∞; ^\circ ° º; \angle ∠; \ldots …; \to →; \langle ⟨; \rangle ⟩
    \lfloor ⌊; \rfloor ⌋; \lceil ⌈; \rceil ⌉; \mathbb{R} ℝ; \mathbb{Z} ℤ; \mathbb{N} ℕ
    """
)
SIGNS = {sign: name if len(name) < 3 else f" {name} " for sign, name in SIGNS.items()}

# ---------------------------------------------------------------------------------------- words

NUMBERS = {
    word: str(value)
    for value, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen twenty".split()
    )
}
EMPTY = set(
    r"\varnothing;\{\};no solution;no solutions;there is no solution;there are no solutions;"
    "empty set;the empty set;empty".split(";")
)
REALS = set(
    r"\mathbb{R};all real numbers;all reals;all real number;the real numbers;"
    "the set of all real numbers".split(";")
)

# A unit's symbols, whose case matters, and behind the bar its names, in any case and number.
_UNITS = """
m | meter metre; cm | centimeter centimetre; mm | millimeter millimetre; km | kilometer kilometre
nm | nanometer nanometre; in | inch inche; ft | foot feet; yd | yard; mi | mile; g | gram
kg | kilogram kilo; mg | milligram; lb | pound lb; oz | ounce; t | ton tonne; L l | liter litre
mL ml | milliliter millilitre; gal | gallon; qt | quart; pt | pint; cup | cup; tsp | teaspoon
tbsp | tablespoon; acre | acre; ha | hectare; s | second sec; ms | millisecond; h | hour hr
min | minute min; day | day; week | week wk; month | month; yr | year; decade | decade
century | century centurie; deg | degree deg; rad | radian; pct | percent pct; USD | dollar buck
cent | cent; EUR | euro; GBP | ; rupee | rupee; yen | yen; peso | peso; franc | franc; N | newton
kN | kilonewton; J | joule; kJ | kilojoule; W | watt; kW | kilowatt; V | volt; A | ampere amp
ohm | ohm; Pa | pascal; kPa | kilopascal; Hz | hertz; kHz | kilohertz; K | kelvin; C | celsius
F | fahrenheit; mol | mole; cal | calorie; coulomb | coulomb; unit | unit; B | byte; bit | bit
eV | ; knot | knot; erg | erg; mph | ; kph kmh |
"""
_COMPOUND = {"mph": {"mi": 1, "h": -1}, "kph": {"km": 1, "h": -1}}
# Things that are counted. Words that stand for several (pair, dozen, half) and "times" are not.
_NOUNS = """
way choice outcome possibilitie arrangement permutation combination selection path route value
solution root zero zeroe factor divisor multiple digit number integer prime term coefficient element
subset set function triple tuple point line segment side edge vertice vertex face diagonal triangle
square rectangle circle polygon angle region intersection cube student children boy girl men women
people person player team member teacher friend adult worker guest customer voter passenger familie
book page word letter coin pennie nickel dime marble ball card dice chip tile block brick stone bead
button stick pole post board boxe bag basket jar bottle can glasse plate pen pencil eraser crayon
sticker stamp ticket toy doll balloon gift candie chocolate cookie cake pie slice pizza sandwiche
egg apple orange banana pear peache plum grape lemon mango mangoe cherrie berrie strawberrie tomatoe
potatoe onion carrot flower rose tree plant seed leave leaf dog cat bird fish fishe chicken duck cow
horse pig sheep goat rabbit mice frog bee ant animal car truck buse bike bicycle train plane boat
ship wheel tire seat chair table desk door window room house building floor step stair street shirt
shoe sock hat game matche race lap goal vote test quizze question problem classe lesson grade course
trip turn move flip toss tosse roll throw jump win losse tie song video photo picture message call
email piece part item object bacteria cell particle atom molecule clown dap bowl spoon kernel shelve
row column group stack bunche barrel bucket pack package carton crate dwarve knight dragon monkey
lion elephant turtle computer phone machine robot bulb light sheet ribbon rope string necklace
"""
_ADJECTIVES = set(
    "distinct different possible total unique positive negative real right ordered whole such "
    "complex nonzero isosceles equilateral red blue green white black prime".split()
)
RANKED = set("grade day week month year floor row place term person student".split())
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
# Two-letter units that count as units without \text{}. Others may be a product, as in `5ms`.
_BARE = {"cm", "mm", "km", "kg", "mg", "ml", "mL", "ft", "in", "mi", "lb", "oz", "hr"}

_SYMBOLS: dict[str, str] = {}
_WORDS: dict[str, str] = {}
for _entry in re.split(r"[;\n]", _UNITS.strip()):
    _symbols, _, _names = _entry.partition("|")
    for _word in _symbols.split():
        _SYMBOLS.setdefault(_word, _symbols.split()[0])
    for _word in _names.split():
        _WORDS[_word] = _WORDS[_word + "s"] = _symbols.split()[0]
_COUNTED = {_word + "s": _word for _word in _NOUNS.split()}
_COUNTED |= {_word: _word for _word in "children men women people dice fish sheep mice".split()}
_COUNTED |= {"bacteria": "bacteria", "vertices": "vertex", "feet": "ft"}
UNIT_LETTERS = {word for word in _SYMBOLS if len(word) == 1}


def unit(text: str, bare: bool = False, one: bool = False) -> tuple | None:
    r"""The unit written as `cm^{2}`, `square cm`, `m/s` or `ways`, as (name, power) pairs.

    text: the words after a value, normalised, without `\text{}`. bare: whether they stood outside
    `\text{}`, where only common two-letter units count. one: whether the value is 1, after which a
    counted thing may be in the singular (`5 square` does not mean five squares). Returns None if a
    word is unknown.
    """
    powers: dict[str, int] = {}
    sign, power, last = 1, 1, None
    tokens = re.findall(r"\^\{-?\d\}|\\cdot|[A-Za-z]+|\S", text)
    for i, token in enumerate(tokens):
        if token in ("/", "per"):
            if sign < 0 or last is None:
                return None
            sign, last = -1, None
        elif token == r"\cdot" and last:
            last = None
        elif token.startswith("^{") and last:
            powers[last] += sign * (int(token[2:-1]) - 1)
        elif last:
            return None
        elif token.lower() in _POWERS and i + 1 < len(tokens):
            power = _POWERS[token.lower()]
        elif token.lower() in _ADJECTIVES and i + 1 < len(tokens):
            continue
        elif (last := _name(token, bare, one)) is None:
            return None
        else:
            for name, exponent in _COMPOUND.get(last, {last: 1}).items():
                powers[name] = powers.get(name, 0) + sign * exponent * power
            power = 1
    return tuple(sorted(powers.items())) if last and power == 1 else None


def _name(word: str, bare: bool, one: bool) -> str | None:
    if bare and len(word) <= 2 and word not in _BARE:
        return None
    lower = word.lower()
    name = _SYMBOLS.get(word) or _WORDS.get(lower) or _COUNTED.get(lower)
    return name or (lower if one and lower + "s" in _COUNTED else None)
