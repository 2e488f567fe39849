"""Read a configuration from a dataclass of defaults, config files and `--key=value`.

    @dataclass
    class Config:
        # Optimiser
        lr: float = 1e-5  # AdamW step size
        clip: Literal["both", "off"] = "both"  # which side of the ratio is clipped

    cfg, sources = configure(Config, argv)

Later ones of these override earlier ones, wherever they stand on the command line: the dataclass
defaults, the scale file (config/model/*.py), the experiment files as typed, and `--key=value`.

A config file holds `key = value` lines. It is parsed and never run. `base = "other.py"` names a
file in the same folder that is read first. Its values are defaults for this file.
"""

import ast
import dataclasses
import difflib
import inspect
import math
import re
import sys
import typing
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from harness.errors import UserError

PROJECT = Path(__file__).resolve().parents[1]
T = TypeVar("T")


@dataclass
class Sources:
    """Where a configuration came from."""

    experiments: list[str] = field(default_factory=list)  # stems, in the order typed
    scale: str = ""  # stem of the scale file; "" = no file
    reason: str = ""  # why default_scale chose this scale; "" = the user named it
    given: dict[str, Any] = field(default_factory=dict)  # values of experiments and command line
    origin: dict[str, str] = field(default_factory=dict)  # key -> default, a file, command line


def configure(
    cls: type[T],
    argv: list[str],
    default_scale: Callable[[dict[str, Any]], tuple[str | dict[str, Any], str]] | None = None,
) -> tuple[T, Sources]:
    """Make an instance of `cls`, a dataclass with a default for every field, from argv.

    A config file in a folder named `model` is the scale, and there is at most one. Any other file
    is an experiment. If no scale is named, `default_scale` gets the values of the experiments and
    the command line. It returns a scale file or a dict of values, and the reason.
    Fields may have the type int, float, bool, str, Literal, a tuple of these, or one `| None`.
    Raises UserError for a mistake in argv or in a file. `--help` prints every key and exits.
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
        below = {key: _check(key, scale[key], kinds, where, as_type) for key in scale}
    else:
        where, sources.scale = scale, Path(scale).stem
        below = _read_file(scale, kinds) if scale else {}
    defaults = dict.fromkeys(kinds, "default")
    sources.origin = defaults | dict.fromkeys(below, where) | sources.origin
    return cls(**(below | sources.given)), sources


def format_config(cfg: Any, sources: Sources) -> str:
    """The configuration as the text of a config file, with the origin of each changed value."""
    rows = {f.name: repr(getattr(cfg, f.name)) for f in dataclasses.fields(cfg) if f.init}
    wide, value_wide = max(map(len, rows)), min(max(map(len, rows.values())), 40)
    origin = {key: f"  # {name}" for key, name in sources.origin.items() if name != "default"}
    lines = [f"{k:{wide}} = {v:{value_wide}}{origin.get(k, '')}".rstrip() for k, v in rows.items()]
    return "\n".join(lines)


# ---- the command line and the files


def _split(argv: list[str], kinds: dict[str, Any]) -> tuple[str, list[str], dict[str, Any]]:
    """Split argv into the scale file (or ""), the experiment files and the command-line values."""
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
    """The path of a config file, relative to the working folder or else to the project."""
    for path in (Path(name), PROJECT / name):
        if path.is_file():
            return path
    known = {p.stem: str(p.relative_to(PROJECT)) for p in sorted(PROJECT.glob("config/**/*.py"))}
    near = " or ".join(known[stem] for stem in _nearest(Path(name).stem, known))
    hint = f"did you mean {near}?" if near else "name a .py file such as those under config/"
    raise UserError(f"{name}: no such config file: {hint}")


def _read_file(name: str, kinds: dict[str, Any], readers: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The checked values of a config file and of its base.

    readers are the files whose base is this one. They are needed to refuse a circle.
    """
    path = _find(name)
    if path.resolve() in readers:
        raise UserError(f"{name}: the base files form a circle: {readers[-1].name} names it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Python only warns of "\m"; here it is a mistake
            tree = ast.parse(path.read_text(encoding="utf-8-sig"))
    except SyntaxError as error:
        raise UserError(f"{name}:{error.lineno or 1}: not Python: {error.msg}") from None
    except (OSError, ValueError, MemoryError, RecursionError) as error:
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
        keys = kinds | {"base": str}
        values[key] = _check(key, node.value, keys, where, lambda n, k: as_type(_literal(n), k))
        if key == "base" and not (path.parent / values[key]).is_file():
            raise UserError(f"{where}: base {values[key]!r} is not a file beside this one")
    if "base" not in values:
        return values
    base = str(path.parent / values.pop("base"))
    return _read_file(base, kinds, (*readers, path.resolve())) | values


def _literal(node: ast.expr | str) -> Any:
    """The value of a literal. Raises ValueError for anything else."""
    try:
        return ast.literal_eval(node)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ValueError("wants a number, text in quotes, True, False, None or a tuple") from None


def _nearest(name: str, options: Iterable[str]) -> list[str]:
    """Up to three options that look like `name`, the closest first."""
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
    """Call read(value, the key's type). Raises UserError for an unknown key or a wrong value."""
    if key not in kinds:
        near = " or ".join(_nearest(key, kinds))
        hint = f"did you mean {near}?" if near else "--help lists every key"
        raise UserError(f"{where}: unknown key {key!r}: {hint}")
    try:
        return read(value, kinds[key])
    except ValueError as error:
        raise UserError(f"{where}: {key} {error}") from None


def as_type(value: Any, kind: Any) -> Any:
    """Convert `value` to the annotated type. Raises ValueError if it is not of that type."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "text in quotes"}
    wants = f"wants {names.get(kind) or _kind_name(kind)}, got {value!r}"
    if type(None) in args:  # X | None
        return None if value is None else as_type(value, args[args[0] is type(None)])
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
            return tuple(map(as_type, value, item_kinds))
        wants = f"wants {len(item_kinds)} values ({_kind_name(kind)}), got {len(value)}"
    elif kind in (int, float) and type(value) in (int, float):
        if abs(value) > sys.float_info.max or math.isnan(value):
            wants = f"wants a finite number, got {value!r}"
        elif kind is float or value == int(value):  # 1e5 is also a whole number
            return kind(value)
    elif kind is str and isinstance(value, str) and "\0" in value:
        wants = "must not hold a null character"
    elif type(value) is kind:
        return value
    raise ValueError(wants)


def _from_text(text: str, kind: Any) -> Any:
    """Convert a command-line value to the annotated type, first as a literal, then as text."""
    if typing.get_origin(kind) is tuple:
        items = [item for item in text.strip("()[] ").split(",") if item.strip()]
        return as_type(tuple(_guess(item)[0] for item in items), kind)
    value, text = _guess(text)
    try:
        return as_type(value, kind)
    except ValueError as error:
        try:  # for text and Literals, "none" and "1e5" are words
            return as_type(text, kind)
        except ValueError:
            raise error from None


def _guess(text: str) -> tuple[Any, str]:
    """Return the number, bool or None that a text stands for (else the text), and the bare text."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1], text[1:-1]
    if re.fullmatch(r"[-+\d._eE]+", text):
        try:
            return _literal(text), text
        except ValueError:
            pass
    return {"true": True, "false": False, "none": None}.get(text.lower(), text), text


# ---- help


def _help(cls: type, scales: bool) -> str:
    """The text of --help: every key with its default, type and comment.

    Headings and comments come from the source of the dataclass. A comment on its own line is a
    heading. A comment after a field describes the field.
    """
    defaults, kinds = cls(), _kinds(cls)
    left = {key: f"--{key}={_show(getattr(defaults, key))}" for key in kinds}
    width = min(max(map(len, left.values()), default=0), 44)  # some commands have no key
    script = Path(sys.argv[0])
    call = f"-m tools.{script.stem}" if script.parent.name == "tools" else script.name
    files = " [config/EXPERIMENT.py] [config/model/SCALE.py]" if scales else ""
    lines = [f"usage: python {call}{files} [--key=value]"]
    lines += ["       --debug shows the traceback of an error"]
    lines += ["", (cls.__doc__ or "").strip().partition("\n")[0], ""]
    classes = filter(dataclasses.is_dataclass, reversed(cls.__mro__))
    for line in "\n".join(map(inspect.getsource, classes)).splitlines():
        heading, key = re.match(r"\s*# ?(.*)", line), re.match(r"\s*(\w+): ", line)
        if heading:
            lines += [""] if lines[-1].startswith("  ") else []
            lines.append(heading[1].strip("- "))
        elif key and key[1] in kinds:
            comment = line.partition("  # ")[2]
            kind = _kind_name(kinds[key[1]])
            lines.append(f"  {left[key[1]]:{width}}  ({kind}) {comment}".rstrip())
    return "\n".join(lines)


def _show(value: Any) -> str:
    return ",".join(map(_show, value)) if isinstance(value, tuple) else str(value)
