"""Memory: the worst case tried before anything is spent, and the peak so far."""

import resource
import sys

import torch
from torch import nn

from configurator import UserError
from lora import trainable
from model import token_stats


def worst_case(
    model: nn.Module, rows: int, max_prompt_tokens: int, max_new_tokens: int, rollout_rows: int
) -> str:
    """Try the largest micro-batch, `rows` of the longest prompt and response, forward and backward
    beside AdamW's moments, and on CUDA a KV cache of rollout_rows filled to the end.

    Memory then fails here, or never. Returns a line with the peak; UserError where it fails.
    """
    T = max_prompt_tokens + max_new_tokens
    weights = next(model.parameters())
    tokens = torch.zeros(rows, T, dtype=torch.int64, device=weights.device)
    prompt_len, length = (
        torch.full((rows,), n, device=weights.device) for n in (max_prompt_tokens, max_new_tokens)
    )
    try:
        moments = [torch.empty_like(p) for p in trainable(model).values() for _ in range(2)]
        token_stats(model, tokens, prompt_len, length, also=()).logp.sum().backward()
        model.zero_grad()
        if weights.device.type == "cuda":
            c = model.config
            head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
            per_token = 2 * c.num_hidden_layers * c.num_key_value_heads * head_dim
            torch.empty(rollout_rows, T, per_token, dtype=model.dtype, device=weights.device)
        del moments
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(
            f"out of GPU memory on the largest micro-batch ({rows} x {T} tokens) or the cache of "
            f"{rollout_rows} rows: lower --micro_batch_tokens, --rollout_rows or "
            "--max_new_tokens, or use --quant=nf4"
        ) from error
    return f"largest micro-batch: {rows} x {T} tokens, peak memory {peak_memory():.2f} GB"


def peak_memory() -> float:
    """GB at most in use so far: the GPU's where there is one, else the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    scale = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e9
