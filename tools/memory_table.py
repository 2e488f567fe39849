"""What the scale files need on cards of 8 to 24 GB, computed and not run.

    python -m tools.memory_table

The plan (harness/memory.py) of each scale file's shape in bf16, in GB, with the rollout weights
that `auto` picks; - where nothing fits. Then the bytes that a decoding step reads at
the least, and the time of that at 85 % of an RTX 4090's bandwidth.
"""

from harness.configurator import configure
from harness.errors import run
from harness.memory import USABLE, Plan
from harness.shapes import planned
from settings import Config
from tools.parts.workload import model_config

# Scale file, further settings, shape.
RECIPES = [
    ("qwen2.5_math_1.5b", [], "qwen2.5-1.5b"),
    ("qwen2.5_math_1.5b", ["--rollout_rows=32", "--micro_batch_tokens=2048"], "qwen2.5-1.5b"),
    ("qwen2.5_math_1.5b_paper", [], "qwen2.5-1.5b"),
    ("qwen2.5_math_1.5b_paper", ["--rollout_rows=24", "--micro_batch_tokens=4096"], "qwen2.5-1.5b"),
    ("qwen2.5_math_7b", [], "qwen2.5-7b"),
    ("qwen2.5_math_7b", ["--rollout_rows=32"], "qwen2.5-7b"),
]
CARDS = (8, 12, 16, 24)  # GiB, as they are sold
BANDWIDTH = 0.85 * 1008e9  # bytes a second
CONTEXT = 6e8  # bytes that CUDA itself takes; a desktop takes more


def recipe(name: str, more: list[str], shape: str, room: float) -> tuple[Config, Plan]:
    cfg, _ = configure(Config, [f"config/model/{name}.py", *more])
    return cfg, planned(cfg, model_config(shape), int(room))


def picks(plan: Plan, gb: float) -> str:
    """What auto picks on an otherwise idle card of gb GiB; - where it does not fit."""
    plan.device = int(gb * 2**30 - CONTEXT)
    how, _ = plan.choose("auto")
    return how if plan.need(how) <= USABLE * plan.device else "-"


def decode_bytes(cfg: Config, plan: Plan, shape: str, merged: bool) -> float:
    """Read by a step of all rows half-way through: weights, head, half of the cache.

    By base and adapter each layer's 4-bit weight is read, written in bf16 and read again, as
    bitsandbytes does it for many rows; its fused product would read a ninth of that.
    """
    config = model_config(shape)
    head = 2 * config.vocab_size * config.hidden_size
    weights = plan.merged if merged else plan.merged * (2 + 2 + 0.52) / 2
    filled = cfg.max_prompt_tokens / 2 + cfg.max_new_tokens / 2  # prompts are half as long
    return weights + head + plan.cache * filled / (cfg.max_prompt_tokens + cfg.max_new_tokens)


def main(argv: list[str]) -> None:
    wide = " | ".join(f"{gb} GB" for gb in CARDS)
    print(f"| recipe | kept | freed | adapter | {wide} |")
    print("|---|--:|--:|--:|" + "---|" * len(CARDS))
    for name, more, shape in RECIPES:
        _, plan = recipe(name, more, shape, 24e9)
        needs = " | ".join(f"{plan.need(how) / 1e9:.1f}" for how in ("kept", "freed", "adapter"))
        chosen = " | ".join(picks(plan, gb) for gb in CARDS)
        print(f"| {' '.join([name, *more])} | {needs} | {chosen} |")
    print("\n| recipe | GB a step, merged | ms | tokens/s | GB, base and adapter | ms | tokens/s |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for name, more, shape in RECIPES:
        cfg, plan = recipe(name, more, shape, 24e9)
        cells = []
        for merged in (True, False):
            read = decode_bytes(cfg, plan, shape, merged)
            seconds = read / BANDWIDTH
            cells += [f"{read / 1e9:.1f}", f"{1e3 * seconds:.1f}", f"{plan.rows / seconds:,.0f}"]
        print(f"| {' '.join([name, *more])} | {' | '.join(cells)} |")


if __name__ == "__main__":
    run(main)
