"""Rewards on the tiny world, a few seeds each, one figure and one table: minutes on two cores.

    python -m tools.demo --out=out/demo --seeds=3
    python -m tools.demo --experiments=all --out=out/rewards        (every file of config/)

Each run is an ordinary `train.py`; a demo that was stopped goes on where it was.
"""

from dataclasses import dataclass
from pathlib import Path

from harness.configurator import PROJECT, configure
from harness.errors import UserError, run
from tools.parts.arms import Arm, load_arms
from tools.parts.jobs import Job, how_many, run_all
from tools.plot import MOST_ARMS, cell, draw

EXPERIMENTS = ("ground_truth", "random_reward", "format", "python_reward")
SCALE = "config/model/tiny.py"
PANELS = ("eval_accuracy", "accuracy", "code_frequency", "boxed", "clip_frac", "entropy")


@dataclass
class DemoConfig:
    """Train rewards on the tiny world and compare them: python -m tools.demo [--key=value]"""

    experiments: tuple[str, ...] = EXPERIMENTS  # files of config/, without the .py; or all
    out: str = "out/demo"  # folder of the runs, the figure and the table
    seeds: int = 3  # runs a reward
    steps: int = 0  # steps a run; 0 = as many as config/model/tiny.py says
    jobs: int = 0  # runs at a time, one core each; 0 = as many as cores and memory allow


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
            args = [f"config/{experiment}.py", SCALE, f"--seed={seed}"]
            jobs.append(Job(folder, args + [f"--steps={cfg.steps}"] * (cfg.steps > 0)))
    return jobs


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
    for key, least in (("seeds", 1), ("jobs", 0), ("steps", 0)):
        if getattr(cfg, key) < least:
            raise UserError(f"{key}={getattr(cfg, key)}: must be at least {least}")
    jobs = plan(cfg)
    run_all(jobs, cfg.jobs or how_many(jobs), Path(cfg.out))
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
