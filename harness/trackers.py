"""Metrics to Weights & Biases or TensorBoard, for those who watch their runs there (--log).

metrics.jsonl stays the record of a run. Neither library is needed, and each is imported only when
it is asked for.
"""

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Literal

from harness.errors import UserError

Log = Literal["none", "wandb", "tensorboard"]
Write = Callable[[dict[str, float], int], None]  # (metrics by name, step)


def library(log: Log) -> ModuleType | None:
    """The module that writes to a tracker. Raises UserError where it is not installed."""
    if log == "none":
        return None
    try:
        return importlib.import_module("wandb" if log == "wandb" else "torch.utils.tensorboard")
    except ImportError as error:
        raise UserError(f"log={log} needs {log}: pip install {log}, or leave --log out") from error


def open_tracker(
    log: Log, config: dict, out_dir: str, history: list[dict]
) -> Callable[[list[dict]], None]:
    """A function that sends the rows of history (metrics.jsonl) that were not sent yet.

    It is to be called when a step and its eval are done. Rows that are in history now belong to an
    earlier process, which sent them. Raises UserError where the tracker cannot be opened.
    """
    module = library(log)
    if module is None:
        return lambda history: None
    try:
        write = (_wandb if log == "wandb" else _tensorboard)(module, config, Path(out_dir))
    except Exception as error:  # each library has its own errors, such as for a missing login
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"log={log} cannot be opened: {reason}") from error
    sent = history[-1]["step"] if history else -1

    def send(history: list[dict]) -> None:
        nonlocal sent
        for row in history:
            if row["step"] > sent:
                sent = row["step"]
                write(numbers(row), sent)

    return send


def numbers(row: dict) -> dict[str, float]:
    """The finite numbers of a row but its step. Lists and nulls are left to metrics.jsonl."""
    return {
        key: value
        for key, value in row.items()
        if key != "step" and isinstance(value, int | float) and math.isfinite(value)
    }


def _wandb(wandb: ModuleType, config: dict, out_dir: Path) -> Write:
    """A run of the project nanorlvr. A resumed run is a second one of the same name and group."""
    name = out_dir.name
    run = wandb.init(project="nanorlvr", name=name, group=name, config=config, dir=str(out_dir))
    return lambda metrics, step: run.log(metrics, step=step)


def _tensorboard(tensorboard: ModuleType, config: dict, out_dir: Path) -> Write:
    """Event files in OUT_DIR/tensorboard, written to disk after every step."""
    writer = tensorboard.SummaryWriter(str(out_dir / "tensorboard"))
    writer.add_text("config", "\n".join(f"    {key} = {value!r}" for key, value in config.items()))

    def write(metrics: dict[str, float], step: int) -> None:
        for key, value in metrics.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return write
