"""List the rewards, or score saved completions with them.

python -m tools.rewards                                                   list the rewards
python -m tools.rewards --completions=FILE                                score with all
python -m tools.rewards --reward='format & ~python' --completions=FILE    score with one
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch

from evaluation.scores import problem_of
from harness.configurator import configure
from harness.errors import UserError, run
from rewards import REGISTRY, auroc, parse, watched
from tasks import answers
from tasks.datasets import load_completions


@dataclass
class ScoreConfig:
    """List the rewards, or score saved completions with one of them, or with all."""

    reward: str = ""  # an expression, such as 'format & ~python'; "" = all that need only text
    completions: str = ""  # a .jsonl: problem, answer, completions; optional: correct, label


def read_completions(path: str) -> tuple[SimpleNamespace, list[bool] | None]:
    """Saved completions as rollouts without a model's fields; their `correct` column or None."""
    rows = load_completions(path)
    flat = [(i, j, row) for i, row in enumerate(rows) for j in range(len(row["completions"]))]
    labelled = all("label" in row for row in rows)
    rollouts = SimpleNamespace(
        text=[row["completions"][j] for _, j, row in flat],
        problem=[problem_of(row) for *_, row in flat],
        group_size=max(len(row["completions"]) for row in rows),
        seed=0,
        step=0,
        prompt_index=torch.tensor([i for i, _, _ in flat]),
        sample_index=torch.tensor([j for _, j, _ in flat]),
        label=[str(row["label"]) for *_, row in flat] if labelled else None,
        cluster=None,
    )
    if not all(row.get("correct") for row in rows):
        return rollouts, None
    return rollouts, [bool(row["correct"][j]) for _, j, row in flat]


def list_rewards() -> None:
    """Print each reward with its formula, its source and the fields that it needs."""
    for _, entry in sorted(REGISTRY.items()):
        # a reward whose needs depend on its arguments has a function there
        fixed_needs = entry.needs and not callable(entry.needs)
        needs = f"; needs {', '.join(entry.needs)}" if fixed_needs else ""
        print(f"{entry.call:32} {entry.formula} [{entry.source}{needs}]")


def print_score(name: str, score: np.ndarray, correct: np.ndarray) -> None:
    """Print a row: mean, share above 0, agreement with `correct` (of 0 and 1 alone), AUROC."""
    agreement, area = "-", "-"
    if np.isin(score, (0, 1)).all():
        agreement = f"{((score == 1) == correct).mean():.4f}"
    if not math.isnan(auroc(score, correct)):
        area = f"{auroc(score, correct):.4f}"
    positive = (score > 0).mean()
    print(f"{name:<22}{score.mean():>9.4f}{positive:>11.4f}{agreement:>11}{area:>9}")


def main(argv: list[str]) -> None:
    cfg, _ = configure(ScoreConfig, argv)
    if not cfg.completions:
        if cfg.reward:
            raise UserError("scoring needs completions too: add --completions=FILE")
        list_rewards()
        return
    rollouts, marks = read_completions(cfg.completions)
    chosen = [parse(cfg.reward)] if cfg.reward else watched()
    graded = answers.correct(rollouts.text, rollouts.problem) if marks is None else marks
    correct = np.array(graded)
    how = "graded here" if marks is None else "their column"
    print(f"{len(correct)} completions, {correct.mean():.4f} correct ({how})")
    print(f"{'reward':<22}{'mean':>9}{'share > 0':>11}{'agreement':>11}{'AUROC':>9}")
    for score_fn in chosen:
        if not cfg.reward and score_fn.missing(rollouts):
            continue
        print_score(str(score_fn), score_fn(rollouts).numpy(), correct)


if __name__ == "__main__":
    run(main)
