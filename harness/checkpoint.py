"""The run folder: who holds it, its config and logs, and the state to resume from.

    config.json     the configuration, library versions and git commit
    metrics.jsonl   one object a step          samples.jsonl   some responses of each step
    adapter/        PEFT's format (or model/, all weights)     eval/   completions of each eval
    state.safetensors   trainable weights and AdamW moments after the last checkpoint's step

What is random in a step is a function of (seed, step), so there are no generators to save. Each
file is written whole or not at all, and none of them is a pickle.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from importlib import metadata
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from harness.errors import UserError
from lora import lora_layers, save_adapter, save_tensors, trainable

LIBRARIES = ("torch", "transformers", "bitsandbytes", "numpy", "math-verify", "tokenizers")
MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # AdamW's state of a parameter
# What resuming cannot change: the saved tensors, or the meaning of what was logged, depend on it.
FIXED = ("model", "quant", "lora_r", "lora_alpha", "train_data", "keep_duplicates", "one_shot",
         "prompt", "optimizer", "seed")  # fmt: skip


class RunFolder:
    """A folder held by one process. Raises UserError where a run is already there or running."""

    def __init__(self, folder: Path, config: dict, resume: bool):
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(folder / "lock", "w")
        except OSError as error:
            raise UserError(f"out_dir={folder}: cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"out_dir={folder}: another process is running in it") from error
        has_state = (folder / "state.safetensors").exists()
        if (folder / "metrics.jsonl").exists() and not resume:
            go_on = "go on with it by --resume=True, " if has_state else ""
            raise UserError(
                f"out_dir={folder}: holds a run: {go_on}name another --out_dir, or delete it"
            )
        if resume and not has_state:
            raise UserError(f"out_dir={folder}: nothing to resume: no checkpoint in it")
        if resume:
            self._compare(config)
        self._config = config

    def _compare(self, config: dict) -> None:
        saved = read_config(self.folder)
        for key, value in config.items():
            # JSON has no tuples, and resume and out_dir say nothing of the run itself
            before, now = json.dumps(saved.get(key)), json.dumps(value)
            # a run from before there was such a knob had what is now its default
            if before == now or key in ("resume", "out_dir") or key not in saved:
                continue
            if key in FIXED:
                raise UserError(f"resume: {key} was {before} and is now {now}: start a new run")
            print(f"resume: {key} was {before}, from here on {now}")

    # ------------------------------------------------------------------------------------- state

    def save_state(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        optimizer: torch.optim.Optimizer,
        step: int,
    ) -> None:
        """Checkpoint after a step: the state to resume from, and the adapter for others to use."""
        tensors = {}
        for name, parameter in trainable(model).items():
            tensors[f"weight:{name}"] = parameter
            for moment, value in optimizer.state[parameter].items():
                tensors[f"{moment}:{name}"] = value
        save_tensors(tensors, self.folder / "state.safetensors", {"steps_done": str(step)})
        if lora_layers(model):
            save_adapter(model, self.folder / "adapter", self._config["model"])
        else:
            model.save_pretrained(self.folder / "model")
            tokenizer.save_pretrained(self.folder / "model")

    def load_state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Restore weights and moments in place; returns the number of steps done."""
        path = self.folder / "state.safetensors"
        try:
            with safe_open(path, "pt") as file, torch.no_grad():
                for name, parameter in trainable(model).items():
                    parameter.copy_(file.get_tensor(f"weight:{name}"))
                    if f"step:{name}" in file.keys():
                        optimizer.state[parameter] = {
                            m: file.get_tensor(f"{m}:{name}").to(
                                "cpu" if m == "step" else parameter.device
                            )
                            for m in MOMENTS
                        }
                return int(file.metadata()["steps_done"])
        except (OSError, SafetensorError, RuntimeError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a state of this run ({error})") from error

    # -------------------------------------------------------------------------------------- logs

    def truncate_logs(self, steps_done: int) -> list[dict]:
        """Drop what was logged after the checkpoint; returns the metrics that stay."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            kept = [row for row in read_jsonl(self.folder / name) if row["step"] <= steps_done]
            temporary = self.folder / (name + ".tmp")
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
            os.replace(temporary, self.folder / name)
        return read_jsonl(self.folder / "metrics.jsonl")

    def log(self, name: str, rows: list[dict]) -> None:
        """Append rows to metrics.jsonl or samples.jsonl."""
        with open(self.folder / name, "a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))

    def __enter__(self) -> "RunFolder":
        write_json(self.folder / "config.json", {"config": self._config, **_provenance()})
        return self

    def __exit__(self, *error) -> None:
        self._lock.close()


class StopOnCtrlC:
    """The first Ctrl-C lets the step end and saves; the second stops at once."""

    asked = False

    def __enter__(self) -> "StopOnCtrlC":
        self.main = threading.current_thread() is threading.main_thread()  # else no signals
        if self.main:
            self.before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *error) -> None:
        if self.main:
            signal.signal(signal.SIGINT, self.before)

    def _ask(self, *_) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        tqdm.write("stopping after this step; Ctrl-C again stops at once, without saving it")


def read_config(folder: Path | str) -> dict:
    """The configuration of a run. Raises UserError if the folder holds none."""
    path = Path(folder) / "config.json"
    try:
        return json.loads(path.read_text())["config"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: no readable config.json of a run in it") from error


def trained_weights(folder: Path | str) -> dict[str, str]:
    """What a run made: {"adapter": folder}, or {"model": folder} where all weights were trained."""
    for kind in ("adapter", "model"):
        if (Path(folder) / kind).is_dir():
            return {kind: str(Path(folder) / kind)}
    raise UserError(f"{folder}: holds no checkpoint yet: wait, or name a model by --model")


def read_jsonl(path: Path) -> list[dict]:
    """Rows of a log; a last line that was cut off by a crash is dropped."""
    rows = []
    for line in path.read_text().split("\n")[:-1] if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
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


def _provenance() -> dict:
    versions = {"python": sys.version.split()[0]}
    for library in LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            versions[library] = None
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    return {"versions": versions, "git": git.stdout.strip() or None, "argv": sys.argv}
