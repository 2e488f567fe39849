"""The tables and the figure of tools.clip_bias, from the dict that it prints as JSON."""

import math
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import binomtest

from tools.parts.style import BLACK, COLOURS, FIGURE_STYLE, MARKERS, WIDTH, save_figure
from tools.parts.tables import markdown_table, save_text

Z = 1.96  # half width of a 95 % interval in standard errors


def mean_se(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean over the last dimension, the contexts, and its standard error."""
    return x.mean(-1), x.std(-1) / math.sqrt(x.shape[-1])


def write_clip_bias(result: dict, folder: Path) -> None:
    """Print the tables, and save them and the figure: table.md, clip_bias.png."""
    text = clip_bias_tables(result)
    table, figure = folder / "table.md", folder / "clip_bias.png"
    save_text(text, table)
    save_figure(draw_clip_bias(result), figure)
    print(f"{text}\n\ntable: {table}\nfigure: {figure}")


def clip_bias_tables(result: dict) -> str:
    """Three parts in markdown: the measures by step size, the two habits, appendix B."""
    heading = (
        f"{result['contexts']} contexts of {result['vocab']} tokens, {result['steps']} steps, "
        f"rewards Bernoulli({result['rate']:g}); by step size: mean ± standard error"
    )
    measures = [measure_table(result, i, digits) for i, digits in enumerate((3, 3, 4))]
    return "\n\n".join([heading, *measures, habit_table(result), formula_table(result)])


def measure_table(result: dict, i: int, digits: int) -> str:
    """The i-th measure of every arm by step size. The first also says what was published."""
    head = [f"{result['measures'][i]}, start {result['begin'][i]:.3f}"]
    head += [f"{size:g}" for size in result["step_sizes"]]
    rows = []
    for arm in result["arms"]:
        mean, se = result["mean_and_se"]["table"][arm["label"]]
        cells = [f"{m:.{digits}f} ± {s:.{digits}f}" for m, s in zip(mean[i], se[i], strict=True)]
        rows.append([arm["label"], *cells])
    if i == 0:
        head.append("published")
        for row, arm in zip(rows, result["arms"], strict=True):
            row.append(arm["published"])
    return markdown_table(head, rows)


def habit_table(result: dict) -> str:
    """The first habit's mean probability, and how often it won (Wilson's interval, 1927)."""
    n = result["habit_contexts"]
    rows = []
    for label, won in result["above_half"].items():
        mean, se = (x[0][0] for x in result["mean_and_se"]["habits"][label])
        low, high = binomtest(won, n).proportion_ci(method="wilson")
        probability = f"{mean:.3f} ± {Z * se:.3f}"
        rows.append([label, probability, f"{won / n:.3f} ({low:.3f} to {high:.3f})"])
    head = [
        "arm",
        f"mean probability of the first, start {result['habit_top']:g}",
        "chance that the first ends above 1/2",
    ]
    heading = (
        f"Two habits: {n} contexts, {result['habit_steps']} steps, step size "
        f"{result['habit_step_size']:g}; 95 % intervals"
    )
    return f"{heading}\n\n{markdown_table(head, rows)}"


def formula_table(result: dict) -> str:
    """Appendix B's mean gradient on the first token's logit, calculated and measured."""
    rows = []
    for row in result["appendix_b"]:
        exact, measured, half = row["formula"], row["measured"], Z * row["se"]
        relative = "-"
        if exact:
            relative = f"{100 * (measured / exact - 1):+.1f} ± {100 * half / abs(exact):.1f} %"
        numbers = [f"{exact:+.5f}", f"{measured:+.5f} ± {half:.5f}", relative]
        rows.append([row["case"], row["arm"], *numbers, f"{row['clip_frac']:.4f}"])
    head = ["case", "arm", "formula", "measured", "relative error", "clip fraction"]
    actions = result["contexts"] * result["rounds"] * result["samples"]
    heading = (
        f"Appendix B: gradient on the first token's logit, {actions} actions, "
        f"mu = {result['mu']:.6f}; 95 % intervals"
    )
    edge = 1 + result["clip_high"]
    note = (
        "q -> p: two tokens; the first is drawn with probability q and now has probability p. With "
        f"q above {1 / edge:.3f} it is never clipped from above; with q = .02 it is pushed down if "
        f"p is above {0.02 * edge:.3f}."
    )
    return f"{heading}\n\n{markdown_table(head, rows)}\n\n{note}"


def draw_clip_bias(result: dict) -> Figure:
    """The top token's probability and the entropy of every arm against the step size."""
    with matplotlib.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(WIDTH, 6.2), layout="constrained")
        axes = figure.subplots(1, 2)
        for i, axis in enumerate(axes):
            _draw_measure(axis, result, i)
        title = (
            f"Random rewards on a softmax table, after {result['steps']} steps: mean of "
            f"{result['contexts']} contexts, 95 % intervals"
        )
        figure.suptitle(title, fontsize=13)
        place = {"loc": "outside lower center", "ncols": 2, "frameon": False, "fontsize": 9}
        figure.legend(*axes[0].get_legend_handles_labels(), **place)
    return figure


def _draw_measure(axis: Axes, result: dict, i: int) -> None:
    sizes = result["step_sizes"]
    shown = [arm for arm in result["arms"] if arm["scale"]]  # without the null of step size 0
    axis.axhline(result["begin"][i], color="grey", linestyle=":", label="start")
    for j, arm in enumerate(shown):
        mean, se = (x[i] for x in result["mean_and_se"]["table"][arm["label"]])
        shift = 0.07 * (j - (len(shown) - 1) / 2)  # beside each other, so that bars do not overlap
        x = [place + shift for place in range(len(sizes))]
        bars = [Z * s for s in se]
        axis.errorbar(x, mean, bars, label=_legend_label(arm), **_arm_style(arm, j))
    axis.set_title(result["measures"][i], fontsize=12)
    axis.set_xlabel("step size of SGD")
    axis.set_xticks(range(len(sizes)), [f"{size:g}" for size in sizes])
    axis.grid(alpha=0.25, axis="y")


def _legend_label(arm: dict) -> str:
    return f"{arm['label']}; published: {arm['published']}" if arm["published"] else arm["label"]


def _arm_style(arm: dict, j: int) -> dict:
    """The first four arms get the colours of style.CLIP_COLOURS; nulls are black and dashed."""
    style = {"marker": MARKERS[j % len(MARKERS)], "markersize": 5, "linewidth": 1.2, "capsize": 2}
    if arm["one_update"]:
        return style | {"color": BLACK, "linestyle": "--", "markerfacecolor": "white"}
    return style | {"color": COLOURS[j % len(COLOURS)]}
