"""Compare runs: one figure and one table from their metrics.jsonl.

    python -m tools.plot out/a out/b ... --out=figure.png
    python -m tools.plot out/* --metrics=eval_accuracy,kl,length
    python -m tools.plot out/* --metrics=clip_frac,clip_bins,clip_pull

Runs that differ only in their seed are one arm: a line for the mean, a band for its standard error.
Two panels are made of several keys: clip_bins, the clip fraction by the token's old probability,
and clip_pull, what the clip adds to the ascent on the likeliest token (grpo.clip_pull).
"""

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from harness.configurator import configure
from harness.errors import UserError, run
from tools.parts.arms import Arm, load_arms

PANELS = ("eval_accuracy", "accuracy", "code_frequency", "reward", "clip_frac", "entropy")
TITLES = {
    "eval_accuracy": "Eval accuracy",
    "eval_code_frequency": "Eval code frequency",
    "accuracy": "Rollout accuracy",
    "code_frequency": "Code frequency",
    "reward": "Reward",
    "clip_frac": "Clip fraction, low + high",
    "entropy": "Entropy (nats a token)",
    "boxed": "Boxed share",
    "kl": "KL to the base (nats a token)",
    "length": "Response length (tokens)",
    "clip_bins": "Clip fraction by old probability",
    "clip_pull": "Clip pull (> 0: to the likeliest token)",
}
# Okabe and Ito's colours, told apart with any colour vision; the yellow is too pale for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX"
STYLES = ("-", "--", ":")
SIDES = {"high": "-", "low": "--"}  # of the clip, in the panels that show both
STYLE = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
MOST_ARMS = 8  # more lines in a panel are not told apart
FEW_SEEDS = "fewer than 3 seeds: no conclusion"


@dataclass
class PlotConfig:
    """Compare runs: python -m tools.plot FOLDER [FOLDER ...] [--key=value]"""

    out: str = "out/figure.png"  # the figure; its suffix chooses the format (png, pdf, svg)
    metrics: tuple[str, ...] = PANELS  # panels, by key of metrics.jsonl; clip_frac = low + high
    smooth: int = 5  # steps: lines show the mean of the last so many; evals are as they are


# ---- figure and table


def draw(
    arms: list[Arm], path: Path | str, metrics: Sequence[str] = PANELS, smooth: int = 5
) -> Figure:
    """Save a figure with a panel a metric, 1600 pixels wide. Raises UserError for an unknown one.

    Of the default panels those without data are left out (a run may have no evals).
    """
    has = {key: any(arm.has(key) for arm in arms) for key in metrics}
    if tuple(metrics) == PANELS:
        metrics = [key for key in metrics if has[key]]
    for key in metrics:
        if not has[key]:
            known = sorted({k for arm in arms for rows in arm.runs for row in rows for k in row})
            near = difflib.get_close_matches(key, known, 3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there is {', '.join(known)}"
            there = key in (*known, "clip_bins", "clip_pull")
            what = "has no values in these runs" if there else f"no such metric: {hint}"
            raise UserError(f"--metrics: {key}: {what}")
    if not metrics:
        raise UserError("--metrics: nothing to draw: name one or more keys of metrics.jsonl")
    columns = {1: 1, 2: 2, 4: 2}.get(len(metrics), 3)
    figure, axes = panels(math.ceil(len(metrics) / columns), columns, arms)
    with matplotlib.rc_context(STYLE):
        for axis in axes[len(metrics) :]:
            axis.remove()
        for i, (axis, key) in enumerate(zip(axes, metrics, strict=False)):
            panel(axis, arms, key, smooth)
            if i + columns >= len(metrics) and key != "clip_bins":
                axis.set_xlabel("step")
        per_token = ["clip pull: per token, as loss_agg=token_mean weighs them"]
        text = [notes(arms, smooth), *per_token * ("clip_pull" in metrics)]
        legend(figure, arms, "\n".join(filter(None, text)))
        save(figure, path)
    return figure


def panels(rows: int, columns: int, arms: list[Arm]) -> tuple[Figure, np.ndarray]:
    """An empty figure with room for a legend below, and its axes [rows * columns]."""
    height = 3.1 * rows + 0.8 + 0.25 * math.ceil(len(arms) / _legend_columns(arms))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(32 / 3, height), layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False).flatten()


def panel(axis, arms: list[Arm], key: str, smooth: int = 5) -> None:
    """One metric of all arms over steps (clip_bins: over the old probability)."""
    axis.set_title(TITLES.get(key, key), fontsize=12)
    axis.grid(alpha=0.25)
    if key == "clip_bins":
        _bins(axis, arms)
        return
    for j, arm in enumerate(arms):
        if key == "clip_pull":
            for side, style in SIDES.items():
                _line(axis, arm, f"clip_pull_{side}", smooth, {**look(j), "linestyle": style})
        else:
            _line(axis, arm, key, smooth, look(j), MARKERS[j % len(MARKERS)])
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if key == "clip_pull":
        axis.axhline(0, color="black", linewidth=0.8)
        axis.ticklabel_format(axis="y", scilimits=(-2, 3))
        _sides(axis)
    if key.startswith("clip_frac"):
        _log_with_zero(axis, [arm.curve(key, smooth)[1] for arm in arms])


def _bins(axis, arms: list[Arm]) -> None:
    """Clip fraction above (solid) and below (dashed) by bin of the token's old probability."""
    means = []
    for j, arm in enumerate(arms):
        for side, style in SIDES.items():
            values = arm.by_bin(f"clip_{side}_bins")  # [seeds, bins]
            if not values.size:
                continue
            edges = np.linspace(0, 1, values.shape[1] + 1)
            seen = np.ma.masked_invalid(values)  # a seed may have had no token in a bin
            means.append(seen.mean(0).filled(np.nan))
            shape = {**look(j), "linestyle": style, "linewidth": 1.8}
            axis.stairs(means[-1], edges, baseline=None, **shape)
            if len(values) > 1:
                error = (seen.std(0, ddof=1) / np.sqrt(seen.count(0))).filled(np.nan)
                middle = (edges[1:] + edges[:-1]) / 2
                axis.errorbar(middle, means[-1], error, fmt="none", ecolor=shape["color"])
    # a ratio has no room above 1 / p, so no token beyond these lines can be clipped from above
    clipping = [arm.config for arm in arms if arm.config.get("clip") in ("both", "high")]
    token_ratio = [config for config in clipping if config.get("loss", "grpo") == "grpo"]
    for e in sorted({config["clip_high"] for config in token_ratio if "clip_high" in config}):
        axis.axvline(1 / (1 + e), color="black", linewidth=0.8, linestyle=":")
        axis.text(1 / (1 + e), 1.0, f"1/(1+{e:g})", ha="right", va="top", fontsize=9,
                  rotation=90, transform=axis.get_xaxis_transform())  # fmt: skip
    _log_with_zero(axis, means)
    axis.set_xlim(0, 1)
    axis.set_xlabel("old probability of the token")
    _sides(axis)


def _sides(axis) -> None:
    for side, style in SIDES.items():
        name = {"high": "clipped from above", "low": "from below"}[side]
        axis.plot([], [], color="grey", linestyle=style, label=name)
    axis.legend(fontsize=8, framealpha=0.8, edgecolor="none")


def legend(figure: Figure, arms: list[Arm], title: str) -> None:
    """The arms' names below a figure, under what it says of lines and bands."""
    labels = [f"{arm.label} ({_seeds(len(arm.runs))})" for arm in arms]
    handles = [Line2D([], [], **look(j), linewidth=3) for j in range(len(arms))]
    place = {"loc": "outside lower center", "ncols": _legend_columns(arms), "frameon": False}
    figure.legend(handles, labels, **place, title=title, title_fontsize=9)
    warn_of_few(figure, arms)


def warn_of_few(figure: Figure, arms: list[Arm]) -> None:
    """Say on a figure's face where an arm has too few seeds for a conclusion."""
    if min(len(arm.runs) for arm in arms) < 3:
        figure.suptitle(FEW_SEEDS, color="#B00000", fontsize=13, fontweight="bold")


def _legend_columns(arms: list[Arm]) -> int:
    longest = max(len(f"{arm.label} ({_seeds(len(arm.runs))})") for arm in arms)
    return max(1, min(len(arms), 115 // (longest + 6)))


def save(figure: Figure, path: Path | str) -> None:
    """Write a figure; its suffix chooses the format. Raises UserError where that is impossible."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"--out={path}: cannot be written: {error}") from error


def look(number: int) -> dict:
    """Colour and line style of the arm of this number."""
    n = len(COLOURS)
    return {"color": COLOURS[number % n], "linestyle": STYLES[number // n % len(STYLES)]}


def _line(axis, arm: Arm, key: str, smooth: int, style: dict, marker: str = "") -> None:
    """One arm in one panel: evals as points with bars, what is logged every step with a band."""
    style = {**style, "linewidth": 1.8}
    if key.startswith("eval_"):
        steps, mean, error = arm.curve(key)
        bars = None if np.isnan(error).all() else error
        axis.errorbar(steps, mean, bars, marker=marker, markersize=5, capsize=3, **style)
    else:
        steps, mean, error = arm.curve(key, smooth)
        axis.plot(steps, mean, **style)
        low, high = mean - error, mean + error
        axis.fill_between(steps, low, high, color=style["color"], alpha=0.2, linewidth=0)


def _log_with_zero(axis, means: list[np.ndarray]) -> None:
    """A log scale that ends in a linear piece down to 0: many steps clip nothing at all."""
    positive = [value for mean in means for value in mean if value > 0]
    smallest = 10.0 ** math.floor(math.log10(np.quantile(positive, 0.05))) if positive else 1e-3
    axis.set_yscale("symlog", linthresh=smallest, linscale=0.5, subs=range(2, 10))
    axis.set_ylim(0)


def _seeds(n: int) -> str:
    return f"{n} seed{'s' * (n > 1)}"


def notes(arms: list[Arm], smooth: int) -> str:
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
