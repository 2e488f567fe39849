"""Decoding: batched sampling with a KV cache over the Hugging Face modules.

transformers runs its own layers with our cache class and our attention function, so no architecture
needs a forward pass of its own here. Each prompt is prefilled once for its whole group. When a row
ends, a waiting row takes its slot.

The randomness of a token depends only on its row and position, so neither batch nor slot changes a
sample. In fp32 on the CPU this holds for every token. In bf16 rounding depends on the shape of a
matrix product, so another max_rows gives other samples from the same distribution. On the GPU a
step is a captured CUDA graph (decoding/slots.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedTokenizerBase

from decoding.kvcache import PrefillCache, Prompt, decode_attention
from decoding.sampling import uniforms
from decoding.slots import DecodeSetup, Rows, Slots
from harness.output_layer import logits
from lora import weights_address
from model import backbone, head

# First key of the noise, so that training, eval and majority labels never share a stream.
TRAIN_NOISE, EVAL_NOISE, LABEL_NOISE = 1, 2, 3
PREFILL_TOKENS = 4096  # padded prompt tokens prefilled at once; all are held until placed


@dataclass
class Generation:
    """The result of generate, for B = len(prompts) x group_size rows; R is the longest response.

    tokens        int64 [B, T], right-padded prompt + response
    prompt_len    int64 [B], tokens
    length        int64 [B], response tokens, including the end token
    finished      bool [B], whether an end token came before the budget ran out
    sampler_logp  float32 [B, R], 0 beyond length

    All tensors are on the CPU, whatever the model's device is.
    """

    tokens: torch.Tensor
    prompt_len: torch.Tensor
    length: torch.Tensor
    finished: torch.Tensor
    sampler_logp: torch.Tensor


def join(parts: list[Generation]) -> Generation:
    """Put the generations of consecutive prompts together."""

    def rows(name: str) -> torch.Tensor:
        tensors = [getattr(part, name) for part in parts]
        if tensors[0].dim() == 2:
            width = max(t.shape[1] for t in tensors)
            tensors = [F.pad(t, (0, width - t.shape[1])) for t in tensors]
        return torch.cat(tensors)

    return Generation(*(rows(field.name) for field in fields(Generation)))


# --------------------------------------------------------------------------------------- decoding


@torch.no_grad()
def prefill(model: nn.Module, prompts: list[list[int]]) -> list[Prompt]:
    """Prefill prompts (lists of token ids) in one batch.

    Prompts are padded on the right. A causal model never attends to the right, so it needs no mask.
    """
    device = next(model.parameters()).device
    lens = torch.tensor([len(p) for p in prompts], device=device)
    P = max(map(len, prompts))
    padded = torch.tensor([p + [0] * (P - len(p)) for p in prompts], device=device)  # [u, P]
    cache = PrefillCache()
    hidden = backbone(model)(padded, past_key_values=cache, use_cache=True).last_hidden_state
    last = hidden[torch.arange(len(prompts), device=device), lens - 1]  # [u, H]
    found = []
    for i, (prompt, z) in enumerate(zip(prompts, logits(head(model), last), strict=True)):
        keys, values = (
            [layer[i, :, : len(prompt)] for layer in layers]
            for layers in (cache.keys, cache.values)
        )
        found.append(Prompt(keys, values, z))
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
    numbers: Sequence[int] | None = None,
    budgets: Sequence[int] | None = None,
    on_end: Callable[[int, list[int], bool, list[float]], None] | None = None,
) -> Generation:
    """Sample group_size responses to each prompt. Row i answers prompt i // group_size.

    A response ends with the first token of end_ids, which is kept, or when its budget runs out. The
    budget is max_new_tokens, or the row's entry of budgets, [B] of at most max_new_tokens (used for
    timing). At most max_rows rows are decoded at a time, which bounds the cache. Waiting rows move
    in when others end. The randomness of a row is a function of noise, its prompt number and its
    sample number. Prompts are numbered 0, 1, ... unless numbers is given; with numbers, a long list
    can be sampled piece by piece. progress is called with the number of new tokens and the number
    of rows that have just ended (see Progress). on_end is called once for each row that has ended,
    with the row, the tokens of its response, whether it finished, and their log-probabilities.
    """
    B = len(prompts) * group_size
    numbers = range(len(prompts)) if numbers is None else numbers
    keys = [(numbers[i // group_size], i % group_size) for i in range(B)]
    uniform = torch.from_numpy(np.stack([uniforms(noise, *key, max_new_tokens) for key in keys]))
    budget = torch.tensor([max_new_tokens] * B if budgets is None else list(budgets))
    lens = torch.tensor([len(p) for p in prompts]).repeat_interleave(group_size)
    shape = (B, max_new_tokens, end_ids, (temperature, top_p, top_k))
    with decode_attention(model):
        key, slots = _slots(model, shape, min(B, max_rows), int(lens.max()))
        rows = slots.rows
        rows.begin(uniform, budget, lens)
        _decode_all(model, prompts, group_size, slots, progress, on_end)
    if slots.static:  # kept for the next call, unless this call has failed
        slots.setup.kept = (key, slots)
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


def _decode_all(model, prompts, group_size, slots, progress, on_end):
    """Decode all rows. A row moves into a slot, is decoded, and makes room for the next row."""
    rows = slots.rows
    B, device = len(rows.length), rows.length.device
    # Checking which rows have ended waits for the GPU, so it is done only every few tokens there.
    every = 1 if device.type == "cpu" else 8
    ready: dict[int, Prompt] = {}  # prefilled prompts that some row still needs
    told: set[int] = set()  # rows for which on_end has been called
    at_once = max(1, PREFILL_TOKENS // max(map(len, prompts)))
    free, arrived, counted, ticks = list(range(slots.n)), 0, (0, 0), 0
    while True:
        if free:  # waiting rows move in
            new = list(range(arrived, min(arrived + len(free), B)))
            taken, arrived = free[: len(new)], arrived + len(new)
            for p in dict.fromkeys(r // group_size for r in new):
                if p not in ready:
                    last = min(p + at_once, new[-1] // group_size + 1)
                    ready |= zip(range(p, last), prefill(model, prompts[p:last]), strict=True)
                group = [
                    (slot, r) for slot, r in zip(taken, new, strict=True) if r // group_size == p
                ]
                slots.place(*map(list, zip(*group, strict=True)), ready[p])
                if (p + 1) * group_size <= arrived:
                    del ready[p]
        if free or ticks % every == 0:
            ended = slots.look()
            if progress:
                now = (int(rows.length.sum()), arrived - ended.count(False))
                progress(now[0] - counted[0], now[1] - counted[1])
                counted = now
            if on_end and arrived - ended.count(False) > len(told):
                _tell(rows, told, on_end)
            if all(ended) and arrived == B:
                return
            free = slots.shrink(ended, waiting=arrived < B)
            if free:
                continue
        slots.step()
        ticks += 1


def _tell(rows: Rows, told: set[int], on_end) -> None:
    """Call on_end for each row that has ended and is not in told, and add the row to told."""
    over = (rows.finished | (rows.length >= rows.budget)).tolist()
    for row in (row for row, one in enumerate(over) if one and row not in told):
        told.add(row)
        n = int(rows.length[row])
        response, logp = rows.response[row, :n].tolist(), rows.logp[row, :n].tolist()
        on_end(row, response, bool(rows.finished[row]), logp)


def _slots(model, shape, n, longest) -> tuple[tuple, Slots]:
    """n slots and their key. Static slots of the last call are used again if they fit.

    shape holds the arguments of Rows (decoding/slots.py). longest is the length in tokens of the
    longest prompt.
    """
    device = next(model.parameters()).device
    setup = decode_setup(model)
    longest = max(longest, setup.longest_prompt)
    key = (repr(shape), n, weights_address(model))
    kept_key, kept = setup.kept or (None, None)
    drop_slots(model)
    if kept_key == key and kept.longest >= longest:
        kept.begin()
    else:
        kept = None  # free its memory before new buffers are allocated
        kept = Slots(model, Rows(*shape, device), n, longest, setup)
    return key, kept


def drop_slots(model: nn.Module) -> None:
    """Free the static buffers and graphs that generate keeps between calls."""
    decode_setup(model).kept = None


def decode_setup(model: nn.Module) -> DecodeSetup:
    """How this model decodes. Set model.decode_setup to change it."""
    if getattr(model, "decode_setup", None) is None:
        model.decode_setup = DecodeSetup.for_device(next(model.parameters()).device)
    return model.decode_setup


def decode(
    tokenizer: PreTrainedTokenizerBase,
    tokens: torch.Tensor,
    prompt_len: torch.Tensor,
    length: torch.Tensor,
    prefix: str = "",
) -> list[str]:
    """Response texts of tokens [B, T], without special tokens. Each begins with the prefix."""
    rows = zip(tokens.tolist(), prompt_len.tolist(), length.tolist(), strict=True)
    return decode_rows(tokenizer, [row[p : p + n] for row, p, n in rows], prefix)


def decode_raw(
    tokenizer: PreTrainedTokenizerBase,
    tokens: torch.Tensor,
    prompt_len: torch.Tensor,
    length: torch.Tensor,
    finished: torch.Tensor,
    prefix: str = "",
) -> list[str]:
    """Response texts of tokens [B, T] with special tokens, without padding.

    finished bool [B] marks the rows whose last response token is an end token. That end token is
    left out.
    """
    own = (length - finished.to(length.dtype)).tolist()
    rows = zip(tokens.tolist(), prompt_len.tolist(), own, strict=True)
    rows = [row[p : p + n] for row, p, n in rows]
    return decode_rows(tokenizer, rows, prefix, skip_special_tokens=False)


def decode_rows(
    tokenizer: PreTrainedTokenizerBase,
    rows: list[list[int]],
    prefix: str = "",
    skip_special_tokens: bool = True,
) -> list[str]:
    """The texts of rows of tokens, each after the prefix.

    The prefix is decoded together with the row, because some tokenizers drop the space in front of
    the first token of a text.
    """
    start = tokenizer(prefix, add_special_tokens=False)["input_ids"] if prefix else []
    rows = [start + row for row in rows]
    return tokenizer.batch_decode(rows, skip_special_tokens=skip_special_tokens)
