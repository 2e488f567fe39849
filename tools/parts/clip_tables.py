"""The tables and the figure of tools.clip_bias, from the result that it prints as JSON."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from scipy.stats import binomtest

from tools.plot import COLOURS, MARKERS, STYLE


def mean_se(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean over the last dimension, the contexts, and its standard error."""
    return x.mean(-1), x.std(-1) / math.sqrt(x.shape[-1])


def write(result: dict, folder: Path) -> None:
    """Print the report, and leave it and the figure in the folder: table.md, clip_bias.png."""
    table, figure = folder / "table.md", folder / "clip_bias.png"
    text = report(result)
    table.write_text(text)
    draw(result, figure)
    print(f"{text}\ntable: {table}\nfigure: {figure}")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, its columns but the first set to the right."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def report(result: dict) -> str:
    """Three parts in markdown: the table by step size, the two habits, appendix B."""
    text = (f"{result['contexts']} contexts of {result['vocab']} tokens, {result['steps']} steps, "
            f"rewards Bernoulli({result['rate']:g}); by step size: mean ± standard error\n"
            )  # fmt: skip
    for i, digits in enumerate((3, 3, 4)):
        text += by_step_size(result, i, digits)
    return text + two_habits(result) + formula(result)


def by_step_size(result: dict, i: int, digits: int) -> str:
    """The i-th measure of every arm; beside the first, what was published."""
    rows = []
    for arm in result["arms"]:
        mean, se = result["mean_and_se"]["table"][arm["label"]]
        cells = [f"{m:.{digits}f} ± {s:.{digits}f}" for m, s in zip(mean[i], se[i], strict=True)]
        rows.append([arm["label"], *cells, *[arm["published"]] * (i == 0)])
    title = f"{result['measures'][i]}, start {result['begin'][i]:.3f}"
    sizes = [f"{size:g}" for size in result["step_sizes"]]
    return markdown([title, *sizes, *["published"] * (i == 0)], rows)


def two_habits(result: dict) -> str:
    """The first habit's mean probability, and how often it won (interval: Wilson, 1927)."""
    n, rows = result["habit_contexts"], []
    for label, won in result["above_half"].items():
        mean, se = (x[0][0] for x in result["mean_and_se"]["habits"][label])
        low, high = binomtest(won, n).proportion_ci(method="wilson")
        rows.append([label, f"{mean:.3f} ± {1.96 * se:.3f}",
                     f"{won / n:.3f} ({low:.3f} to {high:.3f})"])  # fmt: skip
    head = ["arm", f"mean probability of the first, start {result['habit_top']:g}",
            "chance that the first ends above 1/2"]  # fmt: skip
    return (f"\nTwo habits: {n} contexts, {result['habit_steps']} steps, step size "
            f"{result['habit_step_size']:g}; 95 % intervals\n") + markdown(head, rows)  # fmt: skip


def formula(result: dict) -> str:
    """Appendix B's mean gradient on the first token's logit, calculated and measured."""
    rows = []
    for r in result["appendix_b"]:
        exact, measured, half = r["formula"], r["measured"], 1.96 * r["se"]
        relative = "-"
        if exact:
            relative = f"{100 * (measured / exact - 1):+.1f} ± {100 * half / abs(exact):.1f} %"
        rows.append([r["case"], r["arm"], f"{exact:+.5f}", f"{measured:+.5f} ± {half:.5f}",
                     relative, f"{r['clip_frac']:.4f}"])  # fmt: skip
    head = ["case", "arm", "formula", "measured", "relative error", "clip fraction"]
    actions = result["contexts"] * result["rounds"] * result["samples"]
    edge = 1 + result["clip_high"]
    return (f"\nAppendix B: gradient on the first token's logit, {actions} actions, "
            f"mu = {result['mu']:.6f}; 95 % intervals\n{markdown(head, rows)}"
            f"\nq -> p: two tokens, the first drawn with q, its probability now p. With q "
            f"above {1 / edge:.3f} it is never clipped from above; with q = .02 it is "
            f"pushed down above {0.02 * edge:.3f}.\n")  # fmt: skip


def draw(result: dict, path: Path) -> None:
    """Every arm against the step size: the top token's probability, and the entropy."""
    shown = [arm for arm in result["arms"] if arm["scale"]]
    sizes = result["step_sizes"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(32 / 3, 6.2), layout="constrained")
        axes = figure.subplots(1, 2)
        for i, axis in enumerate(axes):
            axis.axhline(result["begin"][i], color="grey", linestyle=":", label="start")
            for j, arm in enumerate(shown):
                mean, se = (x[i] for x in result["mean_and_se"]["table"][arm["label"]])
                # side by side, so that intervals can be told apart
                x = [k + 0.07 * (j - (len(shown) - 1) / 2) for k in range(len(sizes))]
                look = {"color": COLOURS[j % len(COLOURS)], "marker": MARKERS[j % len(MARKERS)]}
                if arm["one_update"]:
                    look |= {"color": COLOURS[-1], "linestyle": "--", "markerfacecolor": "white"}
                label = "; published: ".join(filter(None, (arm["label"], arm["published"])))
                axis.errorbar(x, mean, [1.96 * s for s in se], label=label, capsize=2,
                              markersize=5, linewidth=1.2, **look)  # fmt: skip
            axis.set_title(result["measures"][i], fontsize=12)
            axis.set_xlabel("step size of SGD")
            axis.set_xticks(range(len(sizes)), [f"{s:g}" for s in sizes])
            axis.grid(alpha=0.25, axis="y")
        figure.suptitle(f"Random rewards on a softmax table, after {result['steps']} steps: mean "
                        f"of {result['contexts']} contexts, 95 % intervals", fontsize=13
                        )  # fmt: skip
        place = {"loc": "outside lower center", "ncols": 2, "frameon": False, "fontsize": 9}
        figure.legend(*axes[0].get_legend_handles_labels(), **place)
        figure.savefig(path, dpi=150)
