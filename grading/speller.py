"""Write LaTeX in one spelling, in a single pass over its tokens without backtracking."""

from __future__ import annotations

import re

from grading import words

MAX_DEPTH = 40  # of nested groups; more deeply nested text is left as it is
_SCAN = re.compile(r"\\[A-Za-z]++|\\.|[A-Za-z]++|\d++|\s++|\*\*|<=|>=|!=|.", re.DOTALL)
_LENGTH = re.compile(r"\[\s?-?[\d.]++\s?(?:pt|em|ex|mm|cm)\s?\]")
_ORDINALS = {"st", "nd", "rd", "th"}


class Odd(Exception):
    """The text cannot be read: its braces do not match, or are nested too deeply."""


class Speller:
    """Reads the tokens of a text from left to right and writes them in one spelling."""

    def __init__(self, text: str) -> None:
        self.tokens = _SCAN.findall(text)[::-1]  # reversed: pop() takes the next token
        self.depth = 0

    def all(self) -> str:
        out = self.sequence("")
        if self.tokens:
            raise Odd
        return out

    def sequence(self, close: str, prose: bool = False, value: bool = False) -> str:
        """Spell the tokens up to `close`, which is consumed.

        prose: whether they stand inside `\\text{}`; value: whether that follows a value.
        """
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Odd
        line = _Line(value)
        while self.tokens:
            token = self.tokens.pop()
            token = words.ALIASES.get(token, token)
            if token == close:
                break
            if token == "}":
                raise Odd
            if token.isspace() or token in words.SILENT:
                line.space |= token.isspace() or token[1:2] in (",", ";", ":", ">", " ", "q")
                if token in (r"\left", r"\right") and self.tokens and self.tokens[-1] == ".":
                    self.tokens.pop()
            elif prose and token.isalpha():
                line.text(self.words(token))
            else:
                self.one(token, line)
        else:
            if close:
                raise Odd
        self.depth -= 1
        return "".join(line.pieces)

    def words(self, first: str) -> list[str]:
        """The words of a phrase that begins with `first`. p.m. is one word, sq. cm are two."""
        found = [first]
        while self.tokens:
            token = self.tokens[-1]
            after = self.tokens[-2] if len(self.tokens) > 1 else ""
            if token.isalpha():
                found.append(token)
            elif token in (".", "'") and after.isalpha() and len(found[-1]) == 1:
                found[-1] += after
                self.tokens.pop()
            elif not (token.isspace() or token in (".", "-", "'") and found[-1].isalpha()):
                break
            elif token in ("-", "'") and not after.isalpha():
                break
            self.tokens.pop()
        return found

    def one(self, token: str, line: _Line) -> None:
        """Write one token together with its arguments."""
        if token in words.TEXT_FONTS:
            self.text(line)
        elif token in words.MATH_FONTS or token in (r"\vec", r"\hat"):
            line.add(self.font(token))
        elif token in (r"\color", r"\textcolor"):
            self.argument()
        elif token == r"\mathbb":
            line.add(rf"\mathbb{{{self.argument()}}}")
        elif token in (r"\frac", r"\binom"):
            line.add(rf"{token}{{{self.argument()}}}{{{self.argument()}}}")
        elif token in (r"\sqrt", "sqrt"):
            index = ""
            if self.peek() == "[":
                self.tokens.pop()
                index = f"[{self.sequence(']')}]"
            inside = self.argument(token == "sqrt" or self.peek() == "(")
            line.add(rf"\sqrt{index}{{{inside}}}")
        elif token == "abs" and self.peek() == "(":
            line.add(f"|{self.argument(True)}|")
        elif token in (r"\exp", "exp"):
            line.add(f"e^{{{self.argument(True)}}}")
        elif token in (r"\begin", r"\end"):
            line.add(self.environment(token))
        elif token == "\\\\":
            self.skip_length()
            line.add(token)
        elif token in ("^", "_", "**"):
            self.script("_" if token == "_" else "^", line)
        elif token == r"\degree":
            line.add(r"^\circ ")
        elif token == r"\overline":
            line.add(rf"\overline{{{self.argument()}}}")
        elif token == "{":
            inside = self.sequence("}")
            line.space |= inside.isdigit()  # {5}{6} is not 56
            line.add(inside if len(inside) < 2 else f"{{{inside}}}")
        elif token == "." and self.tokens and self.tokens[-1].isdigit():
            digits = line.pieces and line.pieces[-1].isdigit() and not line.space
            line.add("." if digits else "0.")
        else:
            line.add(self.plain(token, line))

    def plain(self, token: str, line: _Line) -> str:
        """The spelling of a letter, digit, command or sign that has no arguments."""
        if token in ("and", "or"):
            return "\\" + token
        if token in words.CONSTANTS:
            return "\\" + words.CONSTANTS[token]
        if token in words.FUNCTIONS and not (token == "sec" and line.number()):
            return "\\" + words.FUNCTIONS[token]
        if token in _ORDINALS and line.number():
            return rf"\text{{{token}}}"
        return token

    def text(self, line: _Line) -> None:
        r"""Write \text{...}: words stay words; digits, signs and single letters become formulas."""
        if self.peek() != "{":
            raise Odd
        self.tokens.pop()
        if len(self.tokens) > 1 and self.tokens[-2] == "}" and self.tokens[-1].isalpha():
            name, _ = self.tokens.pop(), self.tokens.pop()
            number = line.number() and name in ("sec", "min")
            line.text([name]) if number or name not in words.FUNCTIONS else line.add("\\" + name)
        else:
            line.space = True
            line.add(self.sequence("}", prose=True, value=line.number()))
        line.space = True

    def font(self, token: str) -> str:
        r"""Drop fonts, which mean nothing, except on i, j and k: these are unit vectors."""
        inside = self.argument()
        letter = inside.strip("{}").removeprefix(r"\vec{").removeprefix("\\")[:1]
        bare = inside in ("i", "j", "k", r"\imath", r"\jmath")
        if token != r"\underline" and (bare or inside.startswith(r"\vec{")):
            return rf"\vec{{{letter}}}"
        return inside if token in words.MATH_FONTS else rf"{token}{{{inside}}}"

    def environment(self, token: str) -> str:
        name = self.argument().removeprefix(r"\text{").rstrip("}")
        if name == "array" and token == r"\begin":
            self.argument()  # the columns
        return rf"{token}{{{'pmatrix' if name in words.MATRICES else name}}}"

    def script(self, sign: str, line: _Line) -> None:
        inside = self.argument(True)
        if inside in (r"\circ", "{\\circ}"):
            line.add(r"^\circ")
        elif set(inside) == {"'"}:
            line.add(inside)
        elif inside.removeprefix(r"\text{").removesuffix("}") in _ORDINALS and line.number():
            line.text([inside.removeprefix(r"\text{").removesuffix("}")])
        else:
            if line.pieces[-1:] == ["{}"]:
                line.pieces.pop()
            line.add(f"{sign}{{{inside}}}")

    def peek(self) -> str:
        """The next token that is not a space, or ""."""
        while self.tokens and (self.tokens[-1].isspace() or self.tokens[-1] in words.SILENT):
            self.tokens.pop()
        return self.tokens[-1] if self.tokens else ""

    def skip_length(self) -> None:
        """Drop a length such as [4pt] after a line end."""
        if _LENGTH.match("".join(self.tokens[-1:-8:-1])):
            while self.tokens.pop() != "]":
                pass

    def argument(self, whole: bool = False) -> str:
        """Spell the next group or token.

        whole: take all digits, a minus sign or (...), as x^10 and x^-1 need.
        """
        token = self.peek()
        if not token or token in ("}", "&", "\\\\", "$"):
            raise Odd
        self.tokens.pop()
        if token == "{":
            return self.sequence("}")
        if token == "(" and whole:
            return self.sequence_to_parenthesis()
        if token == "-" and whole:
            return "-" + self.argument(True)
        if (
            token.isalnum()
            and len(token) > 1
            and not (whole and (token.isdigit() or token in _ORDINALS))
        ):
            self.tokens.append(token[1:])
            token = token[0]
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Odd
        line = _Line()
        self.one(words.ALIASES.get(token, token), line)
        self.depth -= 1
        return "".join(line.pieces).strip()

    def sequence_to_parenthesis(self) -> str:
        """Spell the tokens up to the closing parenthesis, which is consumed."""
        inside, depth = [], 1
        while self.tokens:
            token = self.tokens.pop()
            depth += (token == "(") - (token == ")")
            if depth == 0:
                rest, self.tokens = self.tokens, inside[::-1]
                out = self.sequence("")
                self.tokens = rest
                return out
            inside.append(token)
        raise Odd


class _Line:
    """The pieces written so far. Keeps a space between pieces that would otherwise merge."""

    def __init__(self, value: bool = False) -> None:
        self.value = value  # whether this is the inside of a \\text that follows a value
        self.pieces: list[str] = []
        self.space = False  # whether the text has a space at this point

    def number(self) -> bool:
        """Whether the last piece ends a value, so that a following word may be its unit."""
        return bool(self.pieces) and self.pieces[-1][-1:] in "0123456789})"

    def add(self, piece: str) -> None:
        last = self.pieces[-1] if self.pieces else ""
        if piece and last:
            letters = piece[0].isalpha()
            after_command = re.search(r"\\[A-Za-z]{1,20}$", last[-22:]) and letters
            digits = self.space and piece[0].isdigit() and last[-1].isdigit()
            run = self.space and letters and last[-1].isalpha() and max(len(piece), len(last)) > 1
            if after_command or digits or run and not last.startswith("\\"):
                self.pieces.append(" ")
        self.pieces += [piece] if piece else []
        self.space = False

    def text(self, found: list[str]) -> None:
        r"""Write words. `and` and `or` separate phrases; a letter is \text only if it is a unit."""
        phrase: list[str] = []
        for word in [*found, ""]:
            if word and word not in ("and", "or"):
                phrase.append(word)
                continue
            if phrase:
                letter = len(phrase) == 1 and len(phrase[0]) == 1
                behind = self.number() or self.value and self.pieces[-1:] in ([], ["/"])
                unit = letter and behind and phrase[0] in words.UNIT_LETTERS
                self.add(phrase[0] if letter and not unit else rf"\text{{{' '.join(phrase)}}}")
                phrase = []
            if word:
                self.add("\\" + word)
