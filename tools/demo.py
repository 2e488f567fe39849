"""Rewards on the tiny world, a few seeds each, one figure and one table: minutes on two cores.

    python -m tools.demo --out=out/demo --seeds=3 --jobs=2
    python -m tools.demo --experiments=all --out=out/rewards        (every file of config/)

Each run is an ordinary `train.py`; a demo that was stopped goes on where it was.
"""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

import tiny
from checkpoint import read_config, read_jsonl
from configurator import PROJECT, UserError, configure, run
from settings import Config
from tools.plot import Arm, cell, draw, load_arms

EXPERIMENTS = ("ground_truth", "random_reward", "format", "python_reward")
SCALE = "config/model/tiny.py"
MOST_ARMS = 8  # more lines in a panel are not told apart
PANELS = ("eval_accuracy", "accuracy", "code_frequency", "boxed", "clip_frac", "entropy")


@dataclass
class DemoConfig:
    """Train rewards on the tiny world and compare them: python -m tools.demo [--key=value]"""

    experiments: tuple[str, ...] = EXPERIMENTS  # files of config/, without the .py; or all
    out: str = "out/demo"  # folder of the runs, the figure and the table
    seeds: int = 3  # runs a reward
    steps: int = 0  # steps a run; 0 = as many as config/model/tiny.py says
    jobs: int = 2  # runs at a time, one core each


@dataclass
class Job:
    """One run of the demo: its folder, its train.py arguments, its process once started."""

    folder: Path
    args: list[str]
    process: subprocess.Popen | None = None

    @property
    def log(self) -> Path:
        return self.folder.with_name(self.folder.name + ".log")

    @property
    def steps_done(self) -> int:
        rows = read_jsonl(self.folder / "metrics.jsonl")
        return rows[-1]["step"] if rows else 0


def plan(cfg: DemoConfig) -> list[Job]:
    """The runs of the demo, seed by seed, so that a half-done demo has every reward."""
    known = sorted(path.stem for path in (PROJECT / "config").glob("*.py"))
    experiments = known if cfg.experiments == ("all",) else cfg.experiments
    if unknown := [name for name in experiments if name not in known]:
        raise UserError(f"experiments={unknown[0]}: no such file: there are {', '.join(known)}")
    jobs = []
    for seed in range(cfg.seeds):
        for experiment in experiments:
            folder = Path(cfg.out) / f"{experiment}-seed{seed}"
            args = [f"config/{experiment}.py", SCALE, f"--seed={seed}", f"--out_dir={folder}"]
            jobs.append(Job(folder, args + [f"--steps={cfg.steps}"] * (cfg.steps > 0)))
    return jobs


def state(job: Job) -> str:
    """What is to be done with a run: "new", "resume", "complete", or "restart" (no checkpoint).

    Raises UserError where the folder is in use or holds a run of another configuration.
    """
    if not (job.folder / "config.json").exists():
        return "new"
    with open(job.folder / "lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{job.folder}: another process is running in it") from error
    wanted = json.loads(json.dumps(asdict(configure(Config, job.args)[0])))  # no tuples
    saved = read_config(job.folder)
    for key, value in wanted.items():
        if key not in ("out_dir", "resume") and saved.get(key) != value:
            raise UserError(f"{job.folder}: holds a run with {key}={saved.get(key)}, not {value}: "
                            "delete the folder, or name another --out")  # fmt: skip
    if job.steps_done == wanted["steps"]:
        return "complete"
    return "resume" if (job.folder / "state.safetensors").exists() else "restart"


def start(job: Job) -> None:
    """Start a run as a process of its own, on one core, its output going to the log."""
    todo = state(job)
    if todo == "restart":
        shutil.rmtree(job.folder)
    args = [*job.args, *(["--resume=True"] if todo == "resume" else [])]
    with open(job.log, "a" if todo == "resume" else "w") as log:
        job.process = subprocess.Popen(
            [sys.executable, str(PROJECT / "train.py"), *args],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # more threads than cores in all would wait for one another
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def run_jobs(jobs: list[Job], at_once: int, poll: float = 1.0) -> None:
    """Run what is not complete. Raises UserError naming the log of a run that fails.

    However this ends, no process is left behind; a run that was stopped keeps its checkpoint.
    """
    waiting = [job for job in jobs if state(job) != "complete"]
    running: list[Job] = []
    steps = {job.folder: job.steps_done for job in jobs}
    total = sum(int(configure(Config, job.args)[0].steps) for job in jobs)
    bar = tqdm(total=total, initial=sum(steps.values()), desc=f"{len(jobs)} runs", unit="step")
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                start(waiting[0])
                running.append(waiting.pop(0))
            time.sleep(poll)
            for job in list(running):
                status = job.process.poll()
                steps[job.folder] = job.steps_done
                if status:
                    raise UserError(f"{job.log}: {_last_line(job.log)} (exit status {status})")
                if status == 0:
                    running.remove(job)
            bar.n = sum(steps.values())
            bar.refresh()
    finally:
        bar.close()
        for job in running:
            job.process.terminate()
        for job in running:
            job.process.wait()


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "no output")


def table(arms: list[Arm]) -> str:
    """A markdown table: the last evals, under those of the base at the same seeds, and how the
    trained reward went, from the first five steps to the last five."""
    keys = ("eval_accuracy", "eval_code_frequency", "eval_boxed")
    lines = ["| reward | seeds | accuracy | code frequency | boxed | the reward itself |",
             "|---|--:|--:|--:|--:|--:|"]  # fmt: skip
    base = Arm("before training", [], arms[0].runs)
    for arm, i in [(base, 0), *((arm, -1) for arm in arms)]:
        cells = [cell(*arm.curve(key)[1:], i) for key in keys]
        reward = arm.curve("reward", smooth=5)[1]
        n = len(reward)
        went = f"{reward[min(4, n - 1)]:.3g} to {reward[-1]:.3g}" if i and n else ""
        lines.append("| " + " | ".join([arm.label, str(len(arm.runs)), *cells, went]) + " |")
    lines += ["", "Percent of eval responses, ± 1 standard error over seeds (over problems where "
              "there is one seed); the reward in its own unit, mean of 5 steps."]  # fmt: skip
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    cfg, _ = configure(DemoConfig, argv)
    for key, least in (("seeds", 1), ("jobs", 1), ("steps", 0)):
        if getattr(cfg, key) < least:
            raise UserError(f"{key}={getattr(cfg, key)}: must be at least {least}")
    jobs = plan(cfg)
    kept = sum(state(job) == "complete" for job in jobs)
    if kept:
        print(f"{kept} of {len(jobs)} runs are complete and kept (delete {cfg.out} to start anew)")
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it ends the runs, too
    tiny.resolve("tiny")  # built once, before several runs would each do it
    try:
        run_jobs(jobs, cfg.jobs)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on, logs are in {cfg.out}", file=sys.stderr)
        raise
    arms = load_arms([job.folder for job in jobs])
    text = table(arms)
    (Path(cfg.out) / "table.md").write_text(text + "\n")
    print(f"\n{text}\n\ntable: {cfg.out}/table.md")
    if len(arms) <= MOST_ARMS:
        draw(arms, Path(cfg.out) / "demo.png", PANELS)
        print(f"figure: {cfg.out}/demo.png")
    else:
        print(f"no figure of {len(arms)} rewards: python -m tools.plot draws those you name")


if __name__ == "__main__":
    run(main)
