"""The papers' figures from run folders, one command each.

    python -m tools.figures rewards out/demo/*-seed?      accuracy by reward over steps
    python -m tools.figures code out/demo/*-seed?         code frequency and accuracy by reward
    python -m tools.figures clip out/clip/*/seed?         the arms of the clip, side by side
    python -m tools.figures gamma out/gamma/*/seed?       random(g): where it ends, by g
    python -m tools.figures transitions out/demo/*-seed?  the gain by habit, a table

What "Spurious Rewards" (arXiv 2506.10947) reports of Qwen2.5-Math-7B on MATH-500 is drawn beside
ours in grey hatched bars and marked as published: no run of ours. Of its clip study it gives no
numbers that could be drawn.
"""

import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

from harness.checkpoint import read_jsonl
from harness.configurator import configure
from harness.errors import UserError, run
from tools.parts.arms import Arm, load_arms
from tools.plot import (
    FEW_SEEDS,
    MARKERS,
    STYLE,
    draw,
    legend,
    look,
    notes,
    panel,
    panels,
    save,
    warn_of_few,
)
from tools.parts.report import t_interval

PUBLISHED = "published, Qwen2.5-Math-7B, not ours"  # arXiv 2506.10947, MATH-500, percent
START = 49.4
GAIN = {"ground truth": 29.1, "majority": 27.1, "one-shot": 26.0, "incorrect": 24.1,
        "random(0.5)": 21.4, "format": 13.8}  # fmt: skip
CODE = {"code frequency, start": 65.0, "code frequency, end": (90.0, 95.6),  # "about 90" to 95.6
        "accuracy with code, start": 60.9, "accuracy without, start": 28.0}  # fmt: skip
CLASSES = {"code to code": 11.6, "code to language": 8.6, "language to code": 58.3,
           "language to language": 21.4}  # share of the gain  # fmt: skip
CLIP_KEYS = ("loss", "clip", "clip_low", "clip_high", "cispo_cap", "updates_per_step")
CLIP_PANELS = ("eval_accuracy", "eval_code_frequency", "entropy", "clip_frac", "clip_bins",
               "clip_pull")  # fmt: skip


@dataclass
class FigureConfig:
    """python -m tools.figures rewards|code|clip|gamma|transitions FOLDER ... [--out=FILE]"""

    out: str = ""  # the figure (png, pdf, svg), or the table of transitions; "" = out/NAME.png, .md


# ---- what is measured


def ends(arm: Arm, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Each run's value of an eval key before training (step 0) and its last, [seeds] twice, in
    percent. Raises UserError for a run without the former."""
    values = []
    for folder, rows in zip(arm.folders, arm.runs, strict=True):
        column = {row["step"]: row[key] for row in rows if row.get(key) is not None}
        if 0 not in column:
            raise UserError(f"{folder}: has no {key} before training (at step 0): this figure "
                            "wants runs with evals (--eval_every)")  # fmt: skip
        values.append((column[0], column[max(column)]))
    first, last = 100 * np.array(values).T
    return first, last


def mean_and_half(values: np.ndarray) -> tuple[float, float]:
    """The mean, and half the width of its 95 % Student t interval over seeds (0 for one seed)."""
    low, high = t_interval(values)
    return float(np.mean(values)), 0.0 if math.isnan(low) else (high - low) / 2


@dataclass
class Transitions:
    """Paired responses by class (habit before and after training): how many, how many of them
    became right and wrong; total gains, one a run, or one a problem where there is one run."""

    n: dict[str, int]
    gained: dict[str, int]
    lost: dict[str, int]
    gains: list[int]

    def share(self, name: str) -> float | None:
        """C_d: the class's part of the total gain; None (undefined) where that is 0."""
        total = sum(self.gains)
        return (self.gained[name] - self.lost[name]) / total + 0.0 if total else None  # no -0.0


def transitions(folders: Sequence[Path]) -> Transitions:
    """Count over the runs of an arm, rows paired by problem and sample: first against last eval.

    C_d = sum over class d of (correct_t - correct_0), over the same over all; d is the habit before
    and after (arXiv 2506.10947). Raises UserError where a folder lacks two evals that pair up.
    """
    n, gained, lost = ({name: 0 for name in CLASSES} for _ in range(3))
    by_problem = []  # a list a run
    for folder in folders:
        files = sorted((folder / "eval").glob("step_*.jsonl"))
        if len(files) < 2 or int(files[0].stem[5:]) != 0:
            raise UserError(f"{folder}: has no eval/step_00000.jsonl with a later one beside it")
        before, after = read_jsonl(files[0]), read_jsonl(files[-1])
        first, last = ([(row["problem"], len(row["correct"])) for row in rows]
                       for rows in (before, after))  # fmt: skip
        if first != last:
            raise UserError(f"{files[-1]}: not the problems and samples of {files[0].name}")
        gains = []
        for one, two in zip(before, after, strict=True):
            gain = np.subtract(two["correct"], one["correct"], dtype=int)  # [k]
            for texts, change in zip(
                zip(one["completions"], two["completions"], strict=True), gain, strict=True
            ):
                name = " to ".join("code" if "python" in t.lower() else "language" for t in texts)
                n[name] += 1
                gained[name] += int(change == 1)
                lost[name] += int(change == -1)
            gains.append(int(gain.sum()))
        by_problem.append(gains)
    totals = [sum(gains) for gains in by_problem]
    return Transitions(n, gained, lost, totals if len(totals) > 1 else by_problem[0])


def transition_table(arms: list[Arm]) -> str:
    """A markdown table of transitions by arm, counts summed over its seeds, and the published."""
    few = any(len(arm.runs) < 3 for arm in arms)
    lines = [f"**{FEW_SEEDS[0].upper()}{FEW_SEEDS[1:]}.**", ""] * few
    lines += ["| arm | seeds | habit | responses | now right | now wrong | part of the gain |",
              "|---|--:|---|--:|--:|--:|--:|"]  # fmt: skip
    warnings = []
    for arm in arms:
        found = transitions(arm.folders)
        start = "| " + arm.label.replace("|", "\\|") + f" | {len(arm.runs)} |"
        for name in CLASSES:
            share = found.share(name)
            shown = "undefined" if share is None else f"{100 * share:.1f} %"
            counts = f"{found.n[name]} | {found.gained[name]} | {found.lost[name]}"
            lines.append(f"{start} {name} | {counts} | {shown} |")
        n, gained, lost = (sum(x.values()) for x in (found.n, found.gained, found.lost))
        points = f"{100 * (gained - lost) / n:+.1f} points"
        lines.append(f"{start} all | {n} | {gained} | {lost} | {points} |")
        low, high = t_interval(found.gains)
        if not (low > 0 or high < 0):  # also where there is no interval
            warnings.append(
                f"warning: {arm.label}: the total gain, {gained - lost:+d} of {n}, is not told "
                "from 0 (95 % Student t interval): its parts mean nothing"
            )
    for name, share in CLASSES.items():
        lines.append(f"| *{PUBLISHED}* | | {name} | | | | {share} % |")
    lines += ["", "Now right and now wrong: was not at the first eval, is at the last; paired by "
              "problem and sample, summed over seeds. Part of the gain: right less wrong in the "
              "class, over the same in all."]  # fmt: skip
    return "\n".join([*lines, *([""] if warnings else []), *warnings])


# ---- the figures


def rewards(arms: list[Arm], out: str) -> None:
    """Accuracy by reward over steps, our gains, and the published gains (2506.10947, figure 1)."""
    figure, axes = panels(1, 3, arms)
    panel(axes[0], arms, "eval_accuracy")
    axes[0].set_xlabel("step")
    differences = [np.subtract(*ends(arm, "eval_accuracy")[::-1]) for arm in arms]
    _bars(axes[1], {a.label: mean_and_half(d) for a, d in zip(arms, differences, strict=True)})
    axes[1].set_title("Gain, ours (points)", fontsize=12)
    _published(axes[2], GAIN, "Gain (points)")
    bars = "gains: last eval less the first, with a 95 % Student t interval over seeds"
    legend(figure, arms, f"{notes(arms, 1)}\n{bars}")
    save(figure, out)


def code(arms: list[Arm], out: str) -> None:
    """Code frequency and accuracy by reward over steps; how they stood before training."""
    figure, axes = panels(2, 2, arms)
    panel(axes[0], arms, "code_frequency")
    panel(axes[1], arms, "eval_accuracy")
    for axis in axes[:2]:
        axis.set_xlabel("step")
    keys = {"code frequency, start": "eval_code_frequency",
            "accuracy with code, start": "eval_accuracy_code",
            "accuracy without, start": "eval_accuracy_language"}  # fmt: skip
    starts = {label: float(np.mean([ends(arm, key)[0].mean() for arm in arms]))
              for label, key in keys.items()}  # fmt: skip
    _bars(axes[2], {label: (value, 0.0) for label, value in starts.items()}, one_colour=True)
    axes[2].set_title("Before training, ours (%)", fontsize=12)
    _published(axes[3], CODE, "MATH-500 (%)")
    for axis in axes[2:]:
        axis.set_xlim(0, 100)
    legend(figure, arms, notes(arms, 5))
    save(figure, out)


def clip(arms: list[Arm], out: str) -> None:
    """The arms of the clip: accuracy, code frequency, and what the clip did."""
    how = {tuple(arm.config[key] for key in CLIP_KEYS) for arm in arms}
    if len(how) < 2:
        same = ", ".join(f"{key}={arms[0].config[key]}" for key in CLIP_KEYS)
        raise UserError(f"all runs have {same}: name runs with another")
    keys = [key for key in CLIP_PANELS if any(arm.has(key) for arm in arms)]
    draw(arms, out, keys)


def gamma(arms: list[Arm], out: str) -> None:
    """Where random(g) ends, by g: accuracy and code frequency with 95 % intervals over seeds."""
    series: dict[str, dict[float, Arm]] = {}
    for arm in arms:
        match = re.fullmatch(r"random(?:\(([\d.eE-]*)\))?", str(arm.config.get("reward")))
        if not match:
            raise UserError(f"{arm.folders[0]}: its reward is {arm.config.get('reward')}, "
                            "not random(g)")  # fmt: skip
        rest = arm.label.partition(", ")[2]
        g = float(match[1] or 0.5)
        twin = series.setdefault(rest, {}).setdefault(g, arm)
        if twin is not arm:
            raise UserError(f"{arm.folders[0]}: {arm.label} is {twin.label} of {twin.folders[0]}, "
                            "written otherwise: name the runs of one")  # fmt: skip
    values = sorted({g for group in series.values() for g in group})
    figure, axes = panels(1, 3, arms)
    for axis, key in zip(axes, ("eval_accuracy", "eval_code_frequency"), strict=False):
        for j, (rest, group) in enumerate(series.items()):
            places = [values.index(g) for g in sorted(group)]
            last = [mean_and_half(ends(group[g], key)[1]) for g in sorted(group)]
            marker = MARKERS[j % len(MARKERS)]
            axis.errorbar(places, *zip(*last, strict=True), **look(j), marker=marker, capsize=3,
                          label=rest or "after training")  # fmt: skip
        start = np.mean([ends(arm, key)[0].mean() for arm in arms])
        axis.axhline(start, color="black", linestyle=":", linewidth=1, label="before training")
        axis.set_xticks(range(len(values)), [f"{g:g}" for g in values])
        axis.set_xlabel("g")
        axis.set_title(
            {"eval_accuracy": "Accuracy (%)"}.get(key, "Code frequency (%)"), fontsize=12
        )
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8, frameon=False)
    _published(
        axes[2], {"start": START, "random(0.5)": START + GAIN["random(0.5)"]}, "Accuracy (%)"
    )
    n = [len(arm.runs) for arm in arms]
    seeds = f"{min(n)}" if min(n) == max(n) else f"{min(n)} to {max(n)}"
    text = f"last eval, mean and 95 % Student t interval over {seeds} seeds"
    figure.supxlabel(text, fontsize=9)
    warn_of_few(figure, arms)
    save(figure, out)


def _bars(axis, values: dict[str, tuple[float, float]], one_colour: bool = False) -> None:
    """Horizontal bars of ours, in the arms' colours, with their intervals."""
    for j, (mean, half) in enumerate(values.values()):
        color = "#444444" if one_colour else look(j)["color"]
        axis.barh(j, mean, xerr=half or None, color=color, height=0.6, capsize=3)
    _rows(axis, {label: f"{mean:.1f}" for label, (mean, _) in values.items()})
    axis.axvline(0, color="black", linewidth=0.8)


def _published(axis, values: dict[str, float | tuple[float, float]], what: str) -> None:
    """Horizontal bars of published figures, told apart from ours by hatching, grey and title.

    A pair of numbers is a range: a bar up to the first, a line on to the second.
    """
    shown = {}
    for j, (label, value) in enumerate(values.items()):
        low, high = value if isinstance(value, tuple) else (value, value)
        axis.barh(j, low, color="white", edgecolor="#888888", hatch="///", height=0.6)
        axis.plot([low, high], [j, j], color="#888888", linewidth=2)
        shown[label] = f"{low:.1f}" if low == high else f"{low:g} to {high:g}"
    _rows(axis, shown)
    axis.set_title(f"{what}\n{PUBLISHED}", fontsize=10, color="#666666", style="italic")


def _rows(axis, shown: dict[str, str]) -> None:
    labels = [f"{textwrap.fill(label, 26)}\n{value}" for label, value in shown.items()]
    axis.set_yticks(range(len(labels)), labels, fontsize=9)
    axis.invert_yaxis()


FIGURES = {"rewards": rewards, "code": code, "clip": clip, "gamma": gamma}


def main(argv: list[str]) -> None:
    options = [arg for arg in argv if arg.startswith("-") or re.match(r"\w+=", arg)]
    cfg, _ = configure(FigureConfig, options)
    name, *folders = [arg for arg in argv if arg not in options] or [""]
    if name not in (*FIGURES, "transitions"):
        raise UserError(f"{name or 'no figure named'}: name one of {', '.join(FIGURES)}, "
                        "transitions, then run folders")  # fmt: skip
    if not folders:
        raise UserError(f"no runs named: python -m tools.figures {name} out/a out/b")
    arms = load_arms(folders)
    if name == "transitions":
        text = transition_table(arms)
        out = Path(cfg.out or "out/transitions.md")
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")
        print(f"{text}\n\ntable: {out}")
        return
    out = cfg.out or f"out/{name}.png"
    with matplotlib.rc_context(STYLE):
        FIGURES[name](arms, out)
    print(f"figure: {out}")


if __name__ == "__main__":
    run(main)
