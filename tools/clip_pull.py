"""Measure which way the clip pulls at a model's base policy, without any effect of training.

    python -m tools.clip_pull config/study/real_pull.py config/model/smollm2_135m.py \\
        --rates=1e-5,3e-5,1e-4 --batches=10 --results=docs/results/clip_pull_smollm2.jsonl

Every batch is sampled and scored under the base policy. Then each learning rate in turn makes the
updates of one step and is undone. A positive pull means that the clip moved probability to the
likeliest token (grpo.clip_pull). One line per batch and rate is appended to the results, and the
same command continues from what is there.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import train
from data import partition
from harness.checkpoint import FREE
from harness.configurator import configure
from harness.errors import UserError, run
from harness.runfiles import read_jsonl
from lora import trainable
from settings import Config
from tools.parts.intervals import mean_and_half_width
from tools.parts.tables import markdown_table

KEPT = ("clip_frac_low", "clip_frac_high", "clip_pull_low", "clip_pull_high", "ratio_max")


@dataclass
class PullConfig(Config):
    """Every setting of train.py, and:"""

    rates: tuple[float, ...] = (1e-5, 3e-5, 1e-4)  # learning rates; each gives a clip fraction
    batches: int = 10  # batches, each from the base policy
    results: str = ""  # .jsonl that gets one line per batch and rate
    out_dir: str = "out/clip_pull"


def identity(cfg: PullConfig) -> dict:
    """The settings that a line of the results depends on."""
    free = (*FREE, "lr", "rates", "batches", "results", "out_dir", "resume")
    settings = asdict(cfg).items()
    return {key: value for key, value in settings if key not in free and key[:5] != "eval_"}


def read_results(path: Path, cfg: PullConfig) -> list[dict]:
    """The lines of the results. Raises UserError if they are of other settings."""
    rows = read_jsonl(path) if path.exists() else []
    wanted = json.loads(json.dumps(identity(cfg)))
    for row in rows:
        changed = [key for key in wanted if row["settings"].get(key) != wanted[key]]
        if changed:
            raise UserError(f"results={path}: of another {changed[0]}: name another file")
    return rows


def measure(cfg: PullConfig, path: Path) -> None:
    """Measure the batches and rates that the results do not have yet."""
    done = {(row["batch"], row["lr"]) for row in read_results(path, cfg)}
    wanted = [(b, lr) for b in range(1, cfg.batches + 1) for lr in cfg.rates]
    if done.issuperset(wanted):
        return
    r = train.setup(cfg)
    with r.folder, tqdm(total=len(wanted), desc="steps", initial=len(done & set(wanted))) as bar:
        for batch in range(1, cfg.batches + 1):
            left = [lr for lr in cfg.rates if (batch, lr) not in done]
            if left:
                for row in measure_batch(r, batch, left):
                    row["settings"] = identity(cfg)
                    with path.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    bar.update(1)


def measure_batch(r: train.Run, batch: int, rates: list[float]) -> list[dict]:
    """Sample and score one batch under the base policy, then make and undo a step at each rate."""
    cfg, model = r.cfg, r.model
    start = {name: value.detach().clone() for name, value in trainable(model).items()}
    with train.decode_with(model, r.decode_weights):
        rollouts = train.sample_rollouts(model, r.tokenizer, r.items, cfg, batch)
    advantage = train.judge(r, rollouts).advantage
    idle = train.no_gradient(rollouts, advantage, cfg).numpy()
    total = (rollouts.prompt_len + rollouts.length).tolist()
    parts = partition(total, cfg.updates_per_step, cfg.micro_batch_tokens, cfg.seed, batch, idle)
    train.score(model, rollouts, parts, cfg)
    rows = []
    for lr in rates:
        one = replace(cfg, lr=lr)
        metrics = train.update(
            model, train.make_optimizer(model, one), rollouts, advantage, parts, one
        )
        tokens = int(rollouts.length.sum())
        rows.append({"batch": batch, "lr": lr, "tokens": tokens, **{k: metrics[k] for k in KEPT}})
        with torch.no_grad():
            for name, value in trainable(model).items():
                value.copy_(start[name])
    return rows


def per_clipped(pull: np.ndarray, share: np.ndarray) -> tuple[float, float] | None:
    """Pull per clipped token over all batches, and half its 95 % bootstrap interval over batches.

    Returns None if nothing was clipped.
    """
    if share.sum() == 0:
        return None
    draws = np.random.default_rng(0).integers(0, len(share), (2000, len(share)))
    clipped = share[draws].sum(1)
    ratios = pull[draws].sum(1)[clipped > 0] / clipped[clipped > 0]
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(pull.sum() / share.sum()), float(high - low) / 2


def summarize(rows: list[dict]) -> list[dict]:
    """One row per learning rate: clip fractions, pull per token and per clipped token."""
    table = []
    for lr in sorted({row["lr"] for row in rows}):
        mine = [row for row in rows if row["lr"] == lr]
        column = {key: np.array([row[key] for row in mine], dtype=float) for key in KEPT}
        out = {"lr": lr, "batches": len(mine), "tokens": sum(row["tokens"] for row in mine)}
        for side in ("high", "low"):
            pull, share = column[f"clip_pull_{side}"], column[f"clip_frac_{side}"]
            out[f"clip_frac_{side}"] = float(share.mean())
            out[f"pull_{side}"] = mean_and_half_width(pull)
            out[f"per_clipped_{side}"] = per_clipped(pull, share)
        both = column["clip_pull_high"] + column["clip_pull_low"]
        out["pull_both"] = mean_and_half_width(both)
        table.append(out)
    return table


def text_of(table: list[dict]) -> str:
    """The summary as a markdown table, with 95 % intervals over batches."""

    def cell(value: tuple[float, float] | None, scale: float = 1) -> str:
        return "-" if value is None else f"{value[0] * scale:+.3f} ± {value[1] * scale:.3f}"

    head = ["lr", "batches", "tokens", "clipped from above", "from below"]
    head += ["pull per clipped token, above", "below", "pull per 1000 tokens, above", "below"]
    lines = [
        [
            f"{t['lr']:g}",
            str(t["batches"]),
            f"{t['tokens']:,}",
            f"{t['clip_frac_high']:.2%}",
            f"{t['clip_frac_low']:.2%}",
            cell(t["per_clipped_high"]),
            cell(t["per_clipped_low"]),
            cell(t["pull_high"], 1000),
            cell(t["pull_low"], 1000),
        ]
        for t in table
    ]
    return markdown_table(head, lines)


def main(argv: list[str]) -> None:
    cfg, _ = configure(PullConfig, argv)
    if cfg.batches < 1 or not cfg.rates or not cfg.results:
        raise UserError("name --results=FILE.jsonl, --rates=A,B,... and --batches of at least 1")
    path = Path(cfg.results)
    path.parent.mkdir(parents=True, exist_ok=True)
    measure(cfg, path)
    table = summarize(read_results(path, cfg))
    print(f"\n{text_of(table)}\n")
    print(json.dumps(table))


if __name__ == "__main__":
    run(main)
