"""Decoding: batched sampling with a KV cache over the Hugging Face modules.

No forward of our own per architecture: transformers runs its layers, with a cache class and an
attention function of ours. Each prompt is prefilled once for its whole group; a row that has ended
leaves, and a waiting one takes its slot; the randomness of a token depends on its row and position
alone, so neither batch nor slot changes a sample.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from kvcache import KVCache, PrefillCache, Prompt, decoding
from model import backbone, head

# First key of the noise: training, eval and majority labels never share a stream.
TRAIN_NOISE, EVAL_NOISE, LABEL_NOISE = 1, 2, 3
SHRINK = 0.9  # ended rows leave when fewer than this share of the slots is alive
PREFILL_TOKENS = 16_384  # prompt tokens, padded, of one prefill
BLOCK = 128  # tokens of the vocabulary whose probabilities the sampler first sums up


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
    if temperature not in (0, 1):
        z = z / temperature
    n, V = z.shape
    size = BLOCK if V > 8 * BLOCK else V
    blocks = -(-V // size)
    # p = exp(z - max), not normalised, in whole blocks: what is over in the last one stays 0.
    p = z.new_zeros(n, blocks * size) if V % size else torch.empty_like(z)
    top, likeliest = z.max(-1, keepdim=True)  # [n, 1]
    torch.sub(z, top, out=p[:, :V]).exp_()
    mass = p.view(n, blocks, size).sum(-1).double()  # [n, blocks]
    total = mass.sum(-1)  # [n]
    if temperature == 0:
        return likeliest[:, 0], -total.log().float()
    if 0 < top_k < V or top_p < 1.0:
        p = _likeliest(p, top_p, top_k)
        mass = p.view(n, blocks, size).sum(-1).double()
    # Invert in two steps, which block and which token in it: a cumulative sum of the vocabulary in
    # fp64 costs as much as a model's forward, and fp32 would lose the tail. right=True finds the
    # first whose cumulative mass exceeds u, never one of probability 0.
    u = uniform[:, None]  # [n, 1]
    block, inside = None, p
    if blocks > 1:
        cdf = mass.cumsum(-1)
        u = u * cdf[:, -1:]
        block = torch.searchsorted(cdf, u, right=True).clamp_max(blocks - 1)  # [n, 1]
        mass = mass.gather(1, block)
        u = ((u - cdf.gather(1, block) + mass) / mass).clamp(0, 1 - 2**-53)  # where in the block
        inside = p.view(n, blocks, size)[torch.arange(n, device=p.device), block[:, 0]]
    inside = inside.cumsum(-1, dtype=torch.float64)  # [n, size]
    token = torch.searchsorted(inside, u * inside[:, -1:], right=True).clamp_max(size - 1)  # [n, 1]
    if block is not None:
        token = (token + block * size).clamp_max(V - 1)
    return token[:, 0], ((z.gather(1, token) - top)[:, 0].double() - total.log()).float()


def _likeliest(p: torch.Tensor, top_p: float, top_k: int) -> torch.Tensor:
    """p [n, V], not normalised, with 0 for all but the likeliest tokens."""
    if 0 < top_k < p.shape[-1]:
        p = p.masked_fill(p < p.topk(top_k).values[:, -1:], 0.0)
    if top_p < 1.0:
        ordered, order = p.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # mass of the likelier tokens
        ordered = ordered.masked_fill(before >= top_p * ordered.sum(-1, keepdim=True), 0.0)
        p = torch.zeros_like(p).scatter(-1, order, ordered)
    return p


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


@torch.no_grad()
def prefill(model: nn.Module, prompts: list[list[int]]) -> list[Prompt]:
    """Read prompts (token ids), right-padded: a causal model never looks right, so no mask."""
    device = next(model.parameters()).device
    found = []
    size = max(1, PREFILL_TOKENS // max(map(len, prompts), default=1))
    for chunk in (prompts[i : i + size] for i in range(0, len(prompts), size)):
        lens = torch.tensor([len(p) for p in chunk], device=device)
        P = int(lens.max())
        padded = torch.tensor([p + [0] * (P - len(p)) for p in chunk], device=device)  # [u, P]
        cache = PrefillCache()
        hidden = backbone(model)(padded, past_key_values=cache, use_cache=True).last_hidden_state
        last = hidden[torch.arange(len(chunk), device=device), lens - 1]  # [u, H]
        for i, (prompt, logits) in enumerate(zip(chunk, head(model)(last), strict=True)):
            keys, values = (
                [layer[i, :, : len(prompt)] for layer in layers]
                for layers in (cache.keys, cache.values)
            )
            found.append(Prompt(keys, values, logits))
    return found


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
    budgets: Sequence[int] | None = None,
) -> Generation:
    """Sample group_size responses to each prompt; row i answers prompt i // group_size.

    A response ends with the first token of end_ids (kept) or after max_new_tokens, or its own of
    budgets, [B] of at most max_new_tokens (for timing, say). At most max_rows rows are decoded at a
    time, which bounds the cache; those that wait move in as others end. noise, a row's prompt
    number and its sample number fix its randomness; prompts are numbered from first_prompt, so that
    a long list may be sampled piece by piece. progress is called with the numbers of new tokens and
    of rows that have just ended (see Progress).
    """
    B = len(prompts) * group_size
    keys = [(first_prompt + i // group_size, i % group_size) for i in range(B)]
    uniform = torch.from_numpy(np.stack([uniforms(noise, *key, max_new_tokens) for key in keys]))
    budget = torch.tensor([max_new_tokens] * B if budgets is None else list(budgets))
    lens = torch.tensor([len(p) for p in prompts]).repeat_interleave(group_size)
    settings = (temperature, top_p, top_k)
    with decoding(model):
        rows = _Rows(uniform, budget, lens, end_ids, next(model.parameters()).device)
        _decode_all(model, prompts, group_size, min(B, max_rows), rows, settings, progress)
    length, finished = rows.length.cpu(), rows.finished.cpu()
    response, logp = rows.response.cpu(), rows.logp.cpu()

    R = int(length.max())
    tokens = torch.zeros(B, int((lens + length).max()), dtype=torch.int64)
    for i in range(B):
        p, n = int(lens[i]), int(length[i])
        tokens[i, :p] = torch.tensor(prompts[i // group_size])
        tokens[i, p : p + n] = response[i, :n]
    logp = logp[:, :R].masked_fill(torch.arange(R) >= length[:, None], 0.0)
    return Generation(tokens, lens, length, finished, logp)


class _Rows:
    """What is known of each of B rows, and what comes of them; a step writes n of them at once."""

    def __init__(self, uniform, budget, lens, end_ids, device):
        B, max_new = uniform.shape
        self.uniform, self.budget, self.lens = (x.to(device) for x in (uniform, budget, lens))
        self.ends = torch.tensor(end_ids, device=device)
        # One more column, to which rows write that have ended but still stand in a slot.
        self.response = torch.zeros(B, max_new + 1, dtype=torch.int64, device=device)
        self.logp = torch.zeros(B, max_new + 1, device=device)
        self.length = torch.zeros(B, dtype=torch.int64, device=device)
        self.finished = torch.zeros(B, dtype=torch.bool, device=device)

    def step(self, row, logits, settings):  # row [n], logits [n, V]
        """Sample a token for each of these rows: tokens [n] and which rows are over, bool [n]."""
        spare = self.uniform.shape[1]
        j = self.length[row]  # [n] response position
        over = self.finished[row] | (j >= self.budget[row])
        token, logp = sample(logits, self.uniform[row, j.clamp_max(spare - 1)], *settings)
        column = torch.where(over, spare, j)
        self.response[row, column], self.logp[row, column] = token, logp
        self.length[row] = j + ~over
        self.finished[row] |= ~over & torch.isin(token, self.ends)
        return token, self.finished[row] | (self.length[row] >= self.budget[row])


def _decode_all(model, prompts, group_size, slots, rows, settings, progress):
    """Decode all rows through so many slots: a row moves in, is decoded, and makes room."""
    B, device = len(rows.length), rows.length.device
    decoder, output = backbone(model), head(model)
    # Looking whether rows have ended waits for the GPU, so it is done every few tokens there.
    every = 1 if device.type == "cpu" else 8
    ready: dict[int, Prompt] = {}  # prompts that rows still need
    cache, logits = None, None
    row = torch.zeros(slots, dtype=torch.int64, device=device)  # which row stands in a slot
    free, arrived, counted, ticks = list(range(slots)), 0, (0, 0), 0
    while True:
        if free and arrived < B:  # waiting rows move in
            new = list(range(arrived, min(arrived + len(free), B)))
            taken, arrived, free = free[: len(new)], arrived + len(new), free[len(new) :]
            needed = sorted({r // group_size for r in new} - ready.keys())
            ready |= zip(needed, prefill(model, [prompts[p] for p in needed]), strict=True)
            if cache is None:
                cache = KVCache(slots, max(map(len, prompts)), rows.uniform.shape[1], ready[0])
                logits = ready[0].logits.new_zeros(slots, len(ready[0].logits))
            for p in dict.fromkeys(r // group_size for r in new):
                group = [slot for slot, r in zip(taken, new, strict=True) if r // group_size == p]
                cache.place(group, ready[p])
                logits[group] = ready[p].logits
                if (p + 1) * group_size <= arrived:
                    del ready[p]
            row[taken] = torch.tensor(new, device=device)

        token, over = rows.step(row, logits, settings)
        ticks += 1
        if ticks % every == 0:
            ended = over.tolist()
            alive = [slot for slot, one in enumerate(ended) if not one]
            if progress:
                now = (int(rows.length.sum()), arrived - len(alive))
                progress(now[0] - counted[0], now[1] - counted[1])
                counted = now
            if not alive and arrived == B:
                return
            if len(alive) < SHRINK * len(ended):
                free = [slot for slot, one in enumerate(ended) if one]
                cache.release(free)
                if not alive:
                    continue
                if arrived == B:
                    cache.keep(alive)
                    row, token, free = row[alive], token[alive], []
        cache.make_room()
        hidden = decoder(
            token[:, None],
            attention_mask=cache.step_mask(),
            position_ids=(rows.lens + rows.length - 1)[row, None],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state  # [n, 1, H]
        cache.column += 1
        logits = output(hidden[:, 0])  # [n, V]


def decode(
    tokenizer: PreTrainedTokenizerBase,
    tokens: torch.Tensor,
    prompt_len: torch.Tensor,
    length: torch.Tensor,
) -> list[str]:
    """Response texts of tokens [B, T], without special tokens."""
    rows = zip(tokens.tolist(), prompt_len.tolist(), length.tolist(), strict=True)
    return tokenizer.batch_decode([row[p : p + n] for row, p, n in rows], skip_special_tokens=True)
