"""Run a grid of settings, several seeds each, and compare the arms pair by pair.

    python -m tools.sweep config/random_reward.py config/model/tiny.py --seeds=8 \\
        --clip=both,off --lr=1e-4,3e-4 --out=out/clip
    python -m tools.sweep config/ground_truth.py config/format.py config/model/tiny.py --seeds=5

Every key of train.py takes a comma list. Each combination is an arm, and so is each experiment
file. Commas within parentheses or quotes do not split: --adam_betas=(.9,.95),(.9,.999). Runs are in
OUT/ARM/seedN. They run seed by seed, so a half-finished sweep has every arm. The same command
continues a sweep that was stopped, and adds runs if it asks for more seeds.

To find a learning rate, look for a clip fraction near 1e-3 (docs/TRAINING.md):

    python -m tools.sweep config/random_reward.py config/model/tiny.py --lr=1e-5,1e-4,1e-3 \\
        --steps=10 --seeds=2 --eval_every=0 --report=clip_frac,kl,accuracy --out=out/lr

The report is OUT/table.md and OUT/figure.png; the last line printed is JSON.

`--only_report=True --out=OUT` runs nothing and reports on the complete runs, even while the sweep
is running. --pool=OTHER adds the seeds of another sweep of the same arms. The two sweeps may differ
in some settings, such as model=tiny and tiny_bad, if all arms differ in the same ones; the table
names them. --average=reward merges arms that differ only in their reward: the mean of a seed's runs
is one measurement. With --reward='random(0.5),~random(0.5)', which flips the same coins both ways,
the effect of the coins largely cancels.

On a cluster, each task of a Slurm job array runs one seed, and they share OUT:

    sbatch --array=0-7 --gres=gpu:1 --wrap 'python -m tools.sweep config/random_reward.py \\
        --clip=both,off --seeds=8 --out=out/clip --task=$SLURM_ARRAY_TASK_ID'

--task=I runs the arms at seed first_seed + I alone and writes no report. The same command, or
--only_report=True, reports on all seeds once they are there.
"""

import itertools
import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import get_origin, get_type_hints

from harness.configurator import configure
from harness.errors import UserError, run
from harness.runfiles import write_json
from settings import Config, check
from tools.parts.arms import RUN_KEYS, as_saved
from tools.parts.jobs import Job, how_many, run_all, state
from tools.parts.report import REPORT, write_report
from tools.parts.sweep_runs import load_sweep_arm


@dataclass
class SweepConfig:
    """Run a grid: [config/EXPERIMENT.py ...] [config/model/SCALE.py] [--KEY=A,B,...]"""

    seeds: int = 3  # runs per arm
    first_seed: int = 0  # the seeds are first_seed, first_seed + 1, ...
    out: str = "out/sweep"  # folder for the runs, the table and the figure
    task: int = -1  # run only this one of the seeds, counted from 0; -1 = all (for job arrays)
    jobs: int = 0  # runs at a time; 0 = one on CUDA, else as many as cores and memory allow
    report: tuple[str, ...] = REPORT  # keys of metrics.jsonl; clip_frac = low + high
    last: int = 10  # steps at the end of a run to average (not for eval_* and clip_*)
    average: str = ""  # a key with a list: average each seed's runs over its values
    only_report: bool = False  # run nothing, report on the complete runs in out
    pool: tuple[str, ...] = ()  # more folders of the same arms, whose runs count as further seeds


def split_list(text: str, is_tuple: bool = False) -> list[str]:
    """The items of a comma list. Commas within brackets or quotes belong to an item.

    is_tuple: whether each value is a tuple. Then the items of a list need parentheses.
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
    """The arms of a command line without the sweep's own options: name -> train.py arguments.

    A name consists of what differs: the experiment file, and KEY=VALUE of each key with a list.
    """
    types = get_type_hints(Config)
    scale, experiments, lists, fixed = [], [], {}, []
    for arg in argv:
        if not arg.startswith("-"):
            (scale if Path(arg).absolute().parent.name == "model" else experiments).append(arg)
            continue
        if not re.match(r"--\w+=", arg):
            fixed.append(arg)  # `configure` will say what is wrong with it
            continue
        key, _, text = arg[2:].partition("=")
        values = split_list(text, get_origin(types.get(key)) is tuple)
        if key in RUN_KEYS:
            instead = {"seed": "--seeds=N", "out_dir": "--out=FOLDER"}.get(key)
            advice = f"use {instead}" if instead else "leave it out"
            raise UserError(f"{arg}: the sweep sets {key}: {advice}")
        if key in lists:
            raise UserError(f"{arg}: {key} is given twice: keep one")
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
        parts = [c.removeprefix("--") for c in chosen]
        if several or not chosen:
            parts.insert(0, Path(experiment).stem)
        name = re.sub(r"[^\w.,=+~-]+", "_", ",".join(filter(None, parts))).strip("_") or "train"
        if name in arms:
            raise UserError(f"two arms are named {name}: rename a file, or remove a repeated value")
        arms[name] = [*filter(None, [experiment]), *scale, *fixed, *chosen]
    return arms


def plan(cfg: SweepConfig, argv: Sequence[str]) -> list[Job]:
    """The runs, seed by seed. Raises UserError if a setting of any of them is wrong."""
    arms = arms_of(argv)
    seen: dict[str, str] = {}
    for name, args in arms.items():
        config = Job(Path(cfg.out) / name, args).config
        for warning in check(config):
            print(f"warning: {name}: {warning}")
        twin = seen.setdefault(json.dumps(asdict(config) | {"out_dir": ""}), name)
        if twin != name:
            raise UserError(f"{name} and {twin} are the same configuration: remove one")
    seeds = range(cfg.first_seed, cfg.first_seed + cfg.seeds)
    if cfg.task >= 0:
        seeds = seeds[cfg.task : cfg.task + 1]
    return [
        Job(Path(cfg.out) / name / f"seed{seed}", [*args, f"--seed={seed}"])
        for seed in seeds
        for name, args in arms.items()
    ]


def main(argv: list[str]) -> None:
    own = {field.name for field in fields(SweepConfig)}
    named = {arg: arg.lstrip("-").partition("=")[0] for arg in argv if arg.startswith("-")}
    mine = [arg for arg in argv if named.get(arg) in own or arg in ("-h", "--help")]
    cfg, _ = configure(SweepConfig, mine)
    for key, least in (("seeds", 1), ("first_seed", 0), ("jobs", 0), ("last", 1)):
        if getattr(cfg, key) < least:
            raise UserError(f"{key}={getattr(cfg, key)}: must be at least {least}")
    if not -1 <= cfg.task < cfg.seeds:
        raise UserError(f"task={cfg.task}: seeds={cfg.seeds} make tasks 0 to {cfg.seeds - 1}")
    if cfg.task >= 0 and cfg.only_report:
        raise UserError("task: only_report reports on all seeds: leave out --task")
    rest = [arg for arg in argv if arg not in mine]
    if not cfg.only_report:
        jobs = plan(cfg, rest)
        arms = list(dict.fromkeys(job.folder.parent.name for job in jobs))
        at_once = cfg.jobs or how_many(jobs)
        seeds = "1 seed" if cfg.task >= 0 else f"{cfg.seeds} seeds"
        print(f"{len(arms)} arms x {seeds}, {at_once} at a time, in {cfg.out}")
        for job in jobs:
            state(job)
        for folder, job in {job.folder.parent: job for job in jobs}.items():
            load_sweep_arm(folder, as_saved(job.config))  # also checks runs of further seeds
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cfg.out) as own:  # several tasks may write at once
            write_json(Path(own) / "sweep.json", {"arms": arms, "argv": argv})
            os.replace(Path(own) / "sweep.json", Path(cfg.out) / "sweep.json")
        run_all(jobs, at_once, Path(cfg.out))
        if cfg.task >= 0:
            print(f"report, once all tasks are done: --only_report=True --out={cfg.out}")
            return
    elif rest:
        raise UserError(
            f"{rest[0]}: has no effect with only_report: use --out, --report, --last, --average "
            "and --pool only"
        )
    pool = [Path(folder) for folder in cfg.pool]
    print(json.dumps(write_report(Path(cfg.out), cfg.report, cfg.last, cfg.average, pool)))


if __name__ == "__main__":
    run(main)
