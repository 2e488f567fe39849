"""Configuration: a dataclass of defaults, config files that are read and never run, `--key=value`.

    @dataclass
    class Config:
        # Optimiser
        lr: float = 1e-5  # AdamW step size
        clip: Literal["both", "off"] = "both"  # which side of the ratio is clipped

    def main(argv: list[str]) -> None:
        cfg, sources = configure(Config, argv)

    if __name__ == "__main__":
        run(main)

Precedence is fixed, whatever the order typed:
dataclass defaults < scale file (config/model/*.py) < experiment files, as typed < --key=value.
"""

import ast
import dataclasses
import difflib
import errno
import inspect
import io
import math
import os
import re
import signal
import sys
import textwrap
import tokenize
import typing
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

PROJECT = Path(__file__).resolve().parent
T = TypeVar("T")


class UserError(ValueError):
    """Something the user can cause and mend. The message is one line: where, what, what to do."""


class Stopped(KeyboardInterrupt):
    """A signal ended the work in good order; the exit status is 128 + its number."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


@dataclass
class Sources:
    """Where a configuration came from."""

    experiments: list[str] = field(default_factory=list)  # stems, in the order typed
    scale: str = ""  # stem of the scale file, "" where there is none
    reason: str = ""  # why default_scale chose this scale, "" where the user named one
    given: dict[str, Any] = field(default_factory=dict)  # experiment files + command line
    origin: dict[str, str] = field(default_factory=dict)  # key -> default, a file, command line


def run(main: Callable[[list[str]], None]) -> None:
    """Call main(sys.argv[1:]); end with one line, no traceback, where the code is not at fault.

    Exit status: 2 for a UserError or a full disk, 130 for Ctrl-C, 143 for TERM and 129 for HUP
    where they are caught, 141 for a closed pipe.
    """
    try:
        main(sys.argv[1:])
        sys.stdout.flush()  # a full disk or a closed pipe may show only now
        return
    except UserError as error:
        line, status = f"error: {error}", 2
    except KeyboardInterrupt as error:
        line, status = "interrupted", 128 + getattr(error, "number", signal.SIGINT)
    except OSError as error:
        if error.errno == errno.EPIPE:
            line, status = "", 141
        elif error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" (writing {error.filename})" if error.filename else ""
            line, status = f"error: the disk is full{where}: free some space and start again", 2
        else:
            raise
        # what is still buffered cannot be written: unmuted, Python complains again on the way out
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if line:
        print(line, file=sys.stderr)
    raise SystemExit(status)


def configure(
    cls: type[T],
    argv: list[str],
    default_scale: Callable[[dict[str, Any]], tuple[str | dict[str, Any], str]] | None = None,
) -> tuple[T, Sources]:
    """Build the dataclass `cls` (every field has a default) from config files and `--key=value`.

    A file in a folder named `model` is the scale (one at most), any other is an experiment. With
    no scale named, `default_scale(values)` gets the explicit values and returns (the path of a
    scale file or a dict of values, the reason as a printable line).
    Annotations may be int, float, bool, str, Literal, tuple of these, or one of these `| None`.
    Raises UserError for anything wrong in argv or in a file; `--help` prints every knob and exits.
    """
    if "--help" in argv or "-h" in argv:
        print(_help(cls, scales=default_scale is not None), flush=True)
        raise SystemExit(0)
    kinds = _kinds(cls)
    scale_path, experiment_paths, command_line = _split(argv, kinds)
    sources = Sources()

    for path in experiment_paths:
        values = _read_file(path, kinds)
        sources.experiments.append(Path(path).stem)
        sources.given |= values
        sources.origin |= dict.fromkeys(values, path)
    sources.given |= command_line
    sources.origin |= dict.fromkeys(command_line, "command line")

    scale: str | dict[str, Any] = scale_path
    if not scale_path and default_scale is not None:
        scale, sources.reason = default_scale(dict(sources.given))
    if isinstance(scale, dict):
        where = "default scale"
        below = {key: _check(key, scale[key], kinds, where, _typed) for key in scale}
    else:
        where, sources.scale = scale, Path(scale).stem
        below = _read_file(scale, kinds) if scale else {}
    defaults = dict.fromkeys(kinds, "default")
    sources.origin = defaults | dict.fromkeys(below, where) | sources.origin
    return cls(**(below | sources.given)), sources


def format_config(cfg: Any, sources: Sources) -> str:
    """The configuration as `key = value` lines, with the origin of what is not a default.

    The text is itself a valid config file.
    """
    rows = {f.name: repr(getattr(cfg, f.name)) for f in dataclasses.fields(cfg) if f.init}
    wide, value_wide = max(map(len, rows)), min(max(map(len, rows.values())), 40)
    origin = {key: f"  # {name}" for key, name in sources.origin.items() if name != "default"}
    lines = [f"{k:{wide}} = {v:{value_wide}}{origin.get(k, '')}".rstrip() for k, v in rows.items()]
    return "\n".join(lines)


# ---- the command line and the files


def _split(argv: list[str], kinds: dict[str, Any]) -> tuple[str, list[str], dict[str, Any]]:
    """argv -> (scale file or "", experiment files, command-line values)."""
    scale, experiments, values = "", [], {}
    for i, arg in enumerate(argv):
        if not arg.startswith("-"):
            if re.match(r"\w+=", arg):
                raise UserError(f"{arg}: an option takes two dashes: write --{arg}")
            if _find(arg).absolute().parent.name != "model":
                experiments.append(arg)
            elif scale:
                raise UserError(f"{arg}: a scale file was already named ({scale}): keep one")
            else:
                scale = arg
            continue
        key, equals, text = arg.lstrip("-").partition("=")
        if key in kinds and not (arg.startswith("--") and equals):
            after = argv[i + 1] if i + 1 < len(argv) else ""
            value = text if equals else "VALUE" if not after or after.startswith("--") else after
            raise UserError(f"{arg}: write an option as one word, --{key}={value}")
        if key in values:
            raise UserError(f"{arg}: {key} is already given on the command line: keep one")
        values[key] = _check(key, text, kinds, arg, _from_text)
    return scale, experiments, values


def _find(name: str) -> Path:
    """A config file, in the working folder or else in the project's."""
    for path in (Path(name), PROJECT / name):
        if path.is_file():
            return path
    known = {p.stem: str(p.relative_to(PROJECT)) for p in sorted(PROJECT.glob("config/**/*.py"))}
    near = " or ".join(known[stem] for stem in _nearest(Path(name).stem, known))
    hint = f"did you mean {near}?" if near else "name a .py file such as those under config/"
    raise UserError(f"{name}: no such config file: {hint}")


def _read_file(name: str, kinds: dict[str, Any]) -> dict[str, Any]:
    """The assignments of a config file, checked; parsed with ast, so nothing in it is run."""
    path = _find(name)
    try:
        tree = _parse(path.read_text(encoding="utf-8-sig"))
    except SyntaxError as error:
        raise UserError(f"{name}:{error.lineno or 1}: not Python: {error.msg}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: cannot be read as a config file: {error}") from None
    values: dict[str, Any] = {}
    for node in tree.body[ast.get_docstring(tree) is not None :]:
        where = f"{name}:{node.lineno}"
        targets = node.targets if isinstance(node, ast.Assign) else []
        if len(targets) != 1 or not isinstance(targets[0], ast.Name):
            raise UserError(f"{where}: only `key = value` lines may stand in a config file")
        key = targets[0].id
        if key in values:
            raise UserError(f"{where}: {key} is set twice in this file: keep one")
        values[key] = _check(key, node.value, kinds, where, lambda n, k: _typed(_literal(n), k))
    return values


def _parse(text: str, mode: Literal["exec", "eval"] = "exec") -> Any:
    """ast.parse, with SyntaxError or ValueError for what is wrong with the text."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "\m" is a warning to Python and a slip in a config file
        return ast.parse(text, mode=mode)


def _literal(node: ast.expr) -> Any:
    """The value of a literal, or of a product of literal numbers such as 64 * 1024."""
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None):
            return node.value
        case ast.Tuple() | ast.List():
            return tuple(_literal(item) for item in node.elts)
        case ast.UnaryOp(op=ast.USub()) if _is_number(value := _literal(node.operand)):
            return -value
        case ast.BinOp(op=ast.Mult()):
            left, right = _literal(node.left), _literal(node.right)
            if _is_number(left) and _is_number(right):
                return left * right
    raise ValueError("wants a plain number, text, True, False, None or a tuple of these")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _nearest(name: str, options: Iterable[str]) -> list[str]:
    """Up to three of the options that look like `name`, the closest first."""
    wanted = name.lower().replace("-", "_")
    lower = {option.lower(): option for option in options}
    near = difflib.get_close_matches(wanted, lower, n=3, cutoff=0.6)
    near += [o for o in lower if len(wanted) > 2 and wanted in o and o not in near]
    return [lower[option] for option in near[:3]]


# ---- values and their types


def _kinds(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def _kind_name(kind: Any) -> str:
    args = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return "|".join(map(str, args))
    if typing.get_origin(kind) is tuple:
        return ",".join("..." if arg is ... else _kind_name(arg) for arg in args)
    if args:  # X | None
        return f"{_kind_name(args[args[0] is type(None)])} or none"
    return kind.__name__


def _check(key: str, value: Any, kinds: dict[str, Any], where: str, read: Callable) -> Any:
    """read(value, the key's type), with UserError for an unknown key or a value that fails."""
    if key not in kinds:
        near = " or ".join(_nearest(key, kinds))
        hint = f"did you mean {near}?" if near else "--help lists every key"
        raise UserError(f"{where}: unknown key {key!r}: {hint}")
    try:
        return read(value, kinds[key])
    except ValueError as error:
        raise UserError(f"{where}: {key} {error}") from None


def _typed(value: Any, kind: Any) -> Any:
    """`value` as the annotated type; ValueError where it is not one of its values."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "text in quotes"}
    wants = f"wants {names.get(kind) or _kind_name(kind)}, got {value!r}"
    if type(None) in args:  # X | None
        return None if value is None else _typed(value, args[args[0] is type(None)])
    if origin is Literal:
        for choice in args:
            if value == choice and type(value) is type(choice):
                return choice
        near = _nearest(str(value), map(str, args))[:1]
        wants = f"must be one of {', '.join(map(str, args))}, got {value!r}"
        wants += f": did you mean {near[0]}?" if near else ""
    elif origin is tuple and isinstance(value, tuple | list):
        item_kinds = args[:1] * len(value) if args[1:] == (...,) else args
        if len(item_kinds) == len(value):
            return tuple(map(_typed, value, item_kinds))
        wants = f"wants {len(item_kinds)} values ({_kind_name(kind)}), got {len(value)}"
    elif kind in (int, float) and _is_number(value):
        if abs(value) > sys.float_info.max or math.isnan(value):
            wants = f"wants a finite number, got {value!r}"
        elif kind is float or value == int(value):
            return kind(value)
    elif type(value) is kind:
        return value
    raise ValueError(wants)


def _from_text(text: str, kind: Any) -> Any:
    """A command-line value as the annotated type: read as a literal if that fits, else as text."""
    if typing.get_origin(kind) is tuple:
        items = [item for item in text.strip("()[] ").split(",") if item.strip()]
        return _typed(tuple(_guess(item)[0] for item in items), kind)
    value, text = _guess(text)
    try:
        return _typed(value, kind)
    except ValueError as error:
        try:  # "none" and "1e5" may also be meant as words
            return _typed(text, kind)
        except ValueError:
            raise error from None


def _guess(text: str) -> tuple[Any, str]:
    """(a number, True, False, None or else the text, the text without its outer quotes)."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1], text[1:-1]
    if re.fullmatch(r"[-*\d._eE,()\s]+", text):
        try:
            return _literal(_parse(text, "eval").body), text
        except (SyntaxError, ValueError):
            pass
    return {"true": True, "false": False, "none": None}.get(text.lower(), text), text


# ---- help


def _help(cls: type, scales: bool) -> str:
    """Every knob with its default, type and comment, in the order and under the headings of the
    source: a comment on a line of its own is a heading, one behind a field describes it."""
    defaults, kinds = cls(), _kinds(cls)
    left = {key: f"--{key}={_show(getattr(defaults, key))}" for key in kinds}
    width = min(max(map(len, left.values())), 44)
    script = Path(sys.argv[0])
    call = f"-m tools.{script.stem}" if script.parent.name == "tools" else script.name
    files = " [config/EXPERIMENT.py] [config/model/SCALE.py]" if scales else ""
    lines = [f"usage: python {call}{files} [--key=value]"]
    lines += ["", (cls.__doc__ or "").strip().partition("\n")[0], ""]
    classes = filter(dataclasses.is_dataclass, reversed(cls.__mro__))
    sources = [textwrap.dedent(inspect.getsource(c)).split("\n    def ")[0] for c in classes]
    for token in tokenize.generate_tokens(io.StringIO("\n".join(sources)).readline):
        starts_line = not token.line[: token.start[1]].strip()
        if starts_line and token.type == tokenize.NAME and token.string in kinds:
            lines.append(f"  {left[token.string]:{width}}  ({_kind_name(kinds[token.string])})")
        elif starts_line and token.type == tokenize.COMMENT:
            lines += [""] if lines[-1].startswith("  ") else []
            lines.append(token.string.strip("#- "))
        elif token.type == tokenize.COMMENT:
            lines[-1] += " " + token.string.strip("# ")
    return "\n".join(lines)


def _show(value: Any) -> str:
    return ",".join(map(_show, value)) if isinstance(value, tuple) else str(value)
