"""The run folder: who holds it, its config and logs, and the state to resume from.

    config.json     the configuration, library versions and git commit
    metrics.jsonl   one object a step          samples.jsonl   some responses of each step
    adapter/        PEFT's format (or model/, all weights)     eval/   completions of each eval
    state.safetensors   trainable weights and AdamW moments after the last checkpoint's step
    interrupted-1/  logs of a run that ended here before its first checkpoint

What is random in a step is a function of (seed, step), so there are no generators to save. Each
file is written whole or not at all, and none of them is a pickle. The order is: log, state, weights
for others, eval. Resuming makes up for whatever a crash left out of it.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedTokenizerBase

from harness.adapters import save_adapter, save_tensors
from harness.errors import UserError
from harness.locks import lock
from harness.runfiles import (
    RECORD,
    STATE,
    read_config,
    read_history,
    read_jsonl,
    read_record,
    read_state,
    save_rows,
    write_json,
)
from lora import lora_layers, trainable

# What a run without a checkpoint leaves behind. The completions of an unfinished eval
# (eval/*.progress) stay in place: the same eval goes on with them.
LOGS = ("config.json", "metrics.jsonl", "samples.jsonl", "eval/*.jsonl")
LIBRARIES = ("torch", "transformers", "bitsandbytes", "numpy", "math-verify", "tokenizers")
MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # AdamW's state of a parameter
# What resuming cannot change: the saved tensors, or the meaning of what was logged, depend on it.
FIXED = (
    "model",
    "quant",
    "lora_r",
    "lora_alpha",
    "train_data",
    "keep_duplicates",
    "one_shot",
    "prompt",
    "optimizer",
    "seed",
)


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
            lock(self._lock)
        except OSError as error:
            raise UserError(f"out_dir={folder}: another process is running in it") from error
        self.history: list[dict] = []  # the rows of metrics.jsonl
        self._resume, self.config = resume, config
        saved = read_state(folder)
        if resume and saved is None:
            raise UserError(
                f"out_dir={folder}: nothing to resume: no checkpoint in it: start without --resume"
            )
        trained = [name for name in ("adapter", "model") if (folder / name).exists()]
        if not resume and (saved or trained):
            how = "go on with it by --resume=True, " if saved else ""
            raise UserError(
                f"out_dir={folder}: holds a run: {how}name another --out_dir, or delete it"
            )
        if resume:
            self._compare(config)
            self.history = read_history(folder, saved)

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
        logged = sum(row["step"] <= step for row in self.history)
        numbers = {"steps_done": str(step), "logged": str(logged)}
        save_tensors(tensors, self.folder / STATE, numbers)
        self._save_weights(model, tokenizer, step)

    def _save_weights(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, step: int
    ) -> None:
        """The adapter, or the model. The record goes first and comes back last: while there is
        none, or one of another step than the state's, the weights are not to be trusted."""
        folder = self.folder / ("adapter" if lora_layers(model) else "model")
        (folder / RECORD).unlink(missing_ok=True)
        if lora_layers(model):
            save_adapter(model, folder, self.config["model"])
        else:
            new = self.folder / "model.tmp"
            shutil.rmtree(new, ignore_errors=True)
            for part in (model, tokenizer):
                part.save_pretrained(new)
            folder.mkdir(exist_ok=True)
            for file in new.iterdir():
                os.replace(file, folder / file.name)
            new.rmdir()
        config = self.config
        write_json(
            folder / RECORD,
            {"steps_done": step, "base_model": config["model"], "quant": config["quant"]},
        )

    def repair_weights(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, step: int
    ) -> None:
        """Write adapter/ or model/ again if a crash kept it from being of the state's step."""
        folder = self.folder / ("adapter" if lora_layers(model) else "model")
        found = read_record(folder).get("steps_done")
        if found != step:
            print(f"{folder}: of step {found}, written again as of step {step}")
            self._save_weights(model, tokenizer, step)

    def load_state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Restore weights and moments in place; returns the number of steps done."""
        path = self.folder / STATE
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

    def log(self, metrics: dict, samples: list[dict]) -> None:
        """Append a step to metrics.jsonl and samples.jsonl."""
        self.history.append(metrics)
        for name, rows in (("metrics.jsonl", [metrics]), ("samples.jsonl", samples)):
            with open(self.folder / name, "a") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))

    def log_eval(self, step: int, figures: dict) -> None:
        """Add an eval's figures to the row of its step; before training there is none yet."""
        if not self.history or self.history[-1]["step"] != step:
            self.history.append({"step": step})
        self.history[-1] |= figures
        save_rows(self.history, self.folder / "metrics.jsonl")

    def _cut_logs(self) -> None:
        """Drop what was logged after the checkpoint."""
        save_rows(self.history, self.folder / "metrics.jsonl")
        done = int(read_state(self.folder)["steps_done"])
        samples = read_jsonl(self.folder / "samples.jsonl")
        kept = [row for row in samples if row.get("step", done + 1) <= done]
        save_rows(kept, self.folder / "samples.jsonl")

    def _set_aside(self) -> None:
        """Move the logs of a run that has no checkpoint into a folder of their own."""
        left = [path for pattern in LOGS for path in self.folder.glob(pattern)]
        if all(path.name == "config.json" for path in left):  # nothing was logged
            return
        numbers = (n for n in itertools.count(1) if not (self.folder / f"interrupted-{n}").exists())
        aside = self.folder / f"interrupted-{next(numbers)}"
        for path in left:
            to = aside / path.relative_to(self.folder)
            to.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, to)
        print(f"a run ended here before its first checkpoint: its logs are in {aside}")

    def __enter__(self) -> "RunFolder":
        if self._resume:
            self._cut_logs()
        else:
            self._set_aside()
        write_json(self.folder / "config.json", {"config": self.config, **_provenance()})
        return self

    def __exit__(self, *error) -> None:
        self._lock.close()


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
