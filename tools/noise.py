"""Measure how far rounding alone moves a model's log-ratios. Smaller clip fractions mean nothing.

    python -m tools.noise --model=FOLDER
    python -m tools.noise --model=FOLDER --quant=nf4 --clip_low=0.1 --clip_high=0.1
    python -m tools.noise --model=FOLDER --dtype=float32     (the effect of the update itself)

The model answers a few problems. Its responses are scored in one micro-batch, and then again:

    shape     with the same weights, one response at a time. All ratios should be 1.
    update    in one micro-batch, after every trained weight has moved by lr against the sign of its
              gradient, as in AdamW's first update. --dtype=float32 shows how far this moves the
              true ratios: by 1.5e-4 and 1.5e-3 on SmolLM2-135M, where bf16 shows .03 and .04. The
              difference is rounding.

The table has the spread of the log-ratios and the share of tokens outside the clip's band, first
with logits in fp32, as nanoRLVR computes them, then with logits rounded to bf16, as a head in bf16
returns them. A clip fraction as small as that share says nothing about the clip. The last line
printed is one JSON object.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import nn

import model as model_module
from data import PROMPTS, render_prompt
from engine import TRAIN_NOISE, Generation, generate
from eval import check_positions, choose_device
from harness.configurator import configure
from harness.errors import UserError, run
from harness.loading import load_model, load_tokenizer
from lora import add_lora, merged, trainable
from model import TokenStats, end_token_ids, token_stats
from tasks import tiny

PROBLEMS = (
    "What is the sum of the first ten positive odd integers?",
    "A train travels 180 miles in 3 hours. At that speed, how far does it go in 5 hours?",
    "Solve $x^2 - 5x + 6 = 0$ and give the larger root.",
    "How many ways are there to choose 3 books out of 8?",
)
RATES = (1e-7, 1e-6)
STATISTICS = ("logp", "entropy", "self_certainty")


@dataclass
class NoiseConfig:
    """Measure how far rounding moves ratios: python -m tools.noise --model=FOLDER"""

    model: str = "tiny"  # hub id, local folder, or tiny / tiny_bad
    quant: Literal["none", "nf4"] = "none"  # 4-bit weights through bitsandbytes
    lora_r: int = 32  # rank of the adapter; 0 trains all weights (float32)
    prompt: str = ""  # prompt format; "" = qwen_math where there is a chat template, else none
    group: int = 2  # responses to each of the four problems
    max_new_tokens: int = 64  # response budget, tokens
    temperature: float = 1.0  # for sampling and scoring
    clip_low: float = 0.2  # the clip's band begins at 1 - clip_low
    clip_high: float = 0.2  # the band ends at 1 + clip_high
    seed: int = 0  # for samples and advantages
    device: str = "auto"  # auto = cuda where there is one, else cpu
    threads: int = 0  # torch's on the CPU; 0 = as train.py sets them
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of weights or, with nf4, computation


@contextmanager
def bf16_logits() -> Iterator[None]:
    """Within this context, logits are rounded to bf16 before scores are computed."""
    ours = model_module.logits
    model_module.logits = lambda head, hidden: ours(head, hidden).bfloat16().float()
    try:
        yield
    finally:
        model_module.logits = ours


@contextmanager
def as_computed() -> Iterator[None]:
    """Within this context, logits stay as they are."""
    yield


def scores(model: nn.Module, g: Generation, cfg: NoiseConfig, at_once: int) -> TokenStats:
    """Statistics [B, R] of all responses, scored at_once at a time, without gradients."""
    R, rows = int(g.length.max()), range(len(g.length))
    found = {name: torch.zeros(len(rows), R) for name in STATISTICS}
    for start in rows[::at_once]:
        part = slice(start, start + at_once)
        inputs = (t[part].to(model.device) for t in (g.tokens, g.prompt_len, g.length))
        with torch.no_grad():
            stats = token_stats(model, *inputs, cfg.temperature)
        for name, values in found.items():
            ours = getattr(stats, name).cpu()
            values[part, : ours.shape[1]] = ours
    return TokenStats(**found)


def signs(model: nn.Module, g: Generation, cfg: NoiseConfig) -> dict[str, torch.Tensor]:
    """Parameter -> sign of the gradient of a policy loss with random advantages of 1 and -1."""
    generator = torch.Generator().manual_seed(cfg.seed)
    advantage = torch.randint(0, 2, (len(g.length),), generator=generator) * 2.0 - 1
    for i in range(len(g.length)):
        inputs = (t[i : i + 1].to(model.device) for t in (g.tokens, g.prompt_len, g.length))
        logp = token_stats(model, *inputs, cfg.temperature, also=()).logp
        (-advantage[i] * logp.sum()).backward()
    found = {name: p.grad.sign() for name, p in trainable(model).items() if p.grad is not None}
    model.zero_grad()
    return found


@contextmanager
def moved(model: nn.Module, direction: dict[str, torch.Tensor], lr: float) -> Iterator[None]:
    """Within this context, every trained weight is moved by lr against its direction."""
    parameters = trainable(model)
    before = {name: parameters[name].detach().clone() for name in direction}
    with torch.no_grad():
        for name, step in direction.items():
            parameters[name].sub_(lr * step)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                parameters[name].copy_(value)


def compare(old: TokenStats, new: TokenStats, mask: torch.Tensor, cfg: NoiseConfig) -> dict:
    """Spread of the log-ratios and of other differences, and the share outside the band."""
    gap = {name: (getattr(new, name) - getattr(old, name))[mask] for name in STATISTICS}
    ratio = gap["logp"].exp()
    outside = (ratio < 1 - cfg.clip_low) | (ratio > 1 + cfg.clip_high)
    return {
        "sd": gap["logp"].double().square().mean().sqrt().item(),
        "largest": gap["logp"].abs().max().item(),
        "outside": outside.double().mean().item(),
        "sd_entropy": gap["entropy"].double().square().mean().sqrt().item(),
        "sd_self_certainty": gap["self_certainty"].double().square().mean().sqrt().item(),
    }


def measure(cfg: NoiseConfig) -> dict:
    """The settings, the number of response tokens, and one row per comparison."""
    name = tiny.resolve(cfg.model)
    device, dtype = choose_device(cfg.device, cfg.dtype, name)
    tokenizer = load_tokenizer(name)
    prompt = cfg.prompt or ("qwen_math" if tokenizer.chat_template else "none")
    prompts = [render_prompt(problem, prompt, tokenizer) for problem in PROBLEMS]
    model = load_model(name, cfg.quant, dtype, device)
    check_positions(model, max(map(len, prompts)), cfg.max_new_tokens)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if cfg.lora_r:
        add_lora(model, cfg.lora_r, 2 * cfg.lora_r, cfg.seed)
    else:
        model.requires_grad_(True)
    with merged(model):
        g = generate(
            model,
            prompts,
            cfg.group,
            cfg.max_new_tokens,
            end_token_ids(model, tokenizer),
            (TRAIN_NOISE, cfg.seed, 0),
            cfg.temperature,
        )
    B, mask = len(g.length), torch.arange(int(g.length.max())) < g.length[:, None]
    direction = signs(model, g, cfg)
    rows = []
    for kind, logits in (("fp32", as_computed), ("bf16", bf16_logits)):
        with logits():
            old = scores(model, g, cfg, B)
            other = scores(model, g, cfg, 1)
            rows.append({"what": "shape", "logits": kind} | compare(old, other, mask, cfg))
            for lr in RATES:
                with moved(model, direction, lr):
                    new = scores(model, g, cfg, B)
                row = {"what": "update", "lr": lr, "logits": kind}
                rows.append(row | compare(old, new, mask, cfg))
    return {**asdict(cfg), "tokens": int(mask.sum()), "rows": rows}


def table(result: dict) -> str:
    """One line per comparison."""
    low, high = 1 - result["clip_low"], 1 + result["clip_high"]
    lines = [
        f"{'':<16}{'logits':>8}{'sd of log ratio':>18}{'largest':>10}"
        f"{f'outside [{low:g}, {high:g}]':>22}"
    ]
    for row in result["rows"]:
        what = row["what"] if "lr" not in row else f"update {row['lr']:g}"
        lines.append(
            f"{what:<16}{row['logits']:>8}{row['sd']:>18.2e}{row['largest']:>10.2e}"
            f"{row['outside']:>21.2%} "
        )
    return "\n".join(lines)


def check(cfg: NoiseConfig) -> None:
    """Raise UserError for a setting that cannot be measured."""
    if min(cfg.group, cfg.max_new_tokens) < 1 or cfg.temperature <= 0:
        raise UserError("group and max_new_tokens must be at least 1, temperature above 0")
    if min(cfg.lora_r, cfg.seed, cfg.threads, cfg.clip_low, cfg.clip_high) < 0:
        raise UserError("lora_r, seed, threads, clip_low and clip_high must not be negative")
    if cfg.prompt and cfg.prompt not in PROMPTS:
        raise UserError(f"prompt={cfg.prompt}: choose one of {', '.join(PROMPTS)}")
    if cfg.lora_r == 0 and (cfg.quant != "none" or cfg.dtype != "float32"):
        raise UserError("lora_r=0 trains all weights: add --quant=none --dtype=float32")


def main(argv: list[str]) -> None:
    cfg, _ = configure(NoiseConfig, argv)
    check(cfg)
    result = measure(cfg)
    print(f"{result['model']}, {cfg.dtype}, quant={cfg.quant}: {result['tokens']} response tokens")
    print(table(result))
    print(json.dumps(result))


if __name__ == "__main__":
    run(main)
