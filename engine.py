"""Decoding: batched sampling with a KV cache over the Hugging Face modules.

No forward of our own per architecture: transformers runs its layers, with a cache class and an
attention function of ours. Each prompt is prefilled once for its whole group; rows that have ended
leave the batch; the randomness of a token depends on its row and position alone.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import AttentionInterface, PreTrainedTokenizerBase
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from model import backbone, head

# First key of the noise: training, eval and majority labels never share a stream.
TRAIN_NOISE, EVAL_NOISE, LABEL_NOISE = 1, 2, 3
GROW = 128  # columns by which the cache grows, so that short responses stay cheap
SHRINK = 0.9  # rows are dropped when fewer than this share of them is alive


@dataclass
class Generation:
    """What generate returns; B = len(prompts) x group_size, R = longest response.

    tokens int64 [B, T] right-padded prompt + response, prompt_len and length int64 [B] (length
    counts the end token), finished bool [B] (an end token came before the budget ran out),
    sampler_logp float32 [B, R] (0 beyond length). On the CPU, whatever the model's device.
    """

    tokens: torch.Tensor
    prompt_len: torch.Tensor
    length: torch.Tensor
    finished: torch.Tensor
    sampler_logp: torch.Tensor


# ---------------------------------------------------------------------------- cache and attention


class KVCache:
    """Keys and values of n rows, [n, kv_heads, columns, head_dim] a layer.

    Columns: the prompt, right-padded to the longest (P columns), then one column a decoding step,
    the same for all rows, so that a step's write is a slice. A row's own positions stay contiguous
    (prompt_len + j); only its columns have a gap, which the mask hides.
    """

    is_compileable = False  # transformers asks

    def __init__(self) -> None:
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.filled = 0  # columns in use before the current forward

    def update(self, key, value, layer: int, *args, **kwargs):  # [n, H, t, D] each
        """Called by every attention layer: store the new columns, return all columns so far."""
        if layer == len(self.keys):  # prefill
            self.keys.append(key)
            self.values.append(value)
            return key, value
        end = self.filled + key.shape[2]
        self.keys[layer][:, :, self.filled : end] = key
        self.values[layer][:, :, self.filled : end] = value
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def get_seq_length(self, layer: int = 0) -> int:
        return self.filled

    def select(self, rows: torch.Tensor | None, columns: int) -> None:
        """Keep (or repeat) these rows, None for all, and make room for so many columns."""
        for store in (self.keys, self.values):
            for i, old in enumerate(store):
                n = old.shape[0] if rows is None else len(rows)
                new = old.new_empty(n, old.shape[1], columns, old.shape[3])
                part = old[:, :, : self.filled]
                new[:, :, : self.filled] = part if rows is None else part[rows]
                store[i] = new

    @property
    def columns(self) -> int:
        return self.keys[0].shape[2]


def _attention(module, query, key, value, mask, scaling=None, **kwargs):
    """Attention of one new token a row: [n, heads, 1, D] over [n, kv_heads, S, D].

    With grouped-query attention, the query heads that share a key head are viewed as query rows, so
    keys and values need no repeating. Longer queries (prefill) go to transformers' own function.
    """
    if query.shape[2] > 1:
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)
    n, heads, _, D = query.shape
    query = query.reshape(n, key.shape[1], heads // key.shape[1], D)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(n, 1, heads, D), None


AttentionInterface.register("nanorlvr_decode", _attention)


@contextmanager
def _decoding(model: nn.Module) -> Iterator[None]:
    """Our attention function, no gradients, and no gradient checkpointing (it drops the cache)."""
    config = model.config
    before = config._attn_implementation
    layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    config._attn_implementation = "nanorlvr_decode"
    for layer in layers:
        layer.gradient_checkpointing = False
    try:
        with torch.no_grad():
            yield
    finally:
        config._attn_implementation = before
        for layer in layers:
            layer.gradient_checkpointing = True


# --------------------------------------------------------------------------------------- sampling


def uniforms(noise: tuple[int, ...], prompt: int, sample: int, n: int) -> np.ndarray:
    """The uniforms of one row, float64 [n]: entry j decides the token at response position j.

    A function of (noise, prompt, sample) alone, and a longer row starts like a shorter one, so
    neither batch, order nor budget changes a sample. In training: (TRAIN_NOISE, seed, step).
    """
    return np.random.default_rng((*noise, prompt, sample)).random(n)


def sample(
    logits: torch.Tensor,
    uniform: torch.Tensor,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Next tokens int64 [n] and their log-probabilities float32 [n].

    logits [n, V]; uniform float64 [n]. One uniform a token, inverted through the cumulative
    distribution. temperature 0 is greedy (log-probabilities at temperature 1). top_p and top_k
    (0 = off) are for eval and sample; the log-probability stays the unfiltered one.
    """
    z = logits.float()
    if temperature == 0:
        token = z.argmax(-1)
        return token, z.log_softmax(-1).gather(-1, token[:, None])[:, 0]
    logp = (z / temperature if temperature != 1.0 else z).log_softmax(-1)  # [n, V]
    p = logp.exp()
    if 0 < top_k < p.shape[-1]:
        p = p.masked_fill(p < p.topk(top_k).values[:, -1:], 0.0)
    if top_p < 1.0:
        ordered, order = p.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # mass of the likelier tokens
        ordered = ordered.masked_fill(before >= top_p * ordered.sum(-1, keepdim=True), 0.0)
        p = torch.zeros_like(p).scatter(-1, order, ordered)
    cdf = p.cumsum(-1, dtype=torch.float64)  # fp32 would lose the tail of a large vocabulary
    # right=True: the first token whose cumulative mass exceeds u, never one of probability 0.
    token = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)[:, 0]
    token = token.clamp_max(p.shape[-1] - 1)
    return token, logp.gather(-1, token[:, None])[:, 0]


# --------------------------------------------------------------------------------------- decoding


class Progress:
    """A progress bar over rows that shows tokens/s; pass it to generate."""

    def __init__(self, rows: int, desc: str, **kwargs):
        self.bar = tqdm(total=rows, desc=desc, unit="row", **kwargs)
        self.tokens, self.start = 0, time.monotonic()

    def __call__(self, tokens: int, rows: int) -> None:
        self.tokens += tokens
        speed = self.tokens / max(time.monotonic() - self.start, 1e-9)
        self.bar.set_postfix_str(f"{speed:,.0f} tokens/s", refresh=False)
        self.bar.update(rows)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        self.bar.close()


def generate(
    model: nn.Module,
    prompts: list[list[int]],
    group_size: int,
    max_new_tokens: int,
    end_ids: list[int],
    noise: tuple[int, ...],
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    max_rows: int = 256,
    progress: Callable[[int, int], None] | None = None,
    first_prompt: int = 0,
) -> Generation:
    """Sample group_size responses to each prompt; row i answers prompt i // group_size.

    A response ends with the first token of end_ids (kept) or after max_new_tokens. At most max_rows
    rows are decoded at a time, which bounds the cache. noise, a row's prompt number and its sample
    number fix its randomness; prompts are numbered from first_prompt, so that a long list may be
    sampled piece by piece. progress is called with the numbers of new tokens and of rows that have
    just ended (see Progress).
    """
    B = len(prompts) * group_size
    prompt_len = torch.tensor([len(p) for p in prompts]).repeat_interleave(group_size)
    response = torch.zeros(B, max_new_tokens, dtype=torch.int64)
    logp = torch.zeros(B, max_new_tokens)
    length = torch.zeros(B, dtype=torch.int64)
    finished = torch.zeros(B, dtype=torch.bool)
    settings = (temperature, top_p, top_k)
    with _decoding(model):
        for start in range(0, B, max_rows):
            rows = range(start, min(start + max_rows, B))
            keys = [(r // group_size, r % group_size) for r in rows]
            rng_keys = [(first_prompt + p, s) for p, s in keys]
            noise_rows = np.stack([uniforms(noise, *key, max_new_tokens) for key in rng_keys])
            wave = _wave(model, prompts, keys, noise_rows, end_ids, settings, progress)
            part = slice(rows.start, rows.stop)
            response[part], logp[part], length[part], finished[part] = wave

    R = int(length.max())
    tokens = torch.zeros(B, int((prompt_len + length).max()), dtype=torch.int64)
    for i in range(B):
        p, n = int(prompt_len[i]), int(length[i])
        tokens[i, :p] = torch.tensor(prompts[i // group_size])
        tokens[i, p : p + n] = response[i, :n]
    logp[torch.arange(max_new_tokens) >= length[:, None]] = 0.0
    return Generation(tokens, prompt_len, length, finished, logp[:, :R].contiguous())


def decode(
    tokenizer: PreTrainedTokenizerBase,
    tokens: torch.Tensor,
    prompt_len: torch.Tensor,
    length: torch.Tensor,
) -> list[str]:
    """Response texts of tokens [B, T], without special tokens."""
    rows = zip(tokens.tolist(), prompt_len.tolist(), length.tolist(), strict=True)
    return tokenizer.batch_decode([row[p : p + n] for row, p, n in rows], skip_special_tokens=True)


def _wave(model, prompts, keys, noise, end_ids, settings, progress):
    """Decode rows that fit at once: keys [(prompt, sample)] n, noise float64 [n, max_new]."""
    device = next(model.parameters()).device
    decoder, output = backbone(model), head(model)
    n, max_new = noise.shape
    noise = torch.from_numpy(noise).to(device)
    ends = torch.tensor(end_ids, device=device)

    # Prefill each prompt once, right-padded: a causal model never looks right, so no mask.
    first = keys[0][0]
    unique = prompts[first : keys[-1][0] + 1]
    lens = torch.tensor([len(p) for p in unique], device=device)
    P = int(lens.max())
    padded = torch.tensor([p + [0] * (P - len(p)) for p in unique], device=device)  # [u, P]
    cache = KVCache()
    hidden = decoder(padded, past_key_values=cache, use_cache=True).last_hidden_state  # [u, P, H]
    logits = output(hidden[torch.arange(len(unique), device=device), lens - 1])  # [u, V]
    cache.filled = P

    group = torch.tensor([p - first for p, _ in keys], device=device)  # [n] prompt of each row
    logits = logits[group]
    cache.select(group, min(P + GROW, P + max_new))
    row = torch.arange(n, device=device)  # where the rows still decoded stand in the results
    lens = lens[group]
    # Columns a row may see: its prompt, then every decoded column. None where there is no padding.
    visible = torch.arange(P + max_new, device=device)
    visible = (visible < lens[:, None]) | (visible >= P)  # [n, P + max_new]
    padding = not bool(visible.all())

    tokens = torch.zeros(n, max_new, dtype=torch.int64, device=device)
    logp = torch.zeros(n, max_new, device=device)
    length = torch.zeros(n, dtype=torch.int64, device=device)
    finished = torch.zeros(n, dtype=torch.bool, device=device)
    # Looking whether rows have ended waits for the GPU, so it is done every few tokens there.
    every = 1 if device.type == "cpu" else 8

    counted, open_rows = 0, n
    for j in range(max_new):
        token, token_logp = sample(logits, noise[row, j], *settings)
        alive = ~finished[row]
        tokens[row, j], logp[row, j] = token, token_logp
        length[row] += alive
        finished[row] |= torch.isin(token, ends)
        last = j + 1 == max_new
        if j % every == 0 or last:
            keep = (~finished[row]).nonzero()[:, 0]
            left = 0 if last else len(keep)
            if progress:
                total = int(length.sum())
                progress(total - counted, open_rows - left)
                counted, open_rows = total, left
            if left == 0:
                break
            if len(keep) < SHRINK * len(row):
                row, token, lens, visible = row[keep], token[keep], lens[keep], visible[keep]
                cache.select(keep, cache.columns)
        if cache.filled == cache.columns:
            cache.select(None, min(cache.columns + GROW, P + max_new))
        mask = visible[:, None, None, : cache.filled + 1] if padding else None
        hidden = decoder(
            token[:, None],
            attention_mask=mask,
            position_ids=(lens + j)[:, None],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state  # [n, 1, H]
        cache.filled += 1
        logits = output(hidden[:, 0])  # [n, V]
    return tokens.cpu(), logp.cpu(), length.cpu(), finished.cpu()
