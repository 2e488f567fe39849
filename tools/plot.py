"""Compare runs: draw one figure and print one table from their metrics.jsonl.

    python -m tools.plot out/a out/b ... --out=figure.png
    python -m tools.plot out/* --metrics=eval_accuracy,kl,length
    python -m tools.plot out/* --metrics=clip_frac,clip_bins,clip_pull

Runs that differ only in their seed are one arm: a line for the mean, a band for its standard error.
Two metrics are made of several keys. clip_bins is the clip fraction by the token's old probability.
clip_pull is what the clip adds to the ascent on the likeliest token (see grpo.clip_pull).
"""

import re
from dataclasses import dataclass

from harness.configurator import configure
from harness.errors import UserError, run
from tools.parts.arms import Arm, load_arms
from tools.parts.panels import DEFAULT_METRICS, draw_metrics
from tools.parts.style import save_figure
from tools.parts.tables import markdown_table, percent


@dataclass
class PlotConfig:
    """Compare runs: python -m tools.plot FOLDER [FOLDER ...] [--key=value]"""

    out: str = "out/figure.png"  # the figure; its suffix chooses the format (png, pdf, svg)
    metrics: tuple[str, ...] = DEFAULT_METRICS  # keys of metrics.jsonl; clip_frac = low + high
    smooth: int = 5  # steps over which lines are averaged; evals are not


def eval_table(arms: list[Arm]) -> str:
    """A markdown table: accuracy and code frequency at the first and the last eval."""
    head = ["arm", "seeds", "eval accuracy: first", "last", "code frequency: first", "last"]
    rows = []
    for arm in arms:
        cells = [arm.label, str(len(arm.runs))]
        for key in ("eval_accuracy", "eval_code_frequency"):
            _, mean, error = arm.curve(key)
            cells += [percent(mean, error, 0), percent(mean, error, -1)]
        rows.append(cells)
    note = "Percent of responses; ± 1 standard error over seeds (one seed: over problems)."
    return f"{markdown_table(head, rows)}\n\n{note}"


def warn_of_shorter_runs(arms: list[Arm]) -> None:
    """Print a note for each run that ends before the longest run of its arm."""
    for arm in arms:
        last_steps = [rows[-1]["step"] for rows in arm.runs]
        for folder, last_step in zip(arm.folders, last_steps, strict=True):
            if last_step < max(last_steps):
                print(f"note: {folder} ends at step {last_step}: its arm is drawn up to there")


def main(argv: list[str]) -> None:
    options = [arg for arg in argv if arg.startswith("-") or re.match(r"\w+=", arg)]
    folders = [arg for arg in argv if arg not in options]
    cfg, _ = configure(PlotConfig, options)
    if cfg.smooth < 1:
        raise UserError(f"smooth={cfg.smooth}: must be at least 1")
    if not folders:
        raise UserError("no runs named: python -m tools.plot out/a out/b --out=figure.png")
    arms = load_arms(folders)
    warn_of_shorter_runs(arms)
    save_figure(draw_metrics(arms, cfg.metrics, cfg.smooth), cfg.out)
    print(eval_table(arms))
    print(f"\nfigure: {cfg.out}")


if __name__ == "__main__":
    run(main)
