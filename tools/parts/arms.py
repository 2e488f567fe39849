"""Run folders as arms: the runs of one configuration, one a seed, and their metrics.jsonl."""

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from harness.checkpoint import read_config, read_jsonl
from harness.errors import UserError
from settings import Config

NO_ARM = ("seed", "out_dir", "resume")  # what runs of one arm may differ in
SETTLED = ("rollout_weights", "micro_batch_tokens")  # likewise: what memory allowed of them


@dataclass
class Arm:
    """The runs of one configuration, one a seed: their metrics.jsonl, each a list of rows."""

    label: str
    folders: list[Path]
    runs: list[list[dict]]
    config: dict = field(default_factory=dict)  # of its runs; seed and out_dir are the first one's

    def curve(self, key: str, smooth: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(steps, mean, standard error), [S] each, over the S steps at which every run has `key`.

        smooth: each run's values are first averaged over the last so many steps (fewer at first).
        The error is over seeds. It is nan where there is one seed, but for eval_accuracy, whose own
        error over problems is logged; and where the seeds agree exactly, as before training: these
        are not several measurements.
        """
        steps, values = self._common(key)
        if smooth > 1 and len(steps):
            windows = [values[:, max(0, end - smooth) : end] for end in range(1, len(steps) + 1)]
            values = np.stack([window.mean(1) for window in windows], 1)
        error = np.full(len(steps), np.nan)
        if len(self.runs) > 1 and len(steps):
            error = values.std(0, ddof=1) / math.sqrt(len(self.runs))
            error[np.ptp(values, 0) == 0] = np.nan
        elif key == "eval_accuracy" and self._common("eval_stderr")[0] == steps:
            error = self._common("eval_stderr")[1][0]
        return np.array(steps), values.mean(0), error

    def by_bin(self, key: str) -> np.ndarray:
        """[seeds, bins] of clip_high_bins or clip_low_bins: of a bin's tokens those clipped, over
        all steps (equally weighted); nan where a bin had no token. [0, 0] where none is logged."""
        runs = []
        for rows in self.runs:
            logged = [row for row in rows if row.get(key) and row.get("prob_bins")]
            if not logged:
                return np.empty((0, 0))
            share = np.array([row["prob_bins"] for row in logged], dtype=float)  # [S, bins]
            clipped = np.array([[value or 0.0 for value in row[key]] for row in logged])
            with np.errstate(invalid="ignore"):
                runs.append((share * clipped).sum(0) / share.sum(0))
        return np.stack(runs)

    def has(self, key: str) -> bool:
        """Whether there is something to draw in the panel of this name."""
        if key == "clip_bins":
            return self.by_bin("clip_high_bins").size > 0
        return len(self.curve("clip_pull_high" if key == "clip_pull" else key)[0]) > 0

    def _common(self, key: str) -> tuple[list[int], np.ndarray]:
        """Steps that every run has, so that no mean jumps where a shorter run ends; [runs, S]."""
        columns = [{row["step"]: row[key] for row in rows if finite(row.get(key))}
                   for rows in self.runs]  # fmt: skip
        steps = sorted(set.intersection(*map(set, columns)))
        values = [[column[step] for step in steps] for column in columns]
        return steps, np.array(values, dtype=float)


def as_saved(config: Config) -> dict:
    """A configuration as config.json has it (no tuples)."""
    return json.loads(json.dumps(asdict(config)))


def every_knob(config: dict) -> dict:
    """A run's configuration with every knob: a run from before there was one had its default."""
    return as_saved(Config()) | config


def differences(a: dict, b: dict, but: Collection[str] = ()) -> dict[str, tuple]:
    """The knobs, less `but`, in which two runs' configurations differ: key -> (a's, b's) value.

    but=(*NO_ARM, *SETTLED) leaves what makes two arms of two runs. A knob that there no longer is
    makes no difference.
    """
    a, b = every_knob(a), every_knob(b)
    keys = [key for key in as_saved(Config()) if key not in but]
    return {key: (a[key], b[key]) for key in keys if a[key] != b[key]}


def finite(value) -> bool:
    """Whether a logged value is a number, rather than a list, null or NaN."""
    return isinstance(value, int | float) and math.isfinite(value)


def load_arms(folders: Sequence[Path | str]) -> list[Arm]:
    """Read run folders and group them into arms, in the order given.

    An arm is labelled with its reward and with whatever else differs between arms. Raises UserError
    for a folder without a readable config.json or metrics.jsonl, or a seed that is there twice.
    """
    arms: dict[str, Arm] = {}
    configs: dict[str, dict] = {}
    seeds: dict[tuple, Path] = {}
    for folder in map(Path, folders):
        config = every_knob(read_config(folder))
        rest = {key: value for key, value in config.items() if key not in NO_ARM}
        name = json.dumps(rest, sort_keys=True)
        twin = seeds.setdefault((name, config.get("seed")), folder)
        if twin is not folder:
            raise UserError(f"{folder}: the same configuration and seed as {twin}: name only one")
        arm = arms.setdefault(name, Arm("", [], [], config))
        arm.folders.append(folder)
        arm.runs.append(load_metrics(folder))
        configs[name] = rest
    keys = dict.fromkeys(key for config in configs.values() for key in config)
    differing = [key for key in keys if len({json.dumps(c.get(key)) for c in configs.values()}) > 1]
    for name, arm in arms.items():
        config = configs[name]
        shown = [k for k in differing if config.get(k, "") != "" and k != "reward"]
        rest = [f"{k}={config[k]}" for k in shown]
        arm.label = ", ".join([str(config.get("reward", "?")), *rest])
    return list(arms.values())


def mean_run(runs: Sequence[list[dict]]) -> list[dict]:
    """Runs of equal length as one: the mean of each number that all have at a step."""
    return [
        {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]
         if all(finite(row.get(key)) for row in rows)}
        for rows in zip(*runs, strict=True)
    ]  # fmt: skip


def load_metrics(folder: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl, with clip_frac added. Raises UserError where none is."""
    path = folder / "metrics.jsonl"
    try:
        path.stat()
        rows = read_jsonl(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}): name the folder of a run") from error
    if not rows or not all(isinstance(row, dict) and "step" in row for row in rows):
        raise UserError(f"{path}: holds no metrics: wait for the run's first step, or leave it out")
    for row in rows:
        if "clip_frac_low" in row:
            row["clip_frac"] = row["clip_frac_low"] + row["clip_frac_high"]
    return rows
