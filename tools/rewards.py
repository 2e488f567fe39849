"""List the rewards, or score saved completions with them.

python -m tools.rewards                                                   list the rewards
python -m tools.rewards --completions=FILE                                score by all of them
python -m tools.rewards --reward='format & ~python' --completions=FILE    score by one
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch

import grading
from data import load_completions
from harness.configurator import configure
from harness.errors import UserError, run
from rewards import REGISTRY, auroc, parse, watched


@dataclass
class ScoreConfig:
    """List the rewards, or score saved completions with one of them, or with all."""

    reward: str = ""  # an expression, such as 'format & ~python'; "" = all that text alone decides
    completions: str = ""  # a .jsonl with problem, answer, completions and, if any, correct, label


def read_completions(path: str) -> tuple[SimpleNamespace, list[bool] | None]:
    """(rollouts without a model's fields, the `correct` column or None) of saved completions."""
    rows = load_completions(path)
    flat = [(i, j, row) for i, row in enumerate(rows) for j in range(len(row["completions"]))]
    rollouts = SimpleNamespace(
        text=[row["completions"][j] for _, j, row in flat],
        problem=[SimpleNamespace(problem=row["problem"], answer=row["answer"]) for *_, row in flat],
        group_size=max(len(row["completions"]) for row in rows),
        seed=0,
        step=0,
        prompt_index=torch.tensor([i for i, _, _ in flat]),
        sample_index=torch.tensor([j for _, j, _ in flat]),
        label=[str(row["label"]) for *_, row in flat] if all("label" in r for r in rows) else None,
        cluster=None,
    )
    if not all(row.get("correct") for row in rows):
        return rollouts, None
    return rollouts, [bool(row["correct"][j]) for _, j, row in flat]


def _list_rewards() -> None:
    for _, entry in sorted(REGISTRY.items()):
        needs = f"; needs {', '.join(entry.needs)}" if not callable(entry.needs) else ""
        print(f"{entry.call:32} {entry.formula} [{entry.source}{needs if entry.needs else ''}]")


def main(argv: list[str]) -> None:
    cfg, _ = configure(ScoreConfig, argv)
    if not cfg.completions:
        if cfg.reward:
            raise UserError("scoring wants completions too: add --completions=FILE")
        _list_rewards()
        return
    rollouts, marks = read_completions(cfg.completions)
    chosen = [parse(cfg.reward)] if cfg.reward else watched()
    golds = [p.answer for p in rollouts.problem]
    label = np.array(grading.correct(rollouts.text, golds) if marks is None else marks)
    print(f"{len(label)} completions, {label.mean():.4f} correct "
          f"({'graded here' if marks is None else 'their column'})")  # fmt: skip
    print(f"{'reward':<22}{'mean':>9}{'share > 0':>11}{'agreement':>11}{'AUROC':>9}")
    for score_fn in chosen:
        if not cfg.reward and score_fn.missing(rollouts):
            continue
        score = score_fn(rollouts).numpy()
        binary = np.isin(score, (0, 1)).all()
        agreement = f"{((score == 1) == label).mean():.4f}" if binary else "-"
        area = auroc(score, label)
        print(f"{str(score_fn):<22}{score.mean():>9.4f}{(score > 0).mean():>11.4f}"
              f"{agreement:>11}{'-' if math.isnan(area) else f'{area:.4f}':>9}")  # fmt: skip


if __name__ == "__main__":
    run(main)
