"""Grids times seeds: run every arm at every seed, and compare the arms pair by pair.

    python -m tools.sweep config/random_reward.py config/model/tiny.py --seeds=8 \\
        --clip=both,off --lr=1e-4,3e-4 --out=out/clip
    python -m tools.sweep config/ground_truth.py config/format.py config/model/tiny.py --seeds=5

Every key of train.py takes a comma list; each combination is an arm, and so is each experiment
file. Commas within parentheses or quotes do not split: --adam_betas=(.9,.95),(.9,.999). The runs
lie in OUT/ARM/seedN and are made seed by seed, so that a half-done sweep has every arm. The same
command goes on with a sweep that was stopped, and adds to it where it asks for more seeds.

A learning rate is found by the clip fraction, near 1e-3 (README, "Learning rate"):

    python -m tools.sweep config/random_reward.py config/model/tiny.py --lr=1e-5,1e-4,1e-3 \\
        --steps=10 --seeds=2 --eval_every=0 --report=clip_frac,kl,accuracy --out=out/lr

OUT gets table.md and figure.png; the last line printed is JSON. `--only_report=True --out=OUT`
reports on what is complete, without running, also beside a sweep that runs; --pool=OTHER adds the
seeds of another sweep of the same arms. --average=reward takes arms that differ in their reward for
one, and the mean of a seed's runs for one measurement: with --reward='random(0.5),~random(0.5)',
where the same coins lie the other way, what a run owes to its coins largely cancels.
"""

import difflib
import itertools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import get_origin, get_type_hints

import numpy as np
from scipy import stats

from checkpoint import read_config, write_json
from configurator import UserError, configure, run
from settings import Config, check
from tools.arms import Arm, finite, load_metrics, mean_run
from tools.jobs import Job, how_many, run_all, state
from tools.plot import FEW_SEEDS, MOST_ARMS, draw

REPORT = ("eval_accuracy", "eval_code_frequency", "accuracy", "clip_frac")
PERCENT = ("accuracy", "code_frequency", "boxed")  # keys that end so are shown in percent
SMALL = ("clip_", "kl", "grad_norm")  # keys that begin so, in scientific notation
ALL_PAIRS = 4  # up to so many arms each pair is compared, above each with the first


@dataclass
class SweepConfig:
    """Grids times seeds: with [config/EXPERIMENT.py ...] [config/model/SCALE.py] [--KEY=A,B,...]"""

    seeds: int = 3  # runs an arm
    first_seed: int = 0  # they are first_seed, first_seed + 1, ...
    out: str = "out/sweep"  # folder of the runs, the table and the figure
    jobs: int = 0  # runs at a time; 0 = one on CUDA, else as many as cores and memory allow
    report: tuple[str, ...] = REPORT  # keys of metrics.jsonl; clip_frac = low + high
    last: int = 10  # steps at the end of a run whose mean is reported (of eval_* and clip_* not)
    average: str = ""  # a key with a list, over whose values each seed's runs are averaged
    only_report: bool = False  # report on the complete runs of out, run nothing
    pool: tuple[str, ...] = ()  # more folders of the same arms, whose runs are further seeds


# ---- the plan


def split_list(text: str, is_tuple: bool = False) -> list[str]:
    """The items of a comma list; commas within brackets or quotes belong to an item.

    is_tuple: of a key whose value is itself a tuple, whose items then stand in parentheses.
    """
    items, depth, quote = [""], 0, ""
    for c in text:
        quote = "" if c == quote else c if c in "'\"" and not quote else quote
        depth += 0 if quote else (c in "([{") - (c in ")]}")
        if c == "," and not depth and not quote:
            items.append("")
        else:
            items[-1] += c
    items = [item.strip() for item in items]
    if is_tuple and not all(item.startswith("(") for item in items):
        return [text]
    return items


def arms_of(argv: Sequence[str]) -> dict[str, list[str]]:
    """The arms of a command line (less the sweep's own options): name -> train.py arguments.

    A name is made of what differs: the experiment file, and KEY=VALUE of each key with a list.
    """
    types = get_type_hints(Config)
    scale, experiments, lists, fixed = [], [], {}, []
    for arg in argv:
        if not arg.startswith("-"):
            (scale if Path(arg).absolute().parent.name == "model" else experiments).append(arg)
            continue
        if not re.match(r"--\w+=", arg):
            fixed.append(arg)  # train.py's reader says what is wrong with it
            continue
        key, _, text = arg[2:].partition("=")
        values = split_list(text, get_origin(types.get(key)) is tuple)
        if key in ("seed", "out_dir", "resume"):
            instead = {"seed": "--seeds=N", "out_dir": "--out=FOLDER"}.get(key)
            raise UserError(f"{arg}: the sweep sets it" + (f": use {instead}" if instead else ""))
        if key in lists:
            raise UserError(f"{arg}: {key} is already given: keep one")
        if len(values) == 1:
            fixed.append(arg)
        elif "" in values:
            raise UserError(f"{arg}: an empty value in the list: write {key}=A,B")
        else:
            lists[key] = values
    options = [[f"--{key}={value}" for value in values] for key, values in lists.items()]
    several = len(experiments) > 1
    arms: dict[str, list[str]] = {}
    for choice in itertools.product(experiments or [""], *options):
        experiment, *chosen = choice
        parts = [Path(experiment).stem] * (several or not chosen) + [c[2:] for c in chosen]
        name = re.sub(r"[^\w.,=+~-]+", "_", ",".join(filter(None, parts))).strip("_") or "train"
        if name in arms:
            raise UserError(f"two arms are named {name}: rename a file, or drop a doubled value")
        arms[name] = [*filter(None, [experiment]), *scale, *fixed, *chosen]
    return arms


def plan(cfg: SweepConfig, argv: Sequence[str]) -> list[Job]:
    """The runs, seed by seed. Raises UserError for a wrong setting of any of them."""
    arms = arms_of(argv)
    seen: dict[str, str] = {}
    for name, args in arms.items():
        config = Job(Path(cfg.out) / name, args).config
        for warning in check(config):
            print(f"warning: {name}: {warning}")
        twin = seen.setdefault(json.dumps(asdict(config) | {"out_dir": ""}), name)
        if twin != name:
            raise UserError(f"{name} and {twin} are the same configuration: drop one")
    seeds = range(cfg.first_seed, cfg.first_seed + cfg.seeds)
    return [Job(Path(cfg.out) / name / f"seed{seed}", [*args, f"--seed={seed}"])
            for seed in seeds for name, args in arms.items()]  # fmt: skip


# ---- the report


def load_sweep(out: Path) -> list[Arm]:
    """The arms of a sweep's folder in their order, each with its complete runs, by seed."""
    try:
        names = json.loads((out / "sweep.json").read_text())["arms"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{out}: no readable sweep.json in it: name the --out of a sweep"
        ) from error
    arms = []
    for name in names:
        arm = Arm(name, [], [])
        seeds = [path.name[4:] for path in (out / name).glob("seed*") if path.is_dir()]
        for seed in sorted(int(seed) for seed in seeds if seed.isdigit()):
            folder = out / name / f"seed{seed}"
            if not (folder / "metrics.jsonl").exists():
                continue
            rows = load_metrics(folder)
            if rows and rows[-1]["step"] == read_config(folder)["steps"]:
                arm.config = arm.config or read_config(folder)
                arm.folders.append(folder)
                arm.runs.append(rows)
        arms.append(arm)
    return arms


def average(arms: list[Arm], key: str) -> list[Arm]:
    """Arms that differ in `key` alone as one, with one run a seed: the mean of theirs."""
    together: dict[str, list[Arm]] = {}
    for arm in arms:
        parts = [part for part in arm.label.split(",") if not part.startswith(f"{key}=")]
        together.setdefault(",".join(parts) or key, []).append(arm)
    if len(together) == len(arms):
        raise UserError(f"average={key}: no two arms differ in it alone: sweep it, --{key}=A,B")
    result = []
    for name, members in together.items():
        runs = [dict(zip(map(seed_of, arm.folders), arm.runs, strict=True)) for arm in members]
        folders = [f for f in members[0].folders if all(seed_of(f) in r for r in runs)]
        means = [mean_run([r[seed_of(folder)] for r in runs]) for folder in folders]
        result.append(Arm(name, folders, means, members[0].config))
    return result


def seed_of(folder: Path) -> tuple[str, int]:
    """What runs of two arms share: the sweep OUT and N, of the folder OUT/ARM/seedN."""
    return str(folder.parent.parent), int(folder.name.removeprefix("seed"))


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


def markdown(result: dict, keys: Sequence[str], last: int, averaged: str = "") -> str:
    """The two tables of a report: the arms, and the differences of pairs of them."""
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
    once = f" A seed counts once, as the mean of its runs over {averaged}." * bool(averaged)
    lines += ["", f"Mean ± 1 standard error over seeds. eval_*: the last eval; clip_*: mean of the "
              f"whole run; others: mean of the last {last} steps.{once}"]  # fmt: skip
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


def report(cfg: SweepConfig) -> dict:
    """Print and write table.md, draw figure.png; returns the figures."""
    out = Path(cfg.out)
    arms = load_sweep(out)
    for folder in cfg.pool:
        others = {arm.label: arm for arm in load_sweep(Path(folder))}
        for arm in arms:
            if arm.label in others:
                arm.folders += others[arm.label].folders
                arm.runs += others[arm.label].runs
    if cfg.average:
        arms = average(arms, cfg.average)
    done = [arm for arm in arms if arm.runs]
    if not done:
        raise UserError(f"{out}: no run of it is complete: run the sweep first")
    known = {key for arm in done for rows in arm.runs for row in rows for key in row}
    has = {key: any(not math.isnan(outcome(rows, key, 1)) for arm in done for rows in arm.runs)
           for key in cfg.report}  # fmt: skip
    keys = [key for key in cfg.report if has[key]]
    if cfg.report != REPORT and len(keys) < len(cfg.report):
        missing = next(key for key in cfg.report if not has[key])
        near = difflib.get_close_matches(missing, known, 3)
        hint = f": did you mean {' or '.join(near)}?" if near and missing not in known else ""
        raise UserError(f"report={missing}: no number of that name in these runs{hint}")
    result = summarize(arms, keys, cfg.last)
    text = markdown(result, keys, cfg.last, cfg.average)
    (out / "table.md").write_text(text + "\n")
    print(f"\n{text}\n\ntable: {out}/table.md")
    if len(done) <= MOST_ARMS:
        draw(done, out / "figure.png", *[keys] * (cfg.report != REPORT))
        print(f"figure: {out}/figure.png")
    else:
        print(f"no figure of {len(done)} arms: python -m tools.plot draws the runs you name")
    return {"out": str(out), "last": cfg.last, **result}


def main(argv: list[str]) -> None:
    own = {field.name for field in fields(SweepConfig)}
    named = {arg: arg.lstrip("-").partition("=")[0] for arg in argv if arg.startswith("-")}
    mine = [arg for arg in argv if named.get(arg) in own or arg in ("-h", "--help")]
    cfg, _ = configure(SweepConfig, mine)
    for key, least in (("seeds", 1), ("first_seed", 0), ("jobs", 0), ("last", 1)):
        if getattr(cfg, key) < least:
            raise UserError(f"{key}={getattr(cfg, key)}: must be at least {least}")
    rest = [arg for arg in argv if arg not in mine]
    if not cfg.only_report:
        jobs = plan(cfg, rest)
        arms = list(dict.fromkeys(job.folder.parent.name for job in jobs))
        at_once = cfg.jobs or how_many(jobs)
        print(f"{len(arms)} arms x {cfg.seeds} seeds, {at_once} at a time, in {cfg.out}")
        for job in jobs:
            state(job)
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        write_json(Path(cfg.out) / "sweep.json", {"arms": arms, "argv": argv})
        run_all(jobs, at_once, Path(cfg.out))
    elif rest:
        raise UserError(
            f"{rest[0]}: only_report reads the folder: its options are --out, --report, "
            "--last, --average and --pool"
        )
    print(json.dumps(report(cfg)))


if __name__ == "__main__":
    run(main)
