"""The report of a sweep: the mean of each arm, and the differences of pairs of arms, by seed."""

import difflib
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from evaluation.collapse import collapse_step
from harness.errors import UserError
from tools.parts.arms import Arm, finite
from tools.parts.intervals import t_interval
from tools.parts.panels import DEFAULT_METRICS, MOST_ARMS, draw_metrics
from tools.parts.style import save_figure
from tools.parts.sweep_runs import average_arms, pool_sweeps, seed_of
from tools.parts.tables import few_seeds_warning, markdown_table, save_text

REPORT = ("eval_accuracy", "eval_code_frequency", "accuracy", "clip_frac")
PERCENT = ("accuracy", "code_frequency", "boxed")  # keys that end so are shown in percent
SMALL = ("clip_", "kl", "grad_norm")  # keys that begin so, in scientific notation
COLLAPSED = (
    "Collapsed: the accuracy of training stays below half of its best to the end of the run."
)
ALL_PAIRS = 4  # up to so many arms, each pair is compared; with more, each arm with the first


def write_report(
    out: Path, keys: Sequence[str], last: int, over: str, more: Sequence[Path]
) -> dict:
    """Print and write table.md, draw figure.png; returns the numbers.

    out: a sweep's folder. more: folders of sweeps to pool with it. keys: what to report.
    last: steps at the end of a run to average. over: a key to average over, or "".
    """
    arms, different = pool_sweeps([out, *more])
    notes = []
    if more:
        values = [f"{key}={', '.join(map(str, known))}" for key, known in different.items()]
        notes.append(f"Pooled over {'; '.join(values) or 'seeds alone'} ({1 + len(more)} sweeps).")
    if over:
        arms = average_arms(arms, over)
        notes.append(f"A seed counts once, as the mean of its runs over {over}.")
    done = [arm for arm in arms if arm.runs]
    if not done:
        raise UserError(f"{out}: no run of it is complete: run the sweep first")
    chosen = tuple(keys) != REPORT
    keys = reported_keys(done, keys, chosen)
    result = summarize_arms(arms, keys, last)
    text = report_tables(result, keys, last, notes)
    save_text(text, out / "table.md")
    print(f"\n{text}\n\ntable: {out}/table.md")
    if len(done) <= MOST_ARMS:
        figure = draw_metrics(done, keys if chosen else DEFAULT_METRICS)
        save_figure(figure, out / "figure.png")
        print(f"figure: {out}/figure.png")
    else:
        print(f"no figure, {len(done)} arms are too many: name some runs for python -m tools.plot")
    return {"out": str(out), "last": last, **result}


def reported_keys(arms: list[Arm], keys: Sequence[str], chosen: bool) -> list[str]:
    """The keys that have values in some run.

    Raises UserError for a key without values if the user chose the keys.
    """
    with_values = [key for key in keys if _has_outcome(arms, key)]
    missing = [key for key in keys if key not in with_values]
    if chosen and missing:
        known = {key for arm in arms for rows in arm.runs for row in rows for key in row}
        near = difflib.get_close_matches(missing[0], known, 3)
        unknown = missing[0] not in known
        hint = f": did you mean {' or '.join(near)}?" if near and unknown else ""
        raise UserError(f"report={missing[0]}: no number of that name in these runs{hint}")
    return with_values


def _has_outcome(arms: list[Arm], key: str) -> bool:
    return any(not math.isnan(outcome(rows, key, 1)) for arm in arms for rows in arm.runs)


# ---- the numbers


def outcome(rows: list[dict], key: str, last: int) -> float:
    """The result of a run for a key, or nan if the run did not log it.

    eval_*: the last eval. clip_*: the mean of the whole run. Others: the mean of the last `last`
    steps.
    """
    values = [row[key] for row in rows if finite(row.get(key))]
    if not values:
        return math.nan
    if key.startswith("eval_"):
        return values[-1]
    return float(np.mean(values if key.startswith("clip_") else values[-last:]))


def summarize_arms(arms: list[Arm], keys: Sequence[str], last: int) -> dict:
    """Mean and standard error of each arm, and differences of pairs of arms, paired by seed.

    {"arms": {name: {"seeds": [..], "collapsed": [step or None, ..],
                     key: {"mean", "stderr", "values"}}},
     "pairs": [{"a", "b", "key", "n", "difference" (b - a), "low", "high"}]}; unknown is None.
    """
    summary: dict[str, dict] = {}
    by_seed: dict[tuple, dict] = {}  # (arm, key) -> seed -> outcome
    for arm in arms:
        seeds = [seed_of(folder) for folder in arm.folders]
        summary[arm.label] = {"seeds": [seed for _, seed in seeds]}
        summary[arm.label]["collapsed"] = [collapse_step(rows) for rows in arm.runs]
        for key in keys:
            values = [outcome(rows, key, last) for rows in arm.runs]
            by_seed[arm.label, key] = dict(zip(seeds, values, strict=True))
            summary[arm.label][key] = _mean_and_error(values)
    pairs = []
    for (a, b), key in itertools.product(_pairs([arm.label for arm in arms]), keys):
        pairs.append({"a": a, "b": b, "key": key, **_difference(by_seed[a, key], by_seed[b, key])})
    return {"arms": summary, "pairs": pairs}


def _pairs(names: list[str]) -> list[tuple[str, str]]:
    if len(names) <= ALL_PAIRS:
        return list(itertools.combinations(names, 2))
    return [(names[0], name) for name in names[1:]]


def _mean_and_error(values: list[float]) -> dict:
    known = [value for value in values if not math.isnan(value)]
    return {
        "mean": float(np.mean(known)) if known else None,
        "stderr": float(stats.sem(known)) if len(known) > 1 else None,
        "values": [_none_if_nan(value) for value in values],
    }


def _difference(first: dict, second: dict) -> dict:
    """second - first over the seeds of both, with its interval."""
    paired = [second[seed] - first[seed] for seed in first if seed in second]
    paired = [difference for difference in paired if not math.isnan(difference)]
    low, high = t_interval(paired)
    return {
        "n": len(paired),
        "difference": float(np.mean(paired)) if paired else None,
        "low": _none_if_nan(low),
        "high": _none_if_nan(high),
    }


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value  # JSON has no nan


# ---- the tables


def report_tables(result: dict, keys: Sequence[str], last: int, notes: Sequence[str] = ()) -> str:
    """The two tables of a report: the arms, and the differences of pairs of arms.

    notes: further sentences below the first table.
    """
    heads = [f"{key} %" if key.endswith(PERCENT) else key for key in keys]
    arms = result["arms"]
    rows = []
    for name, arm in arms.items():
        cells = [_mean_cell(key, arm[key]) for key in keys]
        rows.append([name, str(len(arm["seeds"])), *cells])
    if any(step is not None for arm in arms.values() for step in arm["collapsed"]):
        heads_above = [*heads, "collapsed"]
        rows = [[*row, _collapsed(arm)] for row, arm in zip(rows, arms.values(), strict=True)]
        notes = [*notes, COLLAPSED]
    else:
        heads_above = heads
    table = few_seeds_warning([len(arm["seeds"]) for arm in arms.values()])
    table += markdown_table(["arm", "seeds", *heads_above], rows)
    what = (
        "Mean ± 1 standard error over seeds. eval_*: the last eval; clip_*: mean of the whole "
        f"run; others: mean of the last {last} steps."
    )
    parts = [table, " ".join([what, *notes])]
    if result["pairs"]:
        parts.append(_difference_table(result["pairs"], heads))
        parts.append(
            "Differences are paired by seed, with a 95 % Student t interval over n seeds; "
            "each interval is for its pair alone."
        )
    return "\n\n".join(parts)


def _collapsed(arm: dict) -> str:
    """How many runs of an arm collapsed, and at which steps."""
    steps = [str(step) for step in arm["collapsed"] if step is not None]
    where = f" (step {', '.join(steps)})" if steps else ""
    return f"{len(steps)} of {len(arm['collapsed'])}{where}"


def _difference_table(pairs: list[dict], heads: list[str]) -> str:
    rows = []
    for (a, b), group in itertools.groupby(pairs, lambda pair: (pair["a"], pair["b"])):
        by_key = list(group)
        n = max(pair["n"] for pair in by_key)
        rows.append([f"{b} − {a}", str(n), *[_difference_cell(pair, n) for pair in by_key]])
    return markdown_table(["difference", "n", *heads], rows)


def _mean_cell(key: str, entry: dict) -> str:
    if entry["mean"] is None:
        return "-"
    mean = _format(key, entry["mean"])
    return mean if entry["stderr"] is None else f"{mean} ± {_format(key, entry['stderr'])}"


def _difference_cell(pair: dict, n: int) -> str:
    """A difference with its interval, and its number of seeds if that is not n."""
    if not pair["n"]:
        cell = "-"
    else:
        cell = _format(pair["key"], pair["difference"], "+")
    if pair["n"] > 1:
        low, high = (_format(pair["key"], pair[end], "+") for end in ("low", "high"))
        cell += f" [{low}, {high}]"
    return cell if pair["n"] == n else f"{cell} (n = {pair['n']})"


def _format(key: str, value: float, sign: str = "") -> str:
    """A number as text: shares in percent, clip fractions and the like as 1.4e-03."""
    if key.endswith(PERCENT):
        return f"{100 * value:{sign}.1f}"
    if key.startswith(SMALL) and value:
        return f"{value:{sign}.1e}"
    return f"{value:{sign}.4g}"
