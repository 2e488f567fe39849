"""Train a few rewards on the tiny world, a few seeds each, and compare them. Takes minutes.

    python -m tools.demo --out=out/demo --seeds=3
    python -m tools.demo --experiments=all --out=out/rewards        (every file of config/)

Each run is an ordinary `train.py`. The same command continues a demo that was stopped.
"""

from dataclasses import dataclass
from pathlib import Path

from harness.configurator import PROJECT, configure
from harness.errors import UserError, run
from tools.parts.arms import Arm, load_arms
from tools.parts.jobs import Job, how_many, run_all
from tools.parts.panels import MOST_ARMS, draw_metrics
from tools.parts.style import save_figure
from tools.parts.tables import markdown_table, percent, save_text

EXPERIMENTS = ("ground_truth", "random_reward", "format", "python_reward")
SCALE = "config/model/tiny.py"
DEMO_METRICS = ("eval_accuracy", "accuracy", "code_frequency", "boxed", "clip_frac", "entropy")


@dataclass
class DemoConfig:
    """Train rewards on the tiny world and compare them: python -m tools.demo [--key=value]"""

    experiments: tuple[str, ...] = EXPERIMENTS  # files of config/, without the .py; or all
    out: str = "out/demo"  # folder of the runs, the figure and the table
    seeds: int = 3  # runs per reward
    steps: int = 0  # steps per run; 0 = as in config/model/tiny.py
    jobs: int = 0  # runs at a time, one core each; 0 = as many as cores and memory allow


def demo_jobs(cfg: DemoConfig) -> list[Job]:
    """The runs of the demo, seed by seed, so that a half-finished demo has every reward."""
    known = sorted(path.stem for path in (PROJECT / "config").glob("*.py"))
    experiments = known if cfg.experiments == ("all",) else cfg.experiments
    if unknown := [name for name in experiments if name not in known]:
        raise UserError(f"experiments={unknown[0]}: no such file: there are {', '.join(known)}")
    steps = [f"--steps={cfg.steps}"] if cfg.steps else []
    jobs = []
    for seed in range(cfg.seeds):
        for experiment in experiments:
            folder = Path(cfg.out) / f"{experiment}-seed{seed}"
            jobs.append(Job(folder, [f"config/{experiment}.py", SCALE, f"--seed={seed}", *steps]))
    return jobs


def demo_table(arms: list[Arm]) -> str:
    """A markdown table: the evals before training (at the same seeds) and at the end of each arm,
    and how the trained reward changed from the first five steps to the last five."""
    head = ["reward", "seeds", "accuracy", "code frequency", "boxed", "the reward itself"]
    before = Arm("before training", [], arms[0].runs)
    rows = [[*_eval_cells(before, 0), ""]]
    rows += [[*_eval_cells(arm, -1), _reward_change(arm)] for arm in arms]
    note = (
        "Percent of eval responses, ± 1 standard error over seeds (over problems where there is "
        "one seed); the reward in its own unit, mean of 5 steps."
    )
    return f"{markdown_table(head, rows)}\n\n{note}"


def _eval_cells(arm: Arm, i: int) -> list[str]:
    """Label, seeds, and the i-th eval of an arm."""
    keys = ("eval_accuracy", "eval_code_frequency", "eval_boxed")
    cells = []
    for key in keys:
        _, mean, error = arm.curve(key)
        cells.append(percent(mean, error, i))
    return [arm.label, str(len(arm.runs)), *cells]


def _reward_change(arm: Arm) -> str:
    _, reward, _ = arm.curve("reward", smooth=5)
    if not len(reward):
        return ""
    first = reward[min(4, len(reward) - 1)]
    return f"{first:.3g} to {reward[-1]:.3g}"


def main(argv: list[str]) -> None:
    cfg, _ = configure(DemoConfig, argv)
    for key, least in (("seeds", 1), ("jobs", 0), ("steps", 0)):
        if getattr(cfg, key) < least:
            raise UserError(f"{key}={getattr(cfg, key)}: must be at least {least}")
    jobs = demo_jobs(cfg)
    out = Path(cfg.out)
    run_all(jobs, cfg.jobs or how_many(jobs), out)
    arms = load_arms([job.folder for job in jobs])
    text = demo_table(arms)
    save_text(text, out / "table.md")
    print(f"\n{text}\n\ntable: {out}/table.md")
    if len(arms) <= MOST_ARMS:
        save_figure(draw_metrics(arms, DEMO_METRICS), out / "demo.png")
        print(f"figure: {out}/demo.png")
    else:
        print(f"no figure, {len(arms)} rewards are too many: name some for python -m tools.plot")


if __name__ == "__main__":
    run(main)
