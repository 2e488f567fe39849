"""Read a run folder, which harness/checkpoint.py writes, and write files as a whole.

A step is logged before it is saved. The state, not the log, therefore says how far a run is.
"""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError, safe_open

from harness.errors import UserError, printable
from harness.files import write_whole
from harness.strict_json import parse_json, read_json

STATE = "state.safetensors"  # of the newest checkpoint
PREVIOUS = "state.previous.safetensors"  # of the checkpoint before it
UNUSED = "state.unused.safetensors"  # the newest, after a resume from the one before it
RECORD = "nanorlvr.json"  # beside trained weights: their step, base model and quantisation
BASE_KEY = "base_model_name_or_path"  # key of the base model in adapter_config.json
T = TypeVar("T")


class SavedConfig(dict):
    """The configuration of a run. Reading a setting that it lacks raises UserError."""

    def __init__(self, values: dict, path: Path):
        super().__init__(values)
        self.path = path

    def __missing__(self, key: str):
        raise UserError(f"{self.path}: lacks the setting {key}")


def read_config(folder: Path | str) -> SavedConfig:
    """The configuration of a run. Raises UserError if the folder does not hold one."""
    path = Path(folder) / "config.json"
    try:
        config = read_json(path)["config"]
        if not isinstance(config, dict):
            raise ValueError("config is not a JSON object")
        return SavedConfig(config, path)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: no readable config.json of a run in it") from error


def read_inputs(folder: Path | str) -> dict[str, str]:
    """The fingerprints of a run's inputs (harness/inputs.py), or {} if it has none."""
    try:
        inputs = read_json(Path(folder) / "config.json")["inputs"]
    except (OSError, ValueError, KeyError):  # older runs have none
        return {}
    return inputs if isinstance(inputs, dict) else {}


def read_state(folder: Path | str) -> dict[str, str] | None:
    """The numbers in a run's newest readable state, or None if there is no state.

    Raises UserError if there are states but none is readable. harness/states.py also checks their
    contents.
    """
    fault = None
    for path in (Path(folder) / STATE, Path(folder) / PREVIOUS):
        if path.exists():
            try:
                return read_numbers(path)
            except UserError as error:
                fault = fault or error
    if fault:
        raise fault
    return None


def read_numbers(path: Path) -> dict[str, str]:
    """The numbers in a state: steps_done, logged, checksum. Raises UserError if it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            numbers = file.metadata()
        int(numbers["steps_done"])
        return numbers
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a state of this run ({error})") from error


def read_record(folder: Path | str) -> dict:
    """The record beside trained weights, or {} if there is no readable one."""
    try:
        return read_json(Path(folder) / RECORD)
    except (OSError, ValueError):
        return {}


def read_history(folder: Path, state: dict[str, str]) -> list[dict]:
    """The rows of metrics.jsonl up to the state's step. Raises UserError if a row is missing."""
    path, done = folder / "metrics.jsonl", int(state["steps_done"])
    rows = read_jsonl(path)
    steps = [row.get("step") for row in rows]
    steps = list(itertools.takewhile(lambda step: isinstance(step, int) and step <= done, steps))
    logged = int(state.get("logged", max(len(steps), done)))  # older runs lack it
    wanted = list(range(done + 1 - logged, done + 1))
    if steps != wanted or wanted[:1] not in ([], [0], [1]):
        missing = sorted(set(wanted) - set(steps))
        what = f"step {missing[0]} is missing" if missing else "the steps are not in order"
        raise UserError(
            f"{path}: damaged: {what}, but the checkpoint is from step {done}: "
            "restore the file, or start a new run in another --out_dir"
        )
    return rows[: len(steps)]


def is_complete(folder: Path | str) -> bool:
    """Whether a run has made and saved all its steps, and made its last eval if it has evals."""
    config, state = read_config(folder), read_state(folder)
    if state is None or int(state["steps_done"]) != config["steps"]:
        return False
    rows = read_jsonl(Path(folder) / "metrics.jsonl")
    if not rows or rows[-1].get("step") != config["steps"]:
        return False
    return not config.get("eval_every") or "eval_accuracy" in rows[-1]


def trained_weights(folder: Path | str) -> dict[str, str]:
    """The weights of a run: {"adapter": folder}, or {"model": folder} after full training.

    Raises UserError if there are none.
    """
    for kind in ("adapter", "model"):
        if (Path(folder) / kind).is_dir():
            return {kind: str(Path(folder) / kind)}
    raise UserError(f"{folder}: holds no checkpoint yet: wait, or name a model by --model")


def stale(weights: Path | str) -> str:
    """Return a warning if adapter/ or model/ is not from the checkpoint's step, else ""."""
    run = Path(weights).parent
    state = read_state(run)
    if state is None:  # not in a run's folder
        return ""
    step = read_record(weights).get("steps_done")
    if step == int(state["steps_done"]):
        return ""
    found = "incomplete" if step is None else f"from step {step}"
    return (
        f"{weights} is {found}, but the run's checkpoint is from step {state['steps_done']}: "
        f"repair it with python train.py --out_dir={run} --resume=True"
    )


def over_its_base(cfg: T, given: dict) -> T:
    """Return a copy of cfg with the base model and quantisation that cfg.adapter was trained with.

    cfg is a dataclass with adapter, model and quant. `given` holds the settings that the user gave,
    which are kept. Prints which settings were taken from the adapter's folder, and warns if the
    user gave others. Raises UserError if the folder holds no adapter.
    """
    folder = Path(cfg.adapter)
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"adapter={folder}: no adapter_config.json in it: name an adapter's folder")
    record = read_record(folder)
    try:
        base = read_json(folder / "adapter_config.json").get(BASE_KEY)
    except (OSError, ValueError):
        base = None  # load_adapter will report what is wrong
    found = {"model": record.get("base_model") or base, "quant": record.get("quant")}
    for key, value in found.items():
        if value is not None and not isinstance(value, str):
            raise UserError(f"{folder}: its {key} is not text: {str(value)[:80]}")
    found = {key: value and printable(value) for key, value in found.items()}
    if found["quant"] not in (None, "none", "nf4"):
        raise UserError(f"{folder}/{RECORD}: quant is neither none nor nf4: {found['quant']}")
    for key, value in found.items():
        if value and key in given and given[key] != value:
            print(f"warning: {folder} was trained with {key}={value}, not {given[key]}")
    taken = {
        key: value
        for key, value in found.items()
        if value and key not in given and value != getattr(cfg, key)
    }
    if taken:
        print(f"from {folder}: " + ", ".join(f"{key}={value}" for key, value in taken.items()))
    if not found["quant"] and "quant" not in given:
        print(f"{folder} does not name the quantisation it was trained with: quant={cfg.quant}")
    return replace(cfg, **taken)


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a log, up to the first line that a crash cut off or damaged."""
    rows = []
    for line in path.read_text(errors="replace").split("\n")[:-1] if path.exists() else []:
        try:
            row = parse_json(line)
        except ValueError:
            break
        if not isinstance(row, dict) or type(row.get("step", 0)) is not int:
            break
        rows.append(row)
    return rows


def save_rows(rows: list[dict], path: Path) -> None:
    """Write rows as .jsonl. A crash leaves the old or the new file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_json(path: Path, value: dict) -> None:
    """Write JSON. A crash leaves the old or the new file."""
    write_whole(path, json.dumps(value, indent=1) + "\n")
