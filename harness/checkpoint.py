"""The run folder: its lock, its config and logs, and the state to resume from.

    config.json         the configuration, library versions and git commit
    metrics.jsonl       one object per step
    samples.jsonl       some responses of each step
    adapter/            the adapter in PEFT's format; model/ if all weights are trained
    eval/               the completions of each eval
    state.safetensors   trainable weights and optimiser moments, see harness/states.py
    interrupted-1/      logs of a run that ended here before its first checkpoint

Everything random in a step is a function of (seed, step), so no generator is saved. No file is a
pickle. State, weights and config are replaced as a whole, so a crash leaves the old or the new
file. A step writes its log first, then the state, then adapter/ or model/, and the eval last. If a
crash interrupts this, resuming repairs it.
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
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedTokenizerBase

from harness import states
from harness.adapters import save_adapter
from harness.errors import OnlyStateSaved, UserError
from harness.files import no_follow, put_in_place, sync, temporary_for
from harness.locks import lock
from harness.runfiles import (
    RECORD,
    STATE,
    read_config,
    read_history,
    read_inputs,
    read_jsonl,
    read_record,
    read_state,
    save_rows,
    write_json,
)
from lora import lora_layers

# The logs of a run without a checkpoint. The completions of an unfinished eval (eval/*.progress)
# are not among them: they stay in place, and the same eval continues from them.
LOGS = ("config.json", "metrics.jsonl", "samples.jsonl", "eval/*.jsonl")
STEP_LOGS = ("metrics.jsonl", "samples.jsonl")  # appended to in every step
LIBRARIES = ("torch", "transformers", "bitsandbytes", "numpy", "math-verify", "tokenizers")
# The settings that may change when a run is resumed. They decide how long and where it runs, and
# what it costs. Any other setting decides what the run learns or how its curve is measured. With
# another value the rest would be another experiment, and config.json would describe only the rest.
# steps is one of those if a schedule is spread over them.
FREE = (
    "steps",
    "eval_every",
    "save_every",
    "base_every",
    "gradient_checkpointing",
    "micro_batch_tokens",
    "rollout_rows",
    "rollout_weights",
    "device",
    "threads",
    "dtype",
    "watch",
    "log",
    "log_tokens",
)
NOT_COMPARED = ("resume", "resume_step", "out_dir")


class RunFolder:
    """The folder of a run, locked by one process.

    Raises UserError if the folder cannot be written or another process holds it, if it holds a run
    and resume is False, or if it holds no run that `config` can resume.
    """

    def __init__(self, folder: Path, config: dict, resume: bool):
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(folder / "lock", "a", opener=no_follow)
        except (OSError, RecursionError) as error:
            reason = getattr(error, "strerror", "too many folders in one another")
            if (folder / "lock").is_symlink():
                reason = "its file `lock` is a symbolic link: delete it"
            raise UserError(f"out_dir={folder}: cannot be written: {reason}") from error
        try:
            lock(self._lock)
        except OSError as error:
            raise UserError(f"out_dir={folder}: another process is running in it") from error
        self.history: list[dict] = []  # the rows of metrics.jsonl
        self._resume, self.config = resume, config
        self.inputs = read_inputs(folder) if resume else {}  # fingerprints
        step = config.get("resume_step", 0)
        chosen = states.choose(folder, step) if resume else read_state(folder)
        if resume and chosen is None:
            raise UserError(
                f"out_dir={folder}: holds no checkpoint to resume from: start without --resume"
            )
        trained = [name for name in ("adapter", "model") if (folder / name).exists()]
        if not resume and (chosen or trained):
            how = "continue it with --resume=True, " if chosen else ""
            raise UserError(
                f"out_dir={folder}: holds a run: {how}name another --out_dir, or delete it"
            )
        if resume:
            self._state, numbers = chosen
            self._done = int(numbers["steps_done"])
            self._compare(config, self._done)
            self.history = read_history(folder, numbers)

    def _compare(self, config: dict, done: int) -> None:
        """Print the settings that have changed. Raises UserError if one of them must not change."""
        saved = read_config(self.folder)
        for key, value in config.items():
            before, now = json.dumps(saved.get(key)), json.dumps(value)  # JSON has no tuples
            # Older runs lack the settings that are new. They ran with what is now the default.
            if before == now or key in NOT_COMPARED or key not in saved:
                continue
            if key not in FREE or (key == "steps" and _has_schedule(config)):
                raise UserError(
                    f"resume: {key} was {before} and is now {now}: keep it, or start a new run in "
                    "another --out_dir"
                )
            print(f"resume: {key} was {before}, from here on {now}")
        if config["steps"] < done:
            raise UserError(
                f"resume: steps={config['steps']}, but the run has already made {done} steps: "
                "raise --steps, or start a new run in another --out_dir"
            )

    def compare_inputs(self, inputs: dict[str, str]) -> None:
        """Note fingerprints of what the run reads. Raises UserError if a resumed run had others."""
        for key, now in inputs.items():
            if (before := self.inputs.setdefault(key, now)) != now:
                name = self.config.get(key.split(" ")[0], "")
                raise UserError(
                    f"resume: {key} {name} has changed since the run began (it was {before}, and "
                    f"is now {now}): restore it, or start a new run in another --out_dir"
                )

    # ------------------------------------------------------------------------------------- state

    def save_state(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        optimizer: torch.optim.Optimizer,
        step: int,
    ) -> None:
        """Save a checkpoint after a step: the state to resume from, and the adapter or model.

        Raises OnlyStateSaved if the adapter or model cannot be written.
        """
        for name in STEP_LOGS:  # a power cut must not lose rows that the state counts on
            sync(self.folder / name)
        logged = sum(row["step"] <= step for row in self.history)
        states.write(self.folder, model, optimizer, step, logged)
        try:
            self._save_weights(model, tokenizer, step)
        except (OSError, UserError) as error:
            raise OnlyStateSaved(str(error)) from error

    def _save_weights(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, step: int
    ) -> None:
        """Save the adapter or the model.

        The record is deleted first and written last. If it is missing, or names another step than
        the state, the weights must not be used: they may be a mixture of two steps.
        """
        folder = self.folder / ("adapter" if lora_layers(model) else "model")
        (folder / RECORD).unlink(missing_ok=True)
        if lora_layers(model):
            save_adapter(model, folder, self.config["model"])
        else:
            new = temporary_for(folder)
            try:
                for part in (model, tokenizer):
                    part.save_pretrained(new)
            except SafetensorError as error:  # for example on a full disk
                shutil.rmtree(new, ignore_errors=True)
                raise UserError(f"{folder}: cannot be written: {error}") from error
            folder.mkdir(exist_ok=True)
            for file in new.iterdir():
                put_in_place(file, folder / file.name)
            new.rmdir()
        config = self.config
        write_json(
            folder / RECORD,
            {"steps_done": step, "base_model": config["model"], "quant": config["quant"]},
        )

    def repair_weights(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, step: int
    ) -> None:
        """Write adapter/ or model/ again if a crash left it at another step than the state's."""
        folder = self.folder / ("adapter" if lora_layers(model) else "model")
        found = read_record(folder).get("steps_done")
        if found != step:
            was = "incomplete" if found is None else f"from step {found}"
            print(f"{folder} was {was}: written again as of step {step}")
            self._save_weights(model, tokenizer, step)

    def load_state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Restore weights and moments in place. Return the number of steps done."""
        path = self.folder / STATE
        return states.restore(path, model, optimizer, self.config["updates_per_step"])

    # -------------------------------------------------------------------------------------- logs

    def log(self, metrics: dict, samples: list[dict]) -> None:
        """Append a step to metrics.jsonl and samples.jsonl."""
        self.history.append(metrics)
        for name, rows in zip(STEP_LOGS, ([metrics], samples), strict=True):
            with open(self.folder / name, "a", opener=no_follow) as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))

    def log_eval(self, step: int, figures: dict) -> None:
        """Add an eval's figures to the row of its step. The first eval adds a row of step 0."""
        if not self.history or self.history[-1]["step"] != step:
            self.history.append({"step": step})
        self.history[-1] |= figures
        save_rows(self.history, self.folder / "metrics.jsonl")

    def _cut_logs(self) -> None:
        """Drop what was logged after the checkpoint."""
        save_rows(self.history, self.folder / "metrics.jsonl")
        done = self._done
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
        print(f"a run ended here before its first checkpoint: its logs are now in {aside}")

    def __enter__(self) -> "RunFolder":
        if self._resume:
            states.make_newest(self._state)
            self._cut_logs()
        else:
            self._set_aside()
        write_json(
            self.folder / "config.json",
            {"config": self.config, "inputs": self.inputs, **_provenance()},
        )
        return self

    def __exit__(self, *error) -> None:
        self._lock.close()


def _has_schedule(config: dict) -> bool:
    """Whether updates depend on the number of steps of the whole run (see settings.py)."""
    rate = config["lr_schedule"] != "constant" or config["warmup"] > 0
    return rate or (config["loss"] == "hoelder" and config["hoelder_p"] != config["hoelder_p_end"])


def _provenance() -> dict:
    """Library versions, git commit and command line, for config.json."""
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
