"""Arms: the runs of one configuration, one run per seed, with the metrics that each run logged."""

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from harness.errors import UserError
from harness.runfiles import read_jsonl
from settings import Config, read_settings

# Two runs belong to one arm even if they differ in these settings ...
RUN_KEYS = ("seed", "out_dir", "resume", "resume_step")
# ... or in these, which train.py adapts to the memory it finds.
MEMORY_KEYS = ("rollout_weights", "rollout_rows", "micro_batch_tokens")


@dataclass
class Arm:
    """The runs of one configuration. A run is the list of the rows in its metrics.jsonl."""

    label: str
    folders: list[Path]  # one per run
    runs: list[list[dict]]
    config: dict = field(default_factory=dict)  # of the first run

    def curve(self, key: str, smooth: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(steps, mean, standard error), [S] each, for the S steps at which every run has `key`.

        smooth: average each run over this many steps, up to and including the current one.
        The standard error is over seeds, and nan if there is one seed. Exception: eval_accuracy of
        a single seed has the logged error over problems. The error is also nan where all seeds have
        the same value: before training they measure the same model on the same samples.
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
        """[seeds, bins]: the fraction of a bin's tokens that was clipped, averaged over all steps.

        key: clip_high_bins or clip_low_bins. Steps are weighted by the share of their tokens in the
        bin. A bin without tokens is nan. The result is empty, [0, 0], if a run did not log the key.
        """
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

    def _common(self, key: str) -> tuple[list[int], np.ndarray]:
        """The S steps at which every run has `key`, and the values there, [runs, S].

        Other steps are left out: the mean would jump where a shorter run ends.
        """
        columns = []
        for rows in self.runs:
            columns.append({row["step"]: row[key] for row in rows if finite(row.get(key))})
        steps = sorted(set.intersection(*map(set, columns)))
        values = [[column[step] for step in steps] for column in columns]
        return steps, np.array(values, dtype=float)


def as_saved(config: Config) -> dict:
    """A configuration as config.json holds it (lists instead of tuples)."""
    return json.loads(json.dumps(asdict(config)))


def every_setting(config: dict) -> dict:
    """A run's configuration with every setting. A setting newer than the run has its default."""
    return as_saved(Config()) | config


def differences(a: dict, b: dict, but: Collection[str] = ()) -> dict[str, tuple]:
    """The settings, except `but`, in which two configurations differ: key -> (a's, b's) value.

    With but=(*RUN_KEYS, *MEMORY_KEYS), two runs of one arm have no differences. Settings that no
    longer exist are ignored.
    """
    a, b = every_setting(a), every_setting(b)
    keys = [key for key in as_saved(Config()) if key not in but]
    return {key: (a[key], b[key]) for key in keys if a[key] != b[key]}


def finite(value) -> bool:
    """Whether a logged value is a finite number (not a list, null or NaN)."""
    return isinstance(value, int | float) and math.isfinite(value)


def load_arms(folders: Sequence[Path | str]) -> list[Arm]:
    """Read run folders and group them into arms, in the order given.

    An arm's label is its reward and every other setting in which the arms differ. Raises UserError
    for a folder without a readable config.json or metrics.jsonl, and for a seed given twice.
    """
    arms: dict[str, Arm] = {}
    seen: dict[tuple, Path] = {}
    for folder in map(Path, folders):
        config = every_setting(read_settings(folder))
        name = json.dumps(_without_run_keys(config), sort_keys=True)
        twin = seen.setdefault((name, config.get("seed")), folder)
        if twin is not folder:
            raise UserError(f"{folder}: the same configuration and seed as {twin}: name only one")
        arm = arms.setdefault(name, Arm("", [], [], config))
        arm.folders.append(folder)
        arm.runs.append(load_metrics(folder))
    _set_labels(list(arms.values()))
    return list(arms.values())


def _without_run_keys(config: dict) -> dict:
    return {key: value for key, value in config.items() if key not in RUN_KEYS}


def _set_labels(arms: list[Arm]) -> None:
    configs = [_without_run_keys(arm.config) for arm in arms]
    keys = dict.fromkeys(key for config in configs for key in config)
    differing = [key for key in keys if len({json.dumps(c.get(key)) for c in configs}) > 1]
    defaults = as_saved(Config())
    for arm, config in zip(arms, configs, strict=True):
        shown = [key for key in differing if config.get(key, "") != "" and key != "reward"]
        # A default that most arms have would only lengthen their labels.
        shown = [
            key
            for key in shown
            if config[key] != defaults.get(key)
            or 2 * sum(c.get(key) == config[key] for c in configs) <= len(configs)
        ]
        settings = [f"{key}={config[key]}" for key in shown]
        arm.label = ", ".join([str(config.get("reward", "?")), *settings])


def mean_run(runs: Sequence[list[dict]]) -> list[dict]:
    """One run made of several of equal length: the mean of each number that all have at a step."""
    mean = []
    for rows in zip(*runs, strict=True):
        shared = [key for key in rows[0] if all(finite(row.get(key)) for row in rows)]
        mean.append({key: sum(row[key] for row in rows) / len(rows) for key in shared})
    return mean


def load_metrics(folder: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl, with clip_frac = low + high added.

    Raises UserError if the file is missing, unreadable or empty.
    """
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
