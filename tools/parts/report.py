"""What a sweep's runs say: means by arm, and differences of pairs of arms, seed by seed."""

import difflib
import itertools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from harness.checkpoint import read_config, read_jsonl
from harness.errors import UserError
from settings import Config
from tools.parts.arms import (
    NO_ARM,
    SETTLED,
    Arm,
    differences,
    every_knob,
    finite,
    load_metrics,
    mean_run,
)
from tools.plot import FEW_SEEDS, MOST_ARMS, draw

REPORT = ("eval_accuracy", "eval_code_frequency", "accuracy", "clip_frac")
PERCENT = ("accuracy", "code_frequency", "boxed")  # keys that end so are shown in percent
SMALL = ("clip_", "kl", "grad_norm")  # keys that begin so, in scientific notation
ALL_PAIRS = 4  # up to so many arms each pair is compared, above each with the first
IN_ONE_ARM = (*NO_ARM, *SETTLED)  # what the runs of one arm may differ in


# ---- the arms


def load_arm(folder: Path, wanted: dict | None = None) -> Arm:
    """The complete runs of the arm in OUT/ARM, by seed.

    Raises UserError for a run of another configuration than `wanted` (None: the first run's).
    """
    arm = Arm(folder.name, [], [], wanted or {})
    seeds = [path.name[4:] for path in folder.glob("seed*") if path.is_dir()]
    for seed in sorted(int(seed) for seed in seeds if seed.isdigit()):
        run = folder / f"seed{seed}"
        rows = read_jsonl(run / "metrics.jsonl")
        if not rows:
            continue
        config = every_knob(read_config(run))
        if rows[-1]["step"] != config["steps"]:
            continue
        arm.config = arm.config or config
        for key, (here, there) in differences(config, arm.config, IN_ONE_ARM).items():
            first = f" as in {arm.folders[0]}" if arm.folders else ""
            raise UserError(f"{run}: holds a run with {key}={here}, not {there}{first}: the runs "
                            "of an arm differ in their seed alone: move it away")  # fmt: skip
        arm.folders.append(run)
        arm.runs.append(load_metrics(run))
    return arm


def load_sweep(out: Path) -> list[Arm]:
    """The arms of a sweep's folder in their order, each with its complete runs, by seed."""
    try:
        names = json.loads((out / "sweep.json").read_text())["arms"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{out}: no readable sweep.json in it: name the --out of a sweep"
        ) from error
    return [load_arm(out / name) for name in names]


def pool(outs: Sequence[Path]) -> tuple[list[Arm], dict[str, list]]:
    """The arms of several sweeps, the runs of each further seeds, and the knobs in which the sweeps
    differ: key -> values. Raises UserError for sweeps that cannot be pooled."""
    sweeps = [{arm.label: arm for arm in load_sweep(out)} for out in outs]
    knobs: dict[str, list] = {}
    for (here, ours), (there, theirs) in itertools.combinations(zip(outs, sweeps, strict=True), 2):
        if here.resolve() == there.resolve():
            raise UserError(f"pool={there}: the same folder as {here}: name it once")
        for key, value in _between(here, ours, there, theirs):
            known = knobs.setdefault(key, [])
            known += [value] * (value not in known)
    arms = list(sweeps[0].values())
    for arm, more in itertools.product(arms, sweeps[1:]):
        arm.folders += more[arm.label].folders
        arm.runs += more[arm.label].runs
    return arms, knobs


def _between(here: Path, ours: dict[str, Arm], there: Path, theirs: dict[str, Arm]) -> list[tuple]:
    """The knobs in which two sweeps differ, as (key, value) of either.

    Raises UserError where one lacks an arm, where they share a run, and where their arms differ in
    different knobs: arms would be compared that differ in more than their names say.
    """
    for name in [*ours, *theirs]:
        for out, arms in ((here, ours), (there, theirs)):
            if name not in arms:
                raise UserError(f"pool={there}: {out} has no arm {name}: pool sweeps of the same "
                                "arms")  # fmt: skip
    found, differ = [], {}
    for name, arm in ours.items():
        other = theirs[name]
        if not (arm.runs and other.runs):
            continue
        changes = differences(arm.config, other.config, IN_ONE_ARM)
        twins = {f.name for f in arm.folders} & {f.name for f in other.folders}
        if twins and not changes:
            run = f"{name}/{min(twins)}"
            raise UserError(f"pool={there}: its {run} has the configuration and seed of "
                            f"{here / run}: a run counts once")  # fmt: skip
        differ.setdefault(", ".join(changes) or "nothing", name)
        found += [(key, value) for key, values in changes.items() for value in values]
    if len(differ) > 1:
        (some, a), (others, b), *_ = differ.items()
        raise UserError(f"pool={there}: its arm {a} differs from that of {here} in {some}, {b} in "
                        f"{others}: pool sweeps whose arms all differ in the same")  # fmt: skip
    return found


def parts_of(name: str) -> list[str]:
    """The parts of an arm's name: the experiment file, KEY=VALUE; values may hold commas."""
    keys = "|".join(Config.__dataclass_fields__)
    return re.split(rf",(?=(?:{keys})=)", name)


def average(arms: list[Arm], key: str) -> list[Arm]:
    """Arms that differ in `key` alone as one, with one run a seed: the mean of theirs.

    By the runs' configurations, as files may set the key, too; what memory settles counts where a
    name has it. Each is named like its first arm, less the key.
    """
    together: dict[str, list[Arm]] = {}
    for arm in arms:
        if not arm.config:
            raise UserError(f"average={key}: no run of {arm.label} is complete: wait for one")
        rest = {k: v for k, v in arm.config.items() if k not in (*IN_ONE_ARM, key)}
        asked = [p for p in parts_of(arm.label) if p.partition("=")[0] in {*SETTLED} - {key}]
        together.setdefault(json.dumps([rest, asked], sort_keys=True), []).append(arm)
    if len(together) == len(arms):
        raise UserError(f"average={key}: no two arms differ in it alone: sweep it, --{key}=A,B")
    result = []
    for members in together.values():
        name = [part for part in parts_of(members[0].label) if not part.startswith(f"{key}=")]
        runs = [dict(zip(map(seed_of, arm.folders), arm.runs, strict=True)) for arm in members]
        folders = [f for f in members[0].folders if all(seed_of(f) in r for r in runs)]
        means = [mean_run([r[seed_of(folder)] for r in runs]) for folder in folders]
        result.append(Arm(",".join(name).strip("_") or key, folders, means, members[0].config))
    return result


def seed_of(folder: Path) -> tuple[str, int]:
    """What runs of two arms share: the sweep OUT and N, of the folder OUT/ARM/seedN."""
    return str(folder.parent.parent), int(folder.name.removeprefix("seed"))


# ---- the figures


def outcome(rows: list[dict], key: str, last: int) -> float:
    """What a run says of a key: the last eval, the whole run's mean (clip_*), or the mean of the
    last so many steps. nan where there is nothing."""
    values = [row[key] for row in rows if finite(row.get(key))]
    if not values:
        return math.nan
    if key.startswith("eval_"):
        return values[-1]
    return float(np.mean(values if key.startswith("clip_") else values[-last:]))


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Student's interval for the mean of n measurements, n - 1 degrees of freedom; nan if n < 2."""
    n = len(values)
    if n < 2:
        return math.nan, math.nan
    mean, half = np.mean(values), stats.t.ppf((1 + level) / 2, n - 1) * stats.sem(values)
    return float(mean - half), float(mean + half)


def summarize(arms: list[Arm], keys: Sequence[str], last: int) -> dict:
    """Means and standard errors by arm, and differences of pairs of arms, seed by seed.

    {"arms": {name: {"seeds": [..], key: {"mean", "stderr", "values"}}},
     "pairs": [{"a", "b", "key", "n", "difference" (b - a), "low", "high"}]}; unknown is None.
    """
    result: dict = {"arms": {}, "pairs": []}
    by_seed: dict[tuple, dict] = {}
    for arm in arms:
        seeds = [seed_of(folder) for folder in arm.folders]
        entry: dict = {"seeds": [seed for _, seed in seeds]}
        for key in keys:
            values = [outcome(rows, key, last) for rows in arm.runs]
            by_seed[arm.label, key] = dict(zip(seeds, values, strict=True))
            known = [value for value in values if not math.isnan(value)]
            entry[key] = {
                "mean": float(np.mean(known)) if known else None,
                "stderr": float(stats.sem(known)) if len(known) > 1 else None,
                "values": [_null(value) for value in values],
            }
        result["arms"][arm.label] = entry
    names = [arm.label for arm in arms]
    if len(names) <= ALL_PAIRS:
        pairs = list(itertools.combinations(names, 2))
    else:
        pairs = [(names[0], name) for name in names[1:]]
    for (a, b), key in itertools.product(pairs, keys):
        first, second = by_seed[a, key], by_seed[b, key]
        paired = [second[seed] - first[seed] for seed in first if seed in second]
        paired = [difference for difference in paired if not math.isnan(difference)]
        low, high = t_interval(paired)
        mean = float(np.mean(paired)) if paired else None
        result["pairs"].append({"a": a, "b": b, "key": key, "n": len(paired), "difference": mean,
                                "low": _null(low), "high": _null(high)})  # fmt: skip
    return result


def _null(value: float) -> float | None:
    return None if math.isnan(value) else value  # nan is not JSON


def _show(key: str, value: float | None, sign: str = "") -> str:
    """A figure as text: shares in percent, clip fractions and the like as 1.4e-03."""
    if value is None:
        return "?"
    if key.endswith(PERCENT):
        return f"{100 * value:{sign}.1f}"
    return f"{value:{sign}.1e}" if key.startswith(SMALL) and value else f"{value:{sign}.4g}"


def markdown(result: dict, keys: Sequence[str], last: int, also: Sequence[str] = ()) -> str:
    """The two tables of a report: the arms, and the differences of pairs of them.

    also: further sentences below the first one.
    """
    heads = [key + " %" * key.endswith(PERCENT) for key in keys]
    few = min(len(arm["seeds"]) for arm in result["arms"].values()) < 3
    lines = [f"**{FEW_SEEDS[0].upper()}{FEW_SEEDS[1:]}.**", ""] * few
    lines += [_row("arm", "seeds", *heads), "|---|" + "--:|" * (1 + len(keys))]
    for name, arm in result["arms"].items():
        cells = []
        for key in keys:
            mean, error = arm[key]["mean"], arm[key]["stderr"]
            shown = "" if error is None else f" ± {_show(key, error)}"
            cells.append("-" if mean is None else _show(key, mean) + shown)
        lines.append(_row(name, str(len(arm["seeds"])), *cells))
    what = ("Mean ± 1 standard error over seeds. eval_*: the last eval; clip_*: mean of the whole "
            f"run; others: mean of the last {last} steps.")  # fmt: skip
    lines += ["", " ".join([what, *also])]
    if not result["pairs"]:
        return "\n".join(lines)
    lines += ["", _row("difference", "n", *heads), "|---|" + "--:|" * (1 + len(keys))]
    for (a, b), group in itertools.groupby(result["pairs"], lambda pair: (pair["a"], pair["b"])):
        pairs = list(group)
        n = max(pair["n"] for pair in pairs)
        cells = []
        for pair in pairs:
            key = pair["key"]
            cell = "-" if not pair["n"] else _show(key, pair["difference"], "+")
            if pair["n"] > 1:
                cell += f" [{_show(key, pair['low'], '+')}, {_show(key, pair['high'], '+')}]"
            cells.append(cell + f" (n = {pair['n']})" * (pair["n"] != n))
        lines.append(_row(f"{b} − {a}", str(n), *cells))
    lines += ["", "Differences are paired by seed, with a 95 % Student t interval over n seeds; "
              "each interval stands for its pair alone."]  # fmt: skip
    return "\n".join(lines)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def report(out: Path, keys: Sequence[str], last: int, over: str, more: Sequence[Path]) -> dict:
    """Print and write table.md, draw figure.png; returns the figures.

    over: a key to average over, or ""; more: folders of sweeps to pool with that in `out`.
    """
    arms, knobs = pool([out, *more])
    also = []
    if more:
        values = [f"{key}={', '.join(map(str, known))}" for key, known in knobs.items()]
        also.append(f"Pooled over {'; '.join(values) or 'seeds alone'} ({1 + len(more)} sweeps).")
    if over:
        arms = average(arms, over)
        also.append(f"A seed counts once, as the mean of its runs over {over}.")
    done = [arm for arm in arms if arm.runs]
    if not done:
        raise UserError(f"{out}: no run of it is complete: run the sweep first")
    known = {key for arm in done for rows in arm.runs for row in rows for key in row}
    has = {key: any(not math.isnan(outcome(rows, key, 1)) for arm in done for rows in arm.runs)
           for key in keys}  # fmt: skip
    chosen = tuple(keys) != REPORT
    missing = next((key for key in keys if not has[key]), "")
    if chosen and missing:
        near = difflib.get_close_matches(missing, known, 3)
        hint = f": did you mean {' or '.join(near)}?" if near and missing not in known else ""
        raise UserError(f"report={missing}: no number of that name in these runs{hint}")
    keys = [key for key in keys if has[key]]
    result = summarize(arms, keys, last)
    text = markdown(result, keys, last, also)
    (out / "table.md").write_text(text + "\n")
    print(f"\n{text}\n\ntable: {out}/table.md")
    if len(done) <= MOST_ARMS:
        draw(done, out / "figure.png", *[keys] * chosen)
        print(f"figure: {out}/figure.png")
    else:
        print(f"no figure of {len(done)} arms: python -m tools.plot draws the runs you name")
    return {"out": str(out), "last": last, **result}
