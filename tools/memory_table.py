"""What the scale files need on cards of 8 to 24 GB and how long they take: computed, not run.

    python -m tools.memory_table

Three tables: the plan (harness/plan.py) of each scale file and what rollout_weights=auto picks on
each card; what a decoding step moves and launches; the hours of a run. docs/SPEED.md says what is
assumed. This takes a minute.
"""

import math

import torch

from harness.configurator import configure
from harness.errors import run
from harness.plan import USABLE, DecodeWeights, Plan, decoded_tokens
from harness.shapes import meta_model, planned
from settings import Config
from tools.parts.roofline import kernels_per_step, rollout_traffic
from tools.parts.workload import model_config

# Scale file, further settings, shape.
RECIPES = [
    ("qwen2.5_math_1.5b", [], "qwen2.5-1.5b"),
    ("qwen2.5_math_1.5b", ["--rollout_rows=32", "--micro_batch_tokens=2048"], "qwen2.5-1.5b"),
    ("qwen2.5_math_1.5b_paper", [], "qwen2.5-1.5b"),
    ("qwen2.5_math_1.5b_paper", ["--rollout_rows=24", "--micro_batch_tokens=4096"], "qwen2.5-1.5b"),
    ("qwen2.5_math_7b", [], "qwen2.5-7b"),
]
CARDS = (8, 12, 16, 24)  # GiB, as they are sold
CONTEXT = 6e8  # bytes that CUDA itself takes; a desktop takes more
BANDWIDTH = 0.85 * 1008e9  # bytes per second: 85 % of an RTX 4090's
ARITHMETIC = 0.5 * 165e12  # FLOP per second in bf16: half of an RTX 4090's
KERNEL = 2e-6  # seconds that a kernel takes at least, in a graph, too


def recipe(name: str, more: list[str], shape: str, room: float) -> tuple[Config, Plan]:
    cfg, _ = configure(Config, [f"config/model/{name}.py", *more])
    return cfg, planned(cfg, model_config(shape), int(room))


def picks(plan: Plan, gb: float) -> tuple[DecodeWeights, int] | None:
    """What auto picks on an otherwise idle card of gb GiB; None if nothing fits."""
    plan.device = int(gb * 2**30 - CONTEXT)
    how, rows, _ = plan.choose("auto")
    return (how, rows) if plan.need(how, rows) <= USABLE * plan.device else None


def step_seconds(
    cfg: Config, plan: Plan, how: DecodeWeights, rows: int, kernels: int, traffic: dict
) -> dict:
    """Seconds of a training step by phase, and of an eval, by the assumptions above."""
    B = cfg.prompts_per_step * cfg.group_size
    prompt, mean = cfg.max_prompt_tokens / 2, traffic["tokens"] / B
    column = plan.row_cache / decoded_tokens(cfg)
    moved = traffic["steps"] * plan.step_bytes(how, 0) + traffic["columns"] * column
    decoding = moved / BANDWIDTH + traffic["steps"] * kernels * KERNEL
    weights = (plan.merged + plan.head) / 2  # a forward takes 2 FLOP for each, and token
    forward = 2 * weights / ARITHMETIC
    tokens = B * (prompt + mean)
    micro_batches = math.ceil(tokens / cfg.micro_batch_tokens)
    unpack = plan.unmerged / BANDWIDTH  # 4-bit weights are made bf16 in every pass
    return {
        "sample": decoding + cfg.prompts_per_step * prompt * forward,
        "score": 2 * (tokens * forward + micro_batches * unpack),  # policy and base
        # Forward, the same again for backward, and the gradients of activations.
        "update": 3 * (tokens * forward + micro_batches * unpack),
        "eval": decoding * (cfg.eval_n or 500) / B,  # by its rows; MATH-500 has 500
    }


def hours(cfg: Config, seconds: dict) -> float:
    evals = cfg.steps // cfg.eval_every + 1
    step = sum(seconds[phase] for phase in ("sample", "score", "update"))
    return (cfg.steps * step + evals * seconds["eval"]) / 3600


def main(argv: list[str]) -> None:
    table(["recipe", "kept", "freed", "adapter", *(f"{gb} GB" for gb in CARDS)], "|--:|--:|--:")
    for name, more, shape in RECIPES:
        _, plan = recipe(name, more, shape, 24e9)
        needs = [f"{plan.need(how) / 1e9:.1f}" for how in ("kept", "freed", "adapter")]
        chosen = [picks(plan, gb) for gb in CARDS]
        cells = [f"{c[0]} {c[1]}: {plan.need(*c) / 1e9:.1f}" if c else "-" for c in chosen]
        row([" ".join([name, *more]), *needs, *cells])
    print()
    table(["recipe", "weights", "GB", "kernels", "ms", "tokens/s"], "|---" + "|--:" * 4)
    for name, more, shape in RECIPES:
        cfg, plan = recipe(name, more, shape, 24e9)
        for how in ("kept", "adapter"):
            moved = plan.step_bytes(how, plan.rows)
            seconds = moved / BANDWIDTH
            cells = [f"{moved / 1e9:.1f}", f"{kernels(cfg, shape, how):,}"]
            cells += [f"{1e3 * seconds:.1f}", f"{plan.rows / seconds:,.0f}"]
            row([" ".join([name, *more]), "merged" if how == "kept" else how, *cells])
    print()
    table(
        [
            "recipe, card",
            "decoding",
            "sample s",
            "score s",
            "update s",
            "needed",
            "graphs",
            "hours",
        ],
        "|---" + "|--:" * 6,
    )
    for name, more, shape in RECIPES:
        cfg, plan = recipe(name, more, shape, 24e9)
        seen = set()
        for gb in CARDS:
            if not (chosen := picks(plan, gb)) or chosen in seen:
                continue
            seen.add(chosen)
            how, rows = chosen
            traffic = rollout_traffic(cfg, rows)
            launched = kernels(cfg, shape, how)
            seconds = step_seconds(cfg, plan, how, rows, launched, traffic)
            cells = [f"{seconds[phase]:.1f}" for phase in ("sample", "score", "update")]
            cells += [f"{traffic['needed']:.2f}", traffic["graphs"], f"{hours(cfg, seconds):.1f}"]
            row([f"{' '.join([name, *more])}, {gb} GB", f"{how} {rows}", *cells])


def kernels(cfg: Config, shape: str, how: DecodeWeights) -> int:
    """Kernels of a decoding step in bf16. Their number does not depend on rows and columns."""
    config = model_config(shape)
    model = meta_model(config, cfg.quant, cfg.lora_r, torch.bfloat16, False)
    return kernels_per_step(model, how != "adapter", 2, 64)


def table(titles: list[str], alignment: str) -> None:
    row(titles)
    print("|---" + alignment + "|---" * (len(titles) - 1 - alignment.count("|")) + "|")


def row(cells: list) -> None:
    print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    run(main)
