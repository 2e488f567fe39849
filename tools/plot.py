"""Compare runs: one figure and one table from their metrics.jsonl.

    python -m tools.plot out/a out/b ... --out=figure.png
    python -m tools.plot out/* --metrics=eval_accuracy,kl,length

Runs that differ only in their seed are one arm: a line for the mean, a band for its standard error.
"""

import difflib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from checkpoint import read_config, read_jsonl
from configurator import UserError, configure, run

NO_ARM = ("seed", "out_dir", "resume")  # what runs of one arm may differ in
PANELS = ("eval_accuracy", "accuracy", "code_frequency", "reward", "clip_frac", "entropy")
TITLES = {
    "eval_accuracy": "Eval accuracy",
    "accuracy": "Rollout accuracy",
    "code_frequency": "Code frequency",
    "reward": "Reward",
    "clip_frac": "Clip fraction, low + high",
    "entropy": "Entropy (nats a token)",
    "boxed": "Boxed share",
    "kl": "KL to the base (nats a token)",
    "length": "Response length (tokens)",
}
# Okabe and Ito's colours, told apart with any colour vision; the yellow is too pale for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX"
STYLES = ("-", "--", ":")


@dataclass
class PlotConfig:
    """Compare runs: python -m tools.plot FOLDER [FOLDER ...] [--key=value]"""

    out: str = "out/figure.png"  # the figure; its suffix chooses the format (png, pdf, svg)
    metrics: tuple[str, ...] = PANELS  # panels, by key of metrics.jsonl; clip_frac = low + high
    smooth: int = 5  # steps: lines show the mean of the last so many; evals are as they are


@dataclass
class Arm:
    """The runs of one configuration, one a seed: their metrics.jsonl, each a list of rows."""

    label: str
    folders: list[Path]
    runs: list[list[dict]]

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

    def _common(self, key: str) -> tuple[list[int], np.ndarray]:
        """Steps that every run has, so that no mean jumps where a shorter run ends; [runs, S]."""
        columns = [{row["step"]: row[key] for row in rows if _finite(row.get(key))}
                   for rows in self.runs]  # fmt: skip
        steps = sorted(set.intersection(*map(set, columns)))
        values = [[column[step] for step in steps] for column in columns]
        return steps, np.array(values, dtype=float)


def _finite(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


# ---- reading


def load_arms(folders: Sequence[Path | str]) -> list[Arm]:
    """Read run folders and group them into arms, in the order given.

    An arm is labelled with its reward and with whatever else differs between arms. Raises UserError
    for a folder without a readable config.json or metrics.jsonl, or a seed that is there twice.
    """
    arms: dict[str, Arm] = {}
    configs: dict[str, dict] = {}
    seeds: dict[tuple, Path] = {}
    for folder in map(Path, folders):
        config = read_config(folder)
        rest = {key: value for key, value in config.items() if key not in NO_ARM}
        name = json.dumps(rest, sort_keys=True)
        twin = seeds.setdefault((name, config.get("seed")), folder)
        if twin is not folder:
            raise UserError(f"{folder}: the same configuration and seed as {twin}: name only one")
        arm = arms.setdefault(name, Arm("", [], []))
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


# ---- figure and table


def draw(
    arms: list[Arm], path: Path | str, metrics: Sequence[str] = PANELS, smooth: int = 5
) -> None:
    """Save a figure with a panel a metric, 1600 pixels wide. Raises UserError for an unknown one.

    Of the default panels those without data are left out (a run may have no evals).
    """
    has = {key: any(len(arm.curve(key)[0]) for arm in arms) for key in metrics}
    if tuple(metrics) == PANELS:
        metrics = [key for key in metrics if has[key]]
    for key in metrics:
        if not has[key]:
            known = sorted({k for arm in arms for rows in arm.runs for row in rows for k in row})
            near = difflib.get_close_matches(key, known, 3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there is {', '.join(known)}"
            what = "has no values in these runs" if key in known else f"no such metric: {hint}"
            raise UserError(f"--metrics: {key}: {what}")
    if not metrics:
        raise UserError("--metrics: nothing to draw: name one or more keys of metrics.jsonl")
    columns = {1: 1, 2: 2, 4: 2}.get(len(metrics), 3)
    rows = math.ceil(len(metrics) / columns)
    labels = [f"{arm.label} ({_seeds(len(arm.runs))})" for arm in arms]
    legend_columns = max(1, min(len(arms), 115 // (max(map(len, labels)) + 6)))
    height = 3.1 * rows + 0.8 + 0.25 * math.ceil(len(arms) / legend_columns)
    style = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(32 / 3, height), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
        for axis in axes.flat[len(metrics) :]:
            axis.remove()
        for i, (axis, key) in enumerate(zip(axes.flat, metrics, strict=False)):
            for j, arm in enumerate(arms):
                _line(axis, arm, key, smooth, j)
            axis.set_title(TITLES.get(key, key), fontsize=12)
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axis.grid(alpha=0.25)
            if key.startswith("clip_frac"):
                _log_with_zero(axis, [arm.curve(key, smooth)[1] for arm in arms])
            if i + columns >= len(metrics):
                axis.set_xlabel("step")
        handles = [axes.flat[0].plot([], [], **_look(j), linewidth=3)[0] for j in range(len(arms))]
        place = {"loc": "outside lower center", "ncols": legend_columns, "frameon": False}
        title = {"title": _notes(arms, smooth), "title_fontsize": 9}
        figure.legend(handles, labels, **place, **title)
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=150)
        except (OSError, ValueError) as error:
            raise UserError(f"--out={path}: cannot be written: {error}") from error


def _look(number: int) -> dict:
    n = len(COLOURS)
    return {"color": COLOURS[number % n], "linestyle": STYLES[number // n % len(STYLES)]}


def _line(axis, arm: Arm, key: str, smooth: int, number: int) -> None:
    """One arm in one panel: evals as points with bars, what is logged every step with a band."""
    look = {**_look(number), "linewidth": 1.8}
    if key.startswith("eval_"):
        steps, mean, error = arm.curve(key)
        bars = None if np.isnan(error).all() else error
        marker = MARKERS[number % len(MARKERS)]
        axis.errorbar(steps, mean, bars, marker=marker, markersize=5, capsize=3, **look)
    else:
        steps, mean, error = arm.curve(key, smooth)
        axis.plot(steps, mean, **look)
        low, high = mean - error, mean + error
        axis.fill_between(steps, low, high, color=look["color"], alpha=0.2, linewidth=0)


def _log_with_zero(axis, means: list[np.ndarray]) -> None:
    """A log scale that ends in a linear piece down to 0: many steps clip nothing at all."""
    positive = [value for mean in means for value in mean if value > 0]
    smallest = 10.0 ** math.floor(math.log10(np.quantile(positive, 0.05))) if positive else 1e-3
    axis.set_yscale("symlog", linthresh=smallest, linscale=0.5, subs=range(2, 10))
    axis.set_ylim(0)


def _seeds(n: int) -> str:
    return f"{n} seed{'s' * (n > 1)}"


def _notes(arms: list[Arm], smooth: int) -> str:
    """What lines, bands and bars are."""
    n = [len(arm.runs) for arm in arms]
    notes = [f"lines: mean of the last {smooth} steps (evals as they are)"] * (smooth > 1)
    notes += ["mean over seeds, band and bars ± 1 standard error over seeds"] * (max(n) > 1)
    notes += ["one seed: no band, bars ± 1 standard error over eval problems"] * (min(n) == 1)
    return "\n".join(notes)


def cell(mean: np.ndarray, error: np.ndarray, i: int) -> str:
    """Entry i of a curve in percent, with its standard error where there is one."""
    if not len(mean):
        return "-"
    return f"{100 * mean[i]:.1f}" + ("" if np.isnan(error[i]) else f" ± {100 * error[i]:.1f}")


def table(arms: list[Arm]) -> str:
    """A markdown table: eval accuracy and code frequency of the first and the last eval."""
    lines = ["| arm | seeds | eval accuracy: first | last | code frequency: first | last |",
             "|---|--:|--:|--:|--:|--:|"]  # fmt: skip
    for arm in arms:
        cells = [arm.label, str(len(arm.runs))]
        for key in ("eval_accuracy", "eval_code_frequency"):
            _, mean, error = arm.curve(key)
            cells += [cell(mean, error, 0), cell(mean, error, -1)]
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    lines += ["", "Percent of responses; ± 1 standard error over seeds (one seed: over problems)."]
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    options = [arg for arg in argv if arg.startswith("-") or re.match(r"\w+=", arg)]
    folders = [arg for arg in argv if arg not in options]
    cfg, _ = configure(PlotConfig, options)
    if cfg.smooth < 1:
        raise UserError(f"smooth={cfg.smooth}: must be at least 1")
    if not folders:
        raise UserError("no runs named: python -m tools.plot out/a out/b --out=figure.png")
    arms = load_arms(folders)
    for arm in arms:
        ends = [rows[-1]["step"] for rows in arm.runs]
        for folder, end in zip(arm.folders, ends, strict=True):
            if end < max(ends):
                print(f"note: {folder} ends at step {end}: its arm is drawn up to there")
    draw(arms, cfg.out, cfg.metrics, cfg.smooth)
    print(table(arms))
    print(f"\nfigure: {cfg.out}")


if __name__ == "__main__":
    run(main)
