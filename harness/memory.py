"""Print the memory plan before training, try the worst case, and report which setting to change
when memory runs out."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import nn

from engine import PREFILL_TOKENS, TRAIN_NOISE, decode_setup, drop_slots, generate
from harness.errors import UserError
from harness.plan import DecodeWeights, decoded_tokens, largest_micro_batch, plan_run
from lora import merged, trainable
from model import token_stats
from settings import Config


@contextmanager
def decode_with(model: nn.Module, how: DecodeWeights) -> Iterator[None]:
    """Decode with these weights inside this context (see lora.merged)."""
    try:
        with nullcontext() if how == "adapter" else merged(model, free=how == "freed"):
            yield
    except torch.OutOfMemoryError:
        drop_slots(model)
        raise
    finally:
        if how == "freed":
            drop_slots(model)


# ---------------------------------------------------------------------------------- the worst case


def settle(models: list[nn.Module], cfg: Config) -> DecodeWeights:
    """Print the plan, choose the weights and rows of decoding, and try the worst case.

    models: all that are loaded, the trained one first. Writes the settled rollout_rows,
    rollout_weights and micro_batch_tokens to cfg. Raises UserError where the run cannot fit.
    """
    planned = plan_run(models, cfg)
    how, rows, reason = planned.choose(cfg.rollout_weights)
    print(planned.table(how, rows))
    print(f"rollout weights: {reason}")
    _lower(cfg, "rollout_rows", rows)
    worst_case(models[0], cfg, how)
    if cfg.lora_r:
        cfg.rollout_weights = "adapter" if how == "adapter" else "merged"
    return how


def _lower(cfg: Config, key: str, value: int) -> None:
    """Set a setting to what memory allows, and print the change if there is one."""
    if value != getattr(cfg, key):
        print(f"{key} was {getattr(cfg, key)}, now {value}: the memory holds no more")
        setattr(cfg, key, value)


def worst_case(model: nn.Module, cfg: Config, how: DecodeWeights = "adapter") -> None:
    """Try decoding, then the largest micro-batch, which is halved until it fits.

    Decoding means one prefill and one step of rollout_rows rows over a full cache, beside AdamW's
    moments. Decoding is tried only where the cache is static, because a growing cache is small at
    first. If memory runs out, it does so here. Writes the settled micro_batch_tokens to cfg and
    prints it and the peak. Raises UserError, naming the settings, where rollouts or one row do not
    fit.
    """
    columns = decoded_tokens(cfg)
    setup = decode_setup(model)
    setup.longest_prompt = cfg.max_prompt_tokens
    try:
        moments = [torch.empty_like(p) for p in trainable(model).values() for _ in range(2)]
        with decode_with(model, how):
            if setup.static:  # slots, cache and graph stay, unless how is freed
                _decode_once(model, cfg.max_prompt_tokens, columns, cfg.rollout_rows)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of GPU memory on decoding {cfg.rollout_rows} rows x {columns} tokens: lower "
            "--rollout_rows or --max_new_tokens, or use --rollout_weights=adapter or --quant=nf4"
        ) from error
    tried = replace(cfg)
    rows, T = largest_micro_batch(tried)
    while not _fits(model, rows, T, cfg.max_new_tokens):
        if rows == 1:
            raise UserError(
                f"out of GPU memory on a micro-batch of one row, {T} tokens: lower "
                "--max_new_tokens or --max_prompt_tokens, or use --quant=nf4 and "
                "--gradient_checkpointing=True"
            )
        longest = cfg.max_prompt_tokens + cfg.max_new_tokens
        tried.micro_batch_tokens = max(rows * T // 2, longest)
        rows, T = largest_micro_batch(tried)
    _lower(cfg, "micro_batch_tokens", tried.micro_batch_tokens)
    del moments
    drop_slots(model)
    held = reserved_memory()
    more = "" if held is None else f", {held:.2f} GB reserved"
    print(f"largest micro-batch: {rows} x {T} tokens, peak memory {peak_memory():.2f} GB{more}")


def _decode_once(model: nn.Module, prompt_tokens: int, columns: int, rows: int) -> None:
    """A prefill of PREFILL_TOKENS and a decoding step of all rows, with room for columns tokens."""
    n = min(rows, max(1, PREFILL_TOKENS // prompt_tokens))
    group = -(-rows // n)
    generate(
        model,
        [[0] * prompt_tokens] * n,
        group,
        columns - prompt_tokens,
        end_ids=[-1],  # cannot be sampled
        noise=(TRAIN_NOISE,),
        max_rows=rows,
        budgets=[2] * (n * group),
    )


def _fits(model: nn.Module, rows: int, T: int, max_new_tokens: int) -> bool:
    """Whether a forward and backward of rows x T tokens, most of them responses, find memory."""
    n = min(max_new_tokens, T - 1)
    tokens = torch.zeros(rows, T, dtype=torch.int64, device=model.device)
    prompt_len, length = (torch.full((rows,), x, device=model.device) for x in (T - n, n))
    try:
        token_stats(model, tokens, prompt_len, length, also=()).logp.sum().backward()
        return True
    except torch.OutOfMemoryError:  # unnamed: the error would hold the activations it failed on
        return False
    finally:
        model.zero_grad()


# -------------------------------------------------------------------------------- where it runs out

# The settings to lower if memory runs out in a phase of a step.
SETTINGS = {
    "sample": "--rollout_rows or --max_new_tokens",
    "score": "--micro_batch_tokens",
    "reward": "--prompts_per_step",
    "update": "--micro_batch_tokens",
    "eval": "--rollout_rows",
}


class OutOfMemory(UserError):
    """Memory ran out in a phase of a step. The message names the setting to lower."""


@contextmanager
def phase(name: str, seconds: dict[str, float] | None = None) -> Iterator[None]:
    """Run one of SETTINGS' phases and put its duration into seconds[name].

    Raises OutOfMemory if memory runs out in it.
    """
    start = time.perf_counter()
    try:
        yield
    except torch.OutOfMemoryError as error:
        what = f"out of GPU memory in phase {name!r}: lower {SETTINGS[name]}"
        raise OutOfMemory(what) from error
    if seconds is not None:
        seconds[name] = time.perf_counter() - start


def peak_memory() -> float:
    """GB at most in use so far: the GPU's if this process has used one, else the process's."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e9
    scale = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e9


def reserved_memory() -> float | None:
    """GB that the GPU's allocator held at most, tensors and holes; None if no GPU was used."""
    held = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
    return held / 1e9 if held else None
