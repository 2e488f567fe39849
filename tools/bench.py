"""Time the phases of a training step: sampling, scoring, update, with the functions train.py uses.

    python -m tools.bench --model=tiny
    python -m tools.bench --arch=qwen2.5-1.5b --quant=nf4 --lora_r=32 --new_tokens=1024

Prompts are random and every response has new_tokens tokens, so that two machines or two versions
of the code do the same work. --arch takes random weights of a known shape instead of a model.
The last line printed is one JSON object.
"""

import json
import platform
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from tqdm import tqdm

import memory
import tiny
import train
from configurator import UserError, configure, run
from data import Problem, Rollouts, partition
from engine import TRAIN_NOISE, generate
from eval import check_positions, choose_device
from lora import add_lora, reference, trainable
from model import checkpoint_activations, load_model
from settings import Config

# Qwen2 shapes; those of the released models are in their config.json.
SHAPES = {
    "tiny-random": dict(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
    ),
    "qwen2.5-1.5b": dict(
        vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
        num_attention_heads=12, num_key_value_heads=2, max_position_embeddings=32_768,
        rope_theta=1e6,
    ),
}  # fmt: skip


@dataclass
class BenchConfig:
    """Time the phases of a training step: python -m tools.bench [--key=value]"""

    # Model
    model: str = "tiny"  # hub id, local folder, or tiny / tiny_bad
    arch: Literal["none", "tiny-random", "qwen2.5-1.5b"] = "none"  # random weights of this shape
    quant: Literal["none", "nf4"] = "none"  # 4-bit weights through bitsandbytes
    lora_r: int = 8  # rank of the adapter; 0 trains all weights
    gradient_checkpointing: bool = False  # recompute activations in backward
    # Work
    prompts: int = 8  # prompts a step
    group: int = 8  # responses a prompt
    prompt_tokens: int = 64  # length of every prompt
    new_tokens: int = 128  # length of every response
    updates: int = 1  # optimiser updates a step
    micro_batch_tokens: int = 8192  # padded prompt + response tokens a forward and backward
    rollout_rows: int = 128  # rows decoded at once
    repeats: int = 3  # timed steps, after one that is not; medians are shown
    # Machine
    device: str = "auto"  # auto = cuda where there is one, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto = bfloat16 on cuda, else float32


def random_model(arch: str, folder: Path, dtype: torch.dtype) -> None:
    """Save random weights as an ordinary model folder, so that loading them is the real thing."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    config = Qwen2Config(**SHAPES[arch], tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)


def load(cfg: BenchConfig, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """The model as train.py sets it up."""
    with tempfile.TemporaryDirectory() if cfg.arch != "none" else nullcontext() as folder:
        if folder:
            random_model(cfg.arch, Path(folder), dtype)
        model = load_model(folder or tiny.resolve(cfg.model), cfg.quant, dtype, device)
    check_positions(model, cfg.prompt_tokens, cfg.new_tokens)
    if cfg.lora_r:
        add_lora(model, cfg.lora_r, 2 * cfg.lora_r)
    else:
        model.requires_grad_(True)
    if cfg.gradient_checkpointing:
        checkpoint_activations(model)
    return model


def sample_rollouts(model: torch.nn.Module, cfg: BenchConfig) -> Rollouts:
    """Random prompts and their responses, none of which ends early."""
    generator = torch.Generator().manual_seed(0)
    shape = (cfg.prompts, cfg.prompt_tokens)
    prompts = torch.randint(model.config.vocab_size, shape, generator=generator).tolist()
    no_end = [-1]  # cannot be sampled
    out = generate(model, prompts, cfg.group, cfg.new_tokens, no_end, (TRAIN_NOISE, 0, 1),
                   max_rows=cfg.rollout_rows)  # fmt: skip
    B = cfg.prompts * cfg.group
    return Rollouts(
        out.tokens, out.prompt_len, out.length, [""] * B, [Problem("", "", "")] * B, out.finished,
        cfg.group, seed=0, step=1, sampler_logp=out.sampler_logp,
    )  # fmt: skip


def bench(cfg: BenchConfig) -> dict:
    """Run the steps; returns the configuration, seconds and response tokens/s of each phase."""
    device, dtype = choose_device(cfg.device, cfg.dtype)
    model = load(cfg, device, dtype)
    settings = Config(lr=1e-6, updates_per_step=cfg.updates)
    optimizer = torch.optim.AdamW(trainable(model).values(), settings.lr)
    B = cfg.prompts * cfg.group
    advantage = torch.ones(B)
    advantage[::2] = -1.0
    lrs = [settings.lr] * cfg.updates
    base = partial(reference, model) if cfg.lora_r else None  # as in train.py: KL costs a forward
    seconds: dict[str, list[float]] = {"sample": [], "score": [], "update": []}
    bar = tqdm(total=(cfg.repeats + 1) * len(seconds), desc="bench", unit="phase", leave=False)

    def timed(phase: str, function: Callable, *args):
        bar.set_postfix_str(phase)
        _wait(device)
        start = time.perf_counter()
        result = function(*args)
        _wait(device)
        seconds[phase].append(time.perf_counter() - start)
        bar.update()
        return result

    for _ in range(cfg.repeats + 1):
        rollouts = timed("sample", sample_rollouts, model, cfg)
        total_len = (rollouts.prompt_len + rollouts.length).tolist()
        parts = partition(total_len, cfg.updates, cfg.micro_batch_tokens, seed=0, step=1)
        timed("score", train.score, model, base, rollouts, parts, settings)
        timed("update", train.update, model, optimizer, rollouts, advantage, parts, settings, lrs)
    bar.close()

    result = {**asdict(cfg), "device": device_name(device), "threads": torch.get_num_threads(),
              "dtype": str(dtype).removeprefix("torch."), "torch": torch.__version__}  # fmt: skip
    if cfg.arch != "none":
        result["model"] = cfg.arch
    for phase, values in seconds.items():
        result[f"{phase}_s"] = median(values[1:])
    result["step_s"] = median(map(sum, zip(*(v[1:] for v in seconds.values()), strict=True)))
    for phase in (*seconds, "step"):
        result[f"{phase}_tokens_per_s"] = B * cfg.new_tokens / result[f"{phase}_s"]
    return result | {"peak_memory_gb": memory.peak_memory()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main(argv: list[str]) -> None:
    cfg, _ = configure(BenchConfig, argv)
    for key in ("prompts", "group", "prompt_tokens", "new_tokens", "updates", "repeats",
                "micro_batch_tokens", "rollout_rows"):  # fmt: skip
        if getattr(cfg, key) < 1:
            raise UserError(f"{key}={getattr(cfg, key)}: must be at least 1")
    if cfg.updates > cfg.prompts * cfg.group:
        raise UserError(f"updates={cfg.updates}: a step has {cfg.prompts * cfg.group} responses")
    if cfg.lora_r == 0 and cfg.quant != "none":
        raise UserError("lora_r=0 trains all weights, which 4-bit ones cannot: add --quant=none")
    result = bench(cfg)
    print(f"{result['device']}, threads: {result['threads']}; {result['model']}, "
          f"{result['dtype']}, quant={cfg.quant}, lora_r={cfg.lora_r}")  # fmt: skip
    print(f"{cfg.prompts} x {cfg.group} responses of {cfg.new_tokens} tokens, prompts of "
          f"{cfg.prompt_tokens}; median of {cfg.repeats}\n")  # fmt: skip
    print(f"{'':<8}{'seconds':>10}{'response tokens/s':>20}")
    for phase in ("sample", "score", "update", "step"):
        print(f"{phase:<8}{result[f'{phase}_s']:>10.3f}{result[f'{phase}_tokens_per_s']:>20,.0f}")
    print(f"peak memory {result['peak_memory_gb']:.2f} GB")
    print(json.dumps(result))


if __name__ == "__main__":
    run(main)
