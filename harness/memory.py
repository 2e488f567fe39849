"""Memory: planned in GB before training, tried at its worst, and what happens where it runs out."""

import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from engine import PREFILL_TOKENS, TRAIN_NOISE, decode_setup, drop_slots, generate
from harness.errors import UserError
from harness.loading import EXPANDED_ATTENTION
from lora import computation_dtype, lora_layers, merged, trainable
from model import LOGITS_CHUNK, head, token_stats
from settings import Config

# What decoding multiplies by: a merged copy that stays, one that is dropped after each use, or the
# base and its adapter as they are.
DecodeWeights = Literal["kept", "freed", "adapter"]
# Share of the device that may be planned for: the CUDA context, the libraries' workspaces and what
# the allocator cannot use for want of a hole large enough take the rest.
USABLE = 0.9


@contextmanager
def decode_with(model: nn.Module, how: DecodeWeights) -> Iterator[None]:
    """Inside, decoding goes by these weights (lora.merged)."""
    try:
        with nullcontext() if how == "adapter" else merged(model, free=how == "freed"):
            yield
    except torch.OutOfMemoryError:
        drop_slots(model)
        raise
    finally:
        if how == "freed":
            drop_slots(model)


# ---------------------------------------------------------------------------------------- the plan


@dataclass
class Plan:
    """Bytes by part, and what the device has."""

    weights: int  # of every model, as stored
    trained: int  # adapter or all weights, gradients and AdamW's two moments: 4 x 4 bytes each
    merged: int  # copy of the adapted layers in the computation's type
    cache: int  # keys and values of rollout_rows rows filled to the end
    activations: int  # of the largest micro-batch, as the run has them
    activations_else: int  # with gradient checkpointing on instead of off, or off instead of on
    logits: int  # one chunk of the head, forward and backward
    decode_step: int  # logits and distributions of a decoding step
    prefill: int  # keys and values of PREFILL_TOKENS, and one layer at work
    device: int
    tokens: int  # of the largest micro-batch
    rows: int  # rollout_rows
    checkpointing: bool

    def need(self, how: DecodeWeights) -> int:
        """Bytes in use at once. The cache, and what graphs over it compute, stays through the
        update; freeing the copy frees it, too. A prefill and an update never coexist."""
        resident = self.weights + self.trained
        rollout = self.cache + self.decode_step
        update = self.activations + self.logits
        if how == "freed":
            return resident + max(self.merged + rollout + self.prefill, update)
        merged = self.merged if how == "kept" else 0
        return resident + merged + rollout + max(self.prefill, update)

    def choose(self, wanted: str) -> tuple[DecodeWeights, str]:
        """How decoding holds its weights, and why. wanted: auto, merged, adapter."""
        limit = USABLE * self.device
        if self.merged == 0:
            return "adapter", "the weights themselves: lora_r=0 leaves nothing to merge"
        if wanted == "adapter":
            return "adapter", "base and adapter, as asked"
        if self.need("kept") <= limit:
            return "kept", "a merged copy, which fits beside everything else"
        if self.need("freed") <= limit or wanted == "merged":
            return "freed", "a merged copy, freed after use: no room for it beside the update"
        return "adapter", (
            f"base and adapter: a merged copy wants {_gb(self.need('freed'))} GB "
            f"of {_gb(limit)} while sampling (--rollout_rows)"
        )

    def table(self, how: DecodeWeights) -> str:
        """One line a part, in GB."""
        state = ("without", "with") if self.checkpointing else ("with", "without")
        gone = {"kept": "", "freed": ", freed before the update", "adapter": " (not used)"}
        parts = [
            (self.weights, "weights as stored"),
            (
                self.trained,
                f"{self.trained // 16:,} trained weights, gradients, AdamW's moments",
            ),
            (self.merged, f"merged rollout copy{gone[how]}"),
            (self.cache, f"KV cache of {self.rows} rows"),
            (self.decode_step, "a decoding step"),
            (self.prefill, "a prefill, which is over before the update"),
            (
                self.activations,
                f"activations of {self.tokens} tokens, about ({state[0]} gradient checkpointing: "
                f"{_gb(self.activations_else)})",
            ),
            (self.logits, "chunk of logits, forward and backward"),
            (self.need(how), f"at once, of {_gb(self.device)} free"),
        ]
        return "\n".join(["memory planned, GB:", *(f"{_gb(n):>9}  {text}" for n, text in parts)])


def _gb(n: float) -> str:
    return f"{n / 1e9:.3g}"


def plan(
    models: list[nn.Module],
    tokens: int,
    total_tokens: int,
    rollout_rows: int,
    checkpointing: bool,
) -> Plan:
    """Plan from the models themselves, the trained one first.

    tokens: padded tokens of the largest micro-batch; total_tokens: of a row, prompt and response;
    checkpointing: whether activations are recomputed in backward.
    """
    model = models[0]
    c, layers = model.config, lora_layers(model).values()
    weights = {id(p): stored_bytes(p) for m in models for p in m.parameters()}
    numel = sum(p.numel() for p in trainable(model).values())
    weights_bytes = sum(weights.values()) - 4 * numel  # counted among the trained
    s = model.dtype.itemsize
    # Kept for backward, by token and layer, in elements of s bytes: the two normed inputs 2 H, the
    # query, the attention's output and its copy 3 Q, key and value 2 K, the gate, its SiLU, the up
    # projection and their product 4 I, the adapter's low products 7 r; and in fp32 the inputs of
    # the two norms. Beside them, while one layer's backward runs, gradients of 2 I. With
    # checkpointing only each layer's input H is kept, and the rest of one layer at a time.
    H, n_layers = c.hidden_size, c.num_hidden_layers
    inner = getattr(c, "intermediate_size", None) or 4 * H
    Q, K = c.num_attention_heads * _head_dim(c), _kv_heads(c) * _head_dim(c)
    r = next((layer.r for layer in layers), 0)
    layer_bytes = s * (2 * H + 3 * Q + 2 * K + 4 * inner + 7 * r) + 4 * 2 * H
    if c._attn_implementation == EXPANDED_ATTENTION:
        layer_bytes += s * 2 * Q
    gradients = s * 2 * inner
    kept = tokens * (n_layers * layer_bytes + gradients)
    recomputed = tokens * (n_layers * s * H + layer_bytes + gradients)
    # Logits of a chunk: twice in fp32, themselves and their exponentials, and three times in the
    # backward pass of a trained head. Of a decoding step, in
    # fp32: as the head gives them, over the temperature, and as probabilities. A prefill holds keys
    # and values, and one layer.
    V = head(model).weight.shape[0]
    per_logit = 4 * (3 if head(model).weight.requires_grad else 2)
    chunk = min(max(1, LOGITS_CHUNK // V), tokens)
    return Plan(
        weights=weights_bytes,
        trained=4 * 4 * numel,
        merged=sum(
            x.base.in_features * x.base.out_features * computation_dtype(x.base).itemsize
            for x in layers
        ),
        cache=rollout_rows * total_tokens * _cache_elements(c) * s,
        activations=recomputed if checkpointing else kept,
        activations_else=kept if checkpointing else recomputed,
        logits=chunk * V * per_logit,
        decode_step=rollout_rows * V * 3 * 4,
        prefill=min(PREFILL_TOKENS, rollout_rows * total_tokens)
        * (_cache_elements(c) * s + layer_bytes),
        device=device_memory(next(model.parameters()).device),
        tokens=tokens,
        rows=rollout_rows,
        checkpointing=checkpointing,
    )


def stored_bytes(parameter: nn.Parameter) -> int:
    """Bytes of a parameter: a 4-bit one as packed, with the scales of its blocks."""
    total = parameter.numel() * parameter.element_size()
    state = getattr(parameter, "quant_state", None)
    while state is not None:  # double quantisation: the scales have a state of their own
        tensors = (state.absmax, state.code, state.offset)
        total += sum(t.numel() * t.element_size() for t in tensors if torch.is_tensor(t))
        state = state.state2
    return total


def _head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _kv_heads(config) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _cache_elements(config) -> int:
    """Elements of the KV cache a token."""
    return 2 * config.num_hidden_layers * _kv_heads(config) * _head_dim(config)


def device_memory(device: torch.device) -> int:
    """Bytes that this process may have: of the GPU what it holds and what is free, since a desktop
    and other processes hold the rest; else of the machine, or what is allowed of it."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    if soft != resource.RLIM_INFINITY:
        limits.append(soft)
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of the container, v2 and v1
        file = Path("/sys/fs/cgroup") / name
        text = file.read_text().strip() if file.is_file() else "max"
        limits.extend([int(text)] if text.isdigit() else [])
    return min(limits)


def settle(models: list[nn.Module], cfg: Config) -> DecodeWeights:
    """Print the plan, choose how decoding holds its weights, and try the worst case.

    models: all that are loaded, the trained one first. Writes what was settled to
    cfg.micro_batch_tokens and cfg.rollout_weights. Raises UserError where the run cannot fit.
    """
    rows_in_update = math.ceil(cfg.prompts_per_step * cfg.group_size / cfg.updates_per_step)
    lengths = (cfg.max_prompt_tokens, cfg.max_new_tokens)
    rows, T = largest_micro_batch(cfg.micro_batch_tokens, rows_in_update, *lengths)
    decoded = cfg.max_prompt_tokens + max(cfg.max_new_tokens, cfg.eval_new_tokens)
    decode_setup(models[0]).longest_prompt = cfg.max_prompt_tokens
    planned = plan(models, rows * T, decoded, cfg.rollout_rows, cfg.gradient_checkpointing)
    how, reason = planned.choose(cfg.rollout_weights)
    print(planned.table(how))
    print(f"rollout weights: {reason}")
    cfg.micro_batch_tokens = worst_case(
        models[0], cfg.micro_batch_tokens, rows_in_update, *lengths, cfg.rollout_rows, how, decoded
    )
    if cfg.lora_r:
        cfg.rollout_weights = "adapter" if how == "adapter" else "merged"
    return how


# ---------------------------------------------------------------------------------- the worst case


def largest_micro_batch(
    micro_batch_tokens: int, rows_in_update: int, max_prompt_tokens: int, max_new_tokens: int
) -> tuple[int, int]:
    """(rows, tokens a row) of the most padded tokens that data.partition can put together.

    Longest rows seldom fill micro_batch_tokens exactly; one more row, all a little shorter, does.
    """
    longest = max_prompt_tokens + max_new_tokens
    rows = max(1, min(math.ceil(micro_batch_tokens / longest), rows_in_update))
    return rows, longest if rows == 1 else min(longest, micro_batch_tokens // rows)


def worst_case(
    model: nn.Module,
    micro_batch_tokens: int,
    rows_in_update: int,
    max_prompt_tokens: int,
    max_new_tokens: int,
    rollout_rows: int,
    how: DecodeWeights = "adapter",
    decoded: int = 0,
) -> int:
    """Settle micro_batch_tokens: try the largest micro-batch, forward and backward beside AdamW's
    moments, and halve it until it fits; first, with the rollout weights, one prefill and one
    decoding step over a full KV cache.

    decoded: tokens of the longest row in the cache, where they are more than those of an update.
    Decoding is tried where the cache is static: a growing one is small at first. Memory then fails
    here, or never. Says in a line what was settled and what the peak was;
    UserError, which names the knobs, where rollouts or one row do not fit.
    """
    lengths = (max_prompt_tokens, max_new_tokens)
    longest = sum(lengths)
    columns = max(longest, decoded)
    try:
        moments = [torch.empty_like(p) for p in trainable(model).values() for _ in range(2)]
        with decode_with(model, how):
            if decode_setup(model).static:  # slots, cache and graph stay, unless freed
                _decode_once(model, max_prompt_tokens, columns, rollout_rows)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of GPU memory on decoding {rollout_rows} rows x {columns} tokens: lower "
            "--rollout_rows or --max_new_tokens, or use --rollout_weights=adapter or --quant=nf4"
        ) from error
    settled = micro_batch_tokens
    while True:
        rows, T = largest_micro_batch(settled, rows_in_update, *lengths)
        if _fits(model, rows, T, max_new_tokens):
            break
        if rows == 1:
            raise UserError(
                f"out of GPU memory on a micro-batch of one row, {T} tokens: lower "
                "--max_new_tokens or --max_prompt_tokens, or use --quant=nf4 and "
                "--gradient_checkpointing=True"
            )
        settled = max(rows * T // 2, longest)
    if settled != micro_batch_tokens:
        print(f"micro_batch_tokens was {micro_batch_tokens}, now {settled}: the GPU holds no more")
    del moments
    drop_slots(model)
    print(
        f"largest micro-batch: {rows} x {T} tokens, peak memory {peak_memory():.2f} GB{reserved()}"
    )
    return settled


def _decode_once(model: nn.Module, prompt_tokens: int, columns: int, rows: int) -> None:
    """A prefill of PREFILL_TOKENS and a decoding step of all rows, with room for columns tokens."""
    n = min(rows, max(1, PREFILL_TOKENS // prompt_tokens))
    prompts, group = [[0] * prompt_tokens] * n, -(-rows // n)
    no_end = [-1]  # cannot be sampled
    generate(
        model,
        prompts,
        group,
        columns - prompt_tokens,
        no_end,
        (TRAIN_NOISE,),
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

KNOBS = {
    "sample": "--rollout_rows or --max_new_tokens",
    "score": "--micro_batch_tokens",
    "reward": "--prompts_per_step",
    "update": "--micro_batch_tokens",
    "eval": "--rollout_rows",
}


class OutOfMemory(UserError):
    """Memory ran out in a phase of a step; the message names the knob to turn."""


@contextmanager
def phase(name: str, seconds: dict[str, float] | None = None) -> Iterator[None]:
    """One of KNOBS: what it took goes to seconds[name]; OutOfMemory where memory runs out in it."""
    start = time.perf_counter()
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(f"out of GPU memory in phase {name!r}: lower {KNOBS[name]}") from error
    if seconds is not None:
        seconds[name] = time.perf_counter() - start


def peak_memory() -> float:
    """GB at most in use so far: the GPU's where this process has used one, else the process's."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e9
    scale = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e9


def reserved() -> str:
    """What the GPU's allocator holds beyond tensors, as the end of a line; else nothing."""
    if torch.cuda.is_available() and torch.cuda.max_memory_reserved():
        return f", {torch.cuda.max_memory_reserved() / 1e9:.2f} reserved"
    return ""
