"""What others read of a run folder, which checkpoint.py writes, and ways to write a file whole.

The state says how far a run is, since a step is logged before it is saved.
"""

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError, safe_open

from harness.errors import UserError

STATE = "state.safetensors"
RECORD = "nanorlvr.json"  # beside trained weights: their step, base model and quantisation
BASE_KEY = "base_model_name_or_path"  # of the base model in adapter_config.json
T = TypeVar("T")


def read_config(folder: Path | str) -> dict:
    """The configuration of a run. Raises UserError if the folder holds none."""
    path = Path(folder) / "config.json"
    try:
        return json.loads(path.read_text())["config"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: no readable config.json of a run in it") from error


def read_state(folder: Path | str) -> dict[str, str] | None:
    """What a run's state says of itself (steps_done, logged); None where there is no state."""
    path = Path(folder) / STATE
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            numbers = file.metadata()
        int(numbers["steps_done"])
        return numbers
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a state of this run ({error})") from error


def read_record(folder: Path | str) -> dict:
    """The record beside trained weights; {} where there is none that can be read."""
    try:
        record = json.loads((Path(folder) / RECORD).read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def read_history(folder: Path, state: dict[str, str]) -> list[dict]:
    """The rows of metrics.jsonl up to the state's step. Raises UserError where one is missing."""
    path, done = folder / "metrics.jsonl", int(state["steps_done"])
    rows = read_jsonl(path)
    steps = [row.get("step") for row in rows]
    steps = list(itertools.takewhile(lambda step: isinstance(step, int) and step <= done, steps))
    logged = int(state.get("logged", max(len(steps), done)))  # from before it was recorded
    wanted = list(range(done + 1 - logged, done + 1))
    if steps != wanted or wanted[:1] not in ([], [0], [1]):
        missing = sorted(set(wanted) - set(steps))
        what = f"no row of step {missing[0]}" if missing else "rows that are not step after step"
        raise UserError(
            f"{path}: damaged: {what}, but the checkpoint is of step {done}: "
            "put the file back as it was, or start a new run in another --out_dir"
        )
    return rows[: len(steps)]


def is_complete(folder: Path | str) -> bool:
    """Whether a run has made and saved all its steps, and measured what came of them.

    Of the state, not of the logs, as a step is logged before it is saved.
    """
    config, state = read_config(folder), read_state(folder)
    if state is None or int(state["steps_done"]) != config["steps"]:
        return False
    rows = read_jsonl(Path(folder) / "metrics.jsonl")
    if not rows or rows[-1].get("step") != config["steps"]:
        return False
    return not config.get("eval_every") or "eval_accuracy" in rows[-1]


def trained_weights(folder: Path | str) -> dict[str, str]:
    """What a run made: {"adapter": folder}, or {"model": folder} where all weights were trained."""
    for kind in ("adapter", "model"):
        if (Path(folder) / kind).is_dir():
            return {kind: str(Path(folder) / kind)}
    raise UserError(f"{folder}: holds no checkpoint yet: wait, or name a model by --model")


def stale(weights: Path | str) -> str:
    """A line where a run's adapter/ or model/ is not of its checkpoint's step; else ""."""
    run = Path(weights).parent
    state = read_state(run)
    if state is None:  # not in a run's folder
        return ""
    step = read_record(weights).get("steps_done")
    if step == int(state["steps_done"]):
        return ""
    of = "of an unknown step" if step is None else f"of step {step}"
    return (
        f"{weights} is {of}, the run's checkpoint of step {state['steps_done']}: "
        f"repair it by python train.py --out_dir={run} --resume=True"
    )


def over_its_base(cfg: T, given: dict) -> T:
    """A copy of cfg with the base model and the quantisation that cfg.adapter was trained over.

    cfg: a dataclass with adapter, model and quant; given: what the user typed, which stands. Says
    in a line what was taken from beside the adapter, and warns where something else was typed.
    """
    folder = Path(cfg.adapter)
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"adapter={folder}: no adapter_config.json in it: name an adapter's folder")
    record = read_record(folder)
    try:
        base = json.loads((folder / "adapter_config.json").read_text())[BASE_KEY]
    except (OSError, ValueError, KeyError, TypeError):
        base = None  # lora.load_adapter says what is wrong
    found = {"model": record.get("base_model") or base, "quant": record.get("quant")}
    for key, value in found.items():
        if value and key in given and given[key] != value:
            print(f"warning: {folder} was trained over {key}={value}, not {given[key]}")
    taken = {
        key: value
        for key, value in found.items()
        if value and key not in given and value != getattr(cfg, key)
    }
    if taken:
        print(f"from {folder}: " + ", ".join(f"{key}={value}" for key, value in taken.items()))
    if not found["quant"] and "quant" not in given:
        print(f"{folder} does not say over which quantisation it was trained: quant={cfg.quant}")
    return replace(cfg, **taken)


def read_jsonl(path: Path) -> list[dict]:
    """Rows of a log, up to the first line that a crash cut off or damaged."""
    rows = []
    for line in path.read_text(errors="replace").split("\n")[:-1] if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict):
            break
        rows.append(row)
    return rows


def save_rows(rows: list[dict], path: Path) -> None:
    """Write rows as .jsonl, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(temporary, path)


def write_json(path: Path, value: dict) -> None:
    """Write JSON whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)
