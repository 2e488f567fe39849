"""Draw the figures of the papers from run folders, one command each.

    python -m tools.figures rewards out/demo/*-seed?      accuracy by reward over steps
    python -m tools.figures code out/demo/*-seed?         code frequency and accuracy by reward
    python -m tools.figures clip out/clip/*/seed?         arms with different clips, side by side
    python -m tools.figures gamma out/gamma/*/seed?       accuracy after training on random(g), by g
    python -m tools.figures transitions out/demo/*-seed?  a table: the gain by habit

What "Spurious Rewards" (arXiv 2506.10947) reports of Qwen2.5-Math-7B on MATH-500 is drawn beside
ours, in grey hatched bars marked as published. The paper gives no numbers for its clip study, so
nothing published stands beside that figure.
"""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.configurator import configure
from harness.errors import UserError, run
from tools.parts.arms import Arm, load_arms
from tools.parts.intervals import mean_and_half_width
from tools.parts.panels import (
    TITLE_SIZE,
    add_legend,
    draw_metrics,
    draw_panel,
    empty_panels,
    has_values,
    line_notes,
    mark_few_seeds,
)
from tools.parts.published import CODE, GAIN, PUBLISHED, START
from tools.parts.style import FIGURE_STYLE, MARKERS, arm_styles, save_figure, series_style
from tools.parts.tables import save_text
from tools.parts.transitions import transition_table

CLIP_KEYS = ("loss", "clip", "clip_low", "clip_high", "cispo_cap", "updates_per_step")
CLIP_METRICS = (
    "eval_accuracy",
    "eval_code_frequency",
    "entropy",
    "clip_frac",
    "clip_bins",
    "clip_pull",
)
RANDOM_REWARD = re.compile(r"random(?:\(([\d.eE-]*)\))?")
GREY = "#444444"


@dataclass
class FigureConfig:
    """python -m tools.figures rewards|code|clip|gamma|transitions FOLDER ... [--out=FILE]"""

    out: str = ""  # the figure (png, pdf, svg), or the table of transitions; "" = out/NAME.png, .md


def first_and_last(arm: Arm, key: str) -> tuple[np.ndarray, np.ndarray]:
    """An eval metric in percent before training (step 0) and at the last eval, [seeds] each.

    Raises UserError for a run that has no value at step 0.
    """
    values = []
    for folder, rows in zip(arm.folders, arm.runs, strict=True):
        column = {row["step"]: row[key] for row in rows if row.get(key) is not None}
        if 0 not in column:
            raise UserError(
                f"{folder}: has no {key} before training (at step 0): this figure needs runs "
                "with evals (--eval_every)"
            )
        values.append((column[0], column[max(column)]))
    first, last = 100 * np.array(values).T
    return first, last


# ---- the figures


def rewards_figure(arms: list[Arm]) -> Figure:
    """Accuracy by reward over steps, our gains, and the published gains (2506.10947, figure 1)."""
    figure, axes = empty_panels(1, 3, arms)
    draw_panel(axes[0], arms, "eval_accuracy")
    axes[0].set_xlabel("step")
    gains = {}
    for arm in arms:
        first, last = first_and_last(arm, "eval_accuracy")
        gains[arm.label] = mean_and_half_width(last - first)
    _draw_bars(axes[1], gains, [style["color"] for style in arm_styles(arms)])
    axes[1].set_title("Gain, ours (points)", fontsize=TITLE_SIZE)
    _draw_published(axes[2], GAIN, "Gain (points)")
    bars = "gains: last eval less the first, with a 95 % Student t interval over seeds"
    add_legend(figure, arms, [*line_notes(arms, smooth=1), bars])
    return figure


def code_figure(arms: list[Arm]) -> Figure:
    """Code frequency and accuracy by reward over steps, and both before training."""
    figure, axes = empty_panels(2, 2, arms)
    draw_panel(axes[0], arms, "code_frequency")
    draw_panel(axes[1], arms, "eval_accuracy")
    for axis in axes[:2]:
        axis.set_xlabel("step")
    keys = {
        "code frequency, start": "eval_code_frequency",
        "accuracy with code, start": "eval_accuracy_code",
        "accuracy without, start": "eval_accuracy_language",
    }
    before = {}
    for label, key in keys.items():
        mean = np.mean([first_and_last(arm, key)[0].mean() for arm in arms])
        before[label] = (float(mean), 0.0)
    _draw_bars(axes[2], before, [GREY] * len(before))
    axes[2].set_title("Before training, ours (%)", fontsize=TITLE_SIZE)
    _draw_published(axes[3], CODE, "MATH-500 (%)")
    for axis in axes[2:]:
        axis.set_xlim(0, 100)
    add_legend(figure, arms, line_notes(arms, smooth=5))
    return figure


def clip_figure(arms: list[Arm]) -> Figure:
    """Arms with different clips: accuracy, code frequency, and what the clip did."""
    clips = {tuple(arm.config[key] for key in CLIP_KEYS) for arm in arms}
    if len(clips) < 2:
        same = ", ".join(f"{key}={arms[0].config[key]}" for key in CLIP_KEYS)
        raise UserError(f"all runs have {same}: name runs with another")
    return draw_metrics(arms, [key for key in CLIP_METRICS if has_values(arms, key)])


def gamma_figure(arms: list[Arm]) -> Figure:
    """Accuracy and code frequency after training on random(g), by g, with 95 % intervals."""
    series = arms_by_gamma(arms)
    figure, axes = empty_panels(1, 3, arms)
    _draw_by_gamma(axes[0], series, "eval_accuracy", "Accuracy (%)")
    _draw_by_gamma(axes[1], series, "eval_code_frequency", "Code frequency (%)")
    published = {"start": START, "random(0.5)": START + GAIN["random(0.5)"]}
    _draw_published(axes[2], published, "Accuracy (%)")
    seeds = [len(arm.runs) for arm in arms]
    count = f"{min(seeds)}" if min(seeds) == max(seeds) else f"{min(seeds)} to {max(seeds)}"
    note = f"last eval, mean and 95 % Student t interval over {count} seeds"
    figure.supxlabel(note, fontsize=9)
    mark_few_seeds(figure, arms)
    return figure


def arms_by_gamma(arms: list[Arm]) -> dict[str, dict[float, Arm]]:
    """Arms trained on random(g), grouped by their other settings: settings -> g -> arm.

    Raises UserError for another reward, and for two arms with the same g and settings.
    """
    series: dict[str, dict[float, Arm]] = {}
    for arm in arms:
        reward = str(arm.config.get("reward"))
        match = RANDOM_REWARD.fullmatch(reward)
        if not match:
            raise UserError(f"{arm.folders[0]}: its reward is {reward}, not random(g)")
        settings = arm.label.partition(", ")[2]  # the label without the reward
        g = float(match[1] or 0.5)
        twin = series.setdefault(settings, {}).setdefault(g, arm)
        if twin is not arm:
            raise UserError(
                f"{arm.folders[0]}: {arm.label} and {twin.label} of {twin.folders[0]} are the "
                "same reward: name the runs of one"
            )
    return series


# ---- the panels


def _draw_by_gamma(axis: Axes, series: dict[str, dict[float, Arm]], key: str, title: str) -> None:
    """An eval metric after training against g, one line per series."""
    values = sorted({g for by_g in series.values() for g in by_g})
    for j, (settings, by_g) in enumerate(series.items()):
        places = [values.index(g) for g in sorted(by_g)]
        last = [mean_and_half_width(first_and_last(by_g[g], key)[1]) for g in sorted(by_g)]
        means, halves = zip(*last, strict=True)
        shape = {"marker": MARKERS[j % len(MARKERS)], "capsize": 3, **series_style(j)}
        axis.errorbar(places, means, halves, label=settings or "after training", **shape)
    arms = [arm for by_g in series.values() for arm in by_g.values()]
    start = np.mean([first_and_last(arm, key)[0].mean() for arm in arms])
    axis.axhline(start, color="black", linestyle=":", linewidth=1, label="before training")
    axis.set_xticks(range(len(values)), [f"{g:g}" for g in values])
    axis.set_xlabel("g")
    axis.set_title(title, fontsize=TITLE_SIZE)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, frameon=False)


def _draw_bars(axis: Axes, values: dict[str, tuple[float, float]], colours: list[str]) -> None:
    """Horizontal bars of our figures: label -> (mean, half width of the interval or 0)."""
    for j, (mean, half) in enumerate(values.values()):
        axis.barh(j, mean, xerr=half or None, color=colours[j], height=0.6, capsize=3)
    _label_bars(axis, {label: f"{mean:.1f}" for label, (mean, _) in values.items()})
    axis.axvline(0, color="black", linewidth=0.8)


def _draw_published(axis: Axes, values: dict[str, float | tuple[float, float]], what: str) -> None:
    """Horizontal bars of published figures, hatched in grey so that nobody takes them for ours.

    A pair of numbers is a range: a bar up to the first, and a line on to the second.
    """
    shown = {}
    for j, (label, value) in enumerate(values.items()):
        low, high = value if isinstance(value, tuple) else (value, value)
        axis.barh(j, low, color="white", edgecolor="#888888", hatch="///", height=0.6)
        axis.plot([low, high], [j, j], color="#888888", linewidth=2)
        shown[label] = f"{low:.1f}" if low == high else f"{low:g} to {high:g}"
    _label_bars(axis, shown)
    axis.set_title(f"{what}\n{PUBLISHED}", fontsize=10, color="#666666", style="italic")


def _label_bars(axis: Axes, shown: dict[str, str]) -> None:
    labels = [f"{textwrap.fill(label, 26)}\n{value}" for label, value in shown.items()]
    axis.set_yticks(range(len(labels)), labels, fontsize=9)
    axis.invert_yaxis()


# ---- the command


FIGURES = {
    "rewards": rewards_figure,
    "code": code_figure,
    "clip": clip_figure,
    "gamma": gamma_figure,
}


def main(argv: list[str]) -> None:
    options = [arg for arg in argv if arg.startswith("-") or re.match(r"\w+=", arg)]
    cfg, _ = configure(FigureConfig, options)
    name, *folders = [arg for arg in argv if arg not in options] or [""]
    if name not in (*FIGURES, "transitions"):
        known = ", ".join([*FIGURES, "transitions"])
        raise UserError(f"{name or 'no figure named'}: name one of {known}, then run folders")
    if not folders:
        raise UserError(f"no runs named: python -m tools.figures {name} out/a out/b")
    arms = load_arms(folders)
    if name == "transitions":
        text = transition_table(arms)
        out = Path(cfg.out or "out/transitions.md")
        save_text(text, out)
        print(f"{text}\n\ntable: {out}")
        return
    out = Path(cfg.out or f"out/{name}.png")
    with matplotlib.rc_context(FIGURE_STYLE):
        figure = FIGURES[name](arms)
    save_figure(figure, out)
    print(f"figure: {out}")


if __name__ == "__main__":
    run(main)
