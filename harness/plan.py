"""Plan memory before training: the bytes of each part, and the weights and rows of decoding."""

import math
import os
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from decoding.kvcache import EXPANDED_ATTENTION
from engine import PREFILL_TOKENS
from lora import computation_dtype, lora_layers, trainable
from model import LOGITS_CHUNK, head
from settings import Config

# The weights that decoding multiplies by: a merged copy that stays, a merged copy that is freed
# after each use, or the base and its adapter.
DecodeWeights = Literal["kept", "freed", "adapter"]
# Share of the device that the plan may use. The rest is for the CUDA context, the workspaces of
# libraries, and memory that is free but in pieces that are too small.
USABLE = 0.9


@dataclass
class Plan:
    """Bytes of each part, and of the device."""

    weights: int  # all models, as stored
    trained: int  # trained weights, their gradients and AdamW's two moments: 4 x 4 bytes each
    merged: int  # the merged copy: the adapted layers in the type of the computation
    unmerged: int  # what a decoding step reads and writes for these layers without the copy
    head: int
    row_cache: int  # keys and values of one row of full length
    row_step: int  # logits and probabilities of one row in a decoding step
    prefill: int  # keys and values of PREFILL_TOKENS, and the activations of one layer
    activations: int  # largest micro-batch, forward and backward
    logits: int  # one chunk of the head, forward and backward
    device: int
    rows: int  # rollout_rows

    def need(self, how: DecodeWeights, rows: int = 0) -> int:
        """Bytes in use at once with so many rows (0: rollout_rows).

        The cache and the graphs stay through the update, unless the copy is freed. A prefill and an
        update never coexist.
        """
        resident = self.weights + self.trained
        rollout = (rows or self.rows) * (self.row_cache + self.row_step)
        update = self.activations + self.logits
        if how == "freed":
            return resident + max(self.merged + rollout + self.prefill, update)
        copy = self.merged if how == "kept" else 0
        return resident + copy + rollout + max(self.prefill, update)

    def step_bytes(self, how: DecodeWeights, rows: int) -> float:
        """Bytes that a decoding step moves: layers, head, and caches that are half full."""
        layers = self.unmerged if how == "adapter" else self.merged
        return layers + self.head + rows * self.row_cache / 2

    def choose(self, wanted: str) -> tuple[DecodeWeights, int, str]:
        """The weights and rows of decoding, and the reason. wanted: auto, merged, adapter.

        Decoding is bound by the bytes that a step moves. A merged copy moves fewer bytes, and
        without a copy more rows fit. auto takes the weights and rows, at most rollout_rows, that
        fit and decode the most rows per byte.
        """
        limit = USABLE * self.device
        if wanted == "adapter":
            return "adapter", self.rows, "base and adapter, as asked"
        if wanted == "merged" and self.merged:
            how = "kept" if self.need("kept") <= limit else "freed"
            return how, self.rows, "a merged copy, as asked"
        ways = ("kept", "freed", "adapter") if self.merged else ("adapter",)
        sizes = [self.rows, *range(self.rows - 1 - (self.rows - 1) % 8, 0, -8)]
        fits = [(how, n) for how in ways for n in sizes if self.need(how, n) <= limit]
        if not fits:
            return "adapter", self.rows, "base and adapter: by the plan, nothing fits"
        how, rows = max(fits, key=lambda way: way[1] / self.step_bytes(*way))
        what = "base and adapter" if how == "adapter" else "a merged copy"
        if not self.merged:
            what = "the weights themselves (lora_r=0)"
        moved = self.step_bytes(how, rows) / 1e9
        return how, rows, f"{what}, {rows} rows: a decoding step moves about {moved:.3g} GB"

    def table(self, how: DecodeWeights, rows: int) -> str:
        """One line for each part, in GB."""
        gone = {"kept": "", "freed": ", freed before the update", "adapter": " (not used)"}
        parts = [
            (self.weights, "weights as stored"),
            (self.trained, f"{self.trained // 16:,} trained weights, gradients, AdamW's moments"),
            (self.merged, f"merged copy of the weights{gone[how]}"),
            (rows * self.row_cache, f"KV cache of {rows} rows"),
            (rows * self.row_step, "a decoding step"),
            (self.prefill, "a prefill, which ends before the update"),
            (self.activations + self.logits, "forward and backward of the largest micro-batch"),
            (self.need(how, rows), f"at once, of {self.device / 1e9:.3g} free"),
        ]
        lines = [f"{size / 1e9:>9.3g}  {text}" for size, text in parts]
        return "\n".join(["memory planned, GB:", *lines])


def decoded_tokens(cfg: Config) -> int:
    """Prompt and response tokens of the longest row that training or an eval decodes."""
    return cfg.max_prompt_tokens + max(cfg.max_new_tokens, cfg.eval_new_tokens)


def largest_micro_batch(cfg: Config) -> tuple[int, int]:
    """(rows, tokens per row) of the most padded tokens that data.partition can put together.

    The longest rows seldom fill micro_batch_tokens exactly. One more row, with all rows a little
    shorter, does.
    """
    longest = cfg.max_prompt_tokens + cfg.max_new_tokens
    in_update = math.ceil(cfg.prompts_per_step * cfg.group_size / cfg.updates_per_step)
    rows = max(1, min(math.ceil(cfg.micro_batch_tokens / longest), in_update))
    return rows, longest if rows == 1 else min(longest, cfg.micro_batch_tokens // rows)


def plan_run(models: list[nn.Module], cfg: Config) -> Plan:
    """The plan of a training run. models: all that are loaded, the trained one first."""
    rows, T = largest_micro_batch(cfg)
    return plan(models, rows * T, decoded_tokens(cfg), cfg.rollout_rows, cfg.gradient_checkpointing)


def plan(
    models: list[nn.Module],
    tokens: int,
    total_tokens: int,
    rollout_rows: int,
    checkpointing: bool,
) -> Plan:
    """Plan from the models themselves, the trained one first.

    tokens: padded tokens of the largest micro-batch. total_tokens: of the longest row in the cache,
    prompt and response. checkpointing: whether activations are recomputed in backward.
    """
    model = models[0]
    c, layers, s = model.config, lora_layers(model).values(), model.dtype.itemsize
    stored = {id(p): stored_bytes(p) for m in models for p in m.parameters()}
    numel = sum(p.numel() for p in trainable(model).values())
    # Elements per token: hidden state H, query Q, key or value K, MLP inner, adapter rank r.
    H, heads, V = c.hidden_size, c.num_attention_heads, head(model).weight.shape[0]
    head_dim = getattr(c, "head_dim", None) or H // heads
    Q, K = heads * head_dim, (getattr(c, "num_key_value_heads", None) or heads) * head_dim
    inner = getattr(c, "intermediate_size", None) or 4 * H
    r = next((layer.r for layer in layers), 0)
    cache = 2 * c.num_hidden_layers * K * s  # bytes per token
    # Kept for backward, per token and layer: the two normed inputs, the query, the output of
    # attention and its copy, key and value, the gate, its SiLU, the up projection and their
    # product, the adapter's low products; in fp32, the inputs of the two norms. While a layer's
    # backward runs, there are gradients of 2 inner. With checkpointing, only the input of each
    # layer is kept, and the rest of one layer at a time.
    layer = s * (2 * H + 3 * Q + 2 * K + 4 * inner + 7 * r) + 4 * 2 * H
    if c._attn_implementation == EXPANDED_ATTENTION:  # keys and values for each query head
        layer += s * 2 * Q
    kept = s * H * c.num_hidden_layers + layer if checkpointing else layer * c.num_hidden_layers
    # A chunk holds logits twice in fp32, themselves and their exponentials, and three times in the
    # backward pass of a trained head. A decoding step holds them three times in fp32: as the head
    # gives them, over the temperature, as probabilities.
    chunk = min(max(1, LOGITS_CHUNK // V), tokens)
    copies, unmerged = 0, 4 * numel
    for x in layers:
        copy = x.base.in_features * x.base.out_features * computation_dtype(x.base).itemsize
        copies += copy
        # A 4-bit weight is read, written in the computation's type, and read again. bitsandbytes
        # multiplies without this only for a single row.
        in_4_bits = hasattr(x.base.weight, "quant_state")
        unmerged += stored_bytes(x.base.weight) + (2 * copy if in_4_bits else 0)
    return Plan(
        weights=sum(stored.values()) - 4 * numel,  # the trained ones are counted there
        trained=4 * 4 * numel,
        merged=copies,
        unmerged=unmerged,
        head=V * H * s,
        row_cache=total_tokens * cache,
        row_step=V * 3 * 4,
        prefill=min(PREFILL_TOKENS, rollout_rows * total_tokens) * (cache + layer),
        activations=tokens * (kept + s * 2 * inner),
        logits=chunk * V * 4 * (3 if head(model).weight.requires_grad else 2),
        device=device_memory(next(model.parameters()).device),
        rows=rollout_rows,
    )


def stored_bytes(parameter: nn.Parameter) -> int:
    """Bytes of a parameter. A 4-bit one counts as packed, with the scales of its blocks."""
    total = parameter.numel() * parameter.element_size()
    state = getattr(parameter, "quant_state", None)
    while state is not None:  # double quantisation: the scales have a state of their own
        tensors = (state.absmax, state.code, state.offset)
        total += sum(t.numel() * t.element_size() for t in tensors if torch.is_tensor(t))
        state = state.state2
    return total


def device_memory(device: torch.device) -> int:
    """Bytes that this process may have.

    On a GPU, what the process holds and what is free, since a desktop and other processes hold the
    rest. Otherwise the memory of the machine, or the limit of the process or its container.
    """
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
