"""Figures of arms: one panel per metric, and a legend below them."""

import difflib
import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from harness.errors import UserError
from tools.parts.arms import Arm
from tools.parts.style import FIGURE_STYLE, MARKERS, WIDTH, arm_styles
from tools.parts.tables import FEW_SEEDS

DEFAULT_METRICS = (
    "eval_accuracy",
    "accuracy",
    "code_frequency",
    "reward",
    "clip_frac",
    "entropy",
)
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
# Two panels are not a single key of metrics.jsonl. Each shows both sides of the clip.
CLIP_SIDES = {"high": "-", "low": "--"}
SIDE_NAMES = {"high": "clipped from above", "low": "from below"}
MOST_ARMS = 8  # a panel with more lines is hard to read
TITLE_SIZE = 12


def draw_metrics(
    arms: list[Arm], metrics: Sequence[str] = DEFAULT_METRICS, smooth: int = 5
) -> Figure:
    """A figure with one panel per metric, 1600 pixels wide.

    Leaves out default metrics that no run logged (a run may have no evals). Raises UserError for
    any other metric without values.
    """
    if tuple(metrics) == DEFAULT_METRICS:
        metrics = [key for key in metrics if has_values(arms, key)]
    check_metrics(arms, metrics)
    columns = {1: 1, 2: 2, 4: 2}.get(len(metrics), 3)
    figure, axes = empty_panels(math.ceil(len(metrics) / columns), columns, arms)
    with matplotlib.rc_context(FIGURE_STYLE):
        for axis in axes[len(metrics) :]:
            axis.remove()
        for i, key in enumerate(metrics):
            draw_panel(axes[i], arms, key, smooth)
            in_last_row = i + columns >= len(metrics)
            if in_last_row and key != "clip_bins":
                axes[i].set_xlabel("step")
        notes = line_notes(arms, smooth)
        if "clip_pull" in metrics:
            notes.append("clip pull: per token, weighted as loss_agg=token_mean does")
        add_legend(figure, arms, notes)
    return figure


def has_values(arms: list[Arm], key: str) -> bool:
    """Whether some arm has values for the panel with this name."""
    if key == "clip_bins":
        return any(arm.by_bin("clip_high_bins").size > 0 for arm in arms)
    column = "clip_pull_high" if key == "clip_pull" else key
    return any(len(arm.curve(column)[0]) > 0 for arm in arms)


def check_metrics(arms: list[Arm], metrics: Sequence[str]) -> None:
    """Raise UserError if there is no metric, or one without values."""
    if not metrics:
        raise UserError("--metrics: nothing to draw: name one or more keys of metrics.jsonl")
    for key in metrics:
        if has_values(arms, key):
            continue
        known = sorted({k for arm in arms for rows in arm.runs for row in rows for k in row})
        if key in (*known, "clip_bins", "clip_pull"):
            raise UserError(f"--metrics: {key}: has no values in these runs")
        near = difflib.get_close_matches(key, known, 3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there is {', '.join(known)}"
        raise UserError(f"--metrics: {key}: no such metric: {hint}")


def empty_panels(rows: int, columns: int, arms: list[Arm]) -> tuple[Figure, np.ndarray]:
    """A figure with space for a legend of `arms` below, and its axes [rows * columns]."""
    height = 3.1 * rows + 0.8 + 0.25 * math.ceil(len(arms) / _legend_columns(arms))
    with matplotlib.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False).flatten()


# ---- one panel


def draw_panel(axis: Axes, arms: list[Arm], key: str, smooth: int = 5) -> None:
    """Draw one metric of all arms: over steps, or over the old probability for clip_bins."""
    axis.set_title(TITLES.get(key, key), fontsize=TITLE_SIZE)
    axis.grid(alpha=0.25)
    if key == "clip_bins":
        _draw_bins(axis, arms)
        return
    for j, (arm, style) in enumerate(zip(arms, arm_styles(arms), strict=True)):
        if key.startswith("eval_"):
            _draw_eval(axis, arm, key, style, MARKERS[j % len(MARKERS)])
        elif key == "clip_pull":
            for side, line in CLIP_SIDES.items():
                _draw_line(axis, arm, f"clip_pull_{side}", smooth, {**style, "linestyle": line})
        else:
            _draw_line(axis, arm, key, smooth, style)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if key == "clip_pull":
        axis.axhline(0, color="black", linewidth=0.8)
        axis.ticklabel_format(axis="y", scilimits=(-2, 3))
        _add_side_legend(axis)
    if key.startswith("clip_frac"):
        _set_log_scale(axis, [arm.curve(key, smooth)[1] for arm in arms])


def _draw_eval(axis: Axes, arm: Arm, key: str, style: dict, marker: str) -> None:
    """A metric of the evals: points with error bars."""
    steps, mean, error = arm.curve(key)
    bars = None if np.isnan(error).all() else error
    shape = {"marker": marker, "markersize": 5, "capsize": 3, "linewidth": 1.8}
    axis.errorbar(steps, mean, bars, **shape, **style)


def _draw_line(axis: Axes, arm: Arm, key: str, smooth: int, style: dict) -> None:
    """A metric logged every step: a line with a band."""
    steps, mean, error = arm.curve(key, smooth)
    axis.plot(steps, mean, linewidth=1.8, **style)
    band = {"color": style["color"], "alpha": 0.2, "linewidth": 0}
    axis.fill_between(steps, mean - error, mean + error, **band)


def _draw_bins(axis: Axes, arms: list[Arm]) -> None:
    """Fraction of tokens clipped from above (solid) and below (dashed), by old probability."""
    means = []
    for arm, style in zip(arms, arm_styles(arms), strict=True):
        for side, line in CLIP_SIDES.items():
            values = arm.by_bin(f"clip_{side}_bins")  # [seeds, bins]
            if not values.size:
                continue
            edges = np.linspace(0, 1, values.shape[1] + 1)
            seen = np.ma.masked_invalid(values)  # a seed may have had no token in a bin
            mean = seen.mean(0).filled(np.nan)
            shape = {"color": style["color"], "linestyle": line, "linewidth": 1.8}
            axis.stairs(mean, edges, baseline=None, **shape)
            if len(values) > 1:
                error = (seen.std(0, ddof=1) / np.sqrt(seen.count(0))).filled(np.nan)
                middle = (edges[1:] + edges[:-1]) / 2
                axis.errorbar(middle, mean, error, fmt="none", ecolor=style["color"])
            means.append(mean)
    _draw_upper_bounds(axis, arms)
    _set_log_scale(axis, means)
    axis.set_xlim(0, 1)
    axis.set_xlabel("old probability of the token")
    _add_side_legend(axis)


def _draw_upper_bounds(axis: Axes, arms: list[Arm]) -> None:
    """A line at 1 / (1 + clip_high), for arms that clip the ratio of a token from above.

    A ratio is at most 1 / p, so a token to the right of the line is never clipped from above.
    """
    bounds = set()
    for config in (arm.config for arm in arms):
        clips_above = config.get("clip") in ("both", "high")
        token_ratio = config.get("loss", "grpo") == "grpo"
        if clips_above and token_ratio and "clip_high" in config:
            bounds.add(config["clip_high"])
    text = {"ha": "right", "va": "top", "fontsize": 9, "rotation": 90}
    for clip_high in sorted(bounds):
        x = 1 / (1 + clip_high)
        axis.axvline(x, color="black", linewidth=0.8, linestyle=":")
        place = axis.get_xaxis_transform()
        axis.text(x, 1.0, f"1/(1+{clip_high:g})", transform=place, **text)


def _add_side_legend(axis: Axes) -> None:
    for side, line in CLIP_SIDES.items():
        axis.plot([], [], color="grey", linestyle=line, label=SIDE_NAMES[side])
    axis.legend(fontsize=8, framealpha=0.8, edgecolor="none")


def _set_log_scale(axis: Axes, means: list[np.ndarray]) -> None:
    """A log scale with a linear piece down to 0, because many steps clip nothing."""
    positive = [value for mean in means for value in mean if value > 0]
    smallest = 10.0 ** math.floor(math.log10(np.quantile(positive, 0.05))) if positive else 1e-3
    axis.set_yscale("symlog", linthresh=smallest, linscale=0.5, subs=range(2, 10))
    axis.set_ylim(0)


# ---- below the panels


def line_notes(arms: list[Arm], smooth: int) -> list[str]:
    """What the lines, bands and bars are, one note per line."""
    seeds = [len(arm.runs) for arm in arms]
    notes = []
    if smooth > 1:
        notes.append(f"lines: mean of the last {smooth} steps (evals as they are)")
    if max(seeds) > 1:
        notes.append("mean over seeds, band and bars ± 1 standard error over seeds")
    if min(seeds) == 1:
        notes.append("one seed: no band, bars ± 1 standard error over eval problems")
    return notes


def add_legend(figure: Figure, arms: list[Arm], notes: list[str]) -> None:
    """The names of the arms below a figure, under the notes."""
    handles = [Line2D([], [], linewidth=3, **style) for style in arm_styles(arms)]
    labels = [_legend_label(arm) for arm in arms]
    title = {"title": "\n".join(notes), "title_fontsize": 9}
    place = {"loc": "outside lower center", "ncols": _legend_columns(arms), "frameon": False}
    figure.legend(handles, labels, **place, **title)
    mark_few_seeds(figure, arms)


def mark_few_seeds(figure: Figure, arms: list[Arm]) -> None:
    """Say at the top of a figure that an arm has too few seeds for a conclusion."""
    if min(len(arm.runs) for arm in arms) < 3:
        figure.suptitle(FEW_SEEDS, color="#B00000", fontsize=13, fontweight="bold")


def _legend_label(arm: Arm) -> str:
    n = len(arm.runs)
    return f"{arm.label} ({n} seed{'' if n == 1 else 's'})"


def _legend_columns(arms: list[Arm]) -> int:
    longest = max(len(_legend_label(arm)) for arm in arms)
    return max(1, min(len(arms), 115 // (longest + 6)))
