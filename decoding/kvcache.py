"""The KV cache and the attention that decoding gives to transformers' own layers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

GROW = 128  # columns by which a KVCache grows, so that short responses stay cheap
BUCKET = 256  # a StaticCache is read up to a multiple of so many columns
ALIGN = 64  # a StaticCache has a multiple of so many columns, since kernels pad odd widths


@dataclass
class Prompt:
    """A prefilled prompt: keys and values [kv_heads, P, head_dim] a layer, next logits [V]."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    logits: torch.Tensor


class PrefillCache:
    """The cache of a prefill: keeps what each layer makes, [u, kv_heads, P, head_dim]."""

    is_compileable = False  # transformers asks

    def __init__(self) -> None:
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def update(self, key, value, layer: int, *args, **kwargs):
        self.keys.append(key)
        self.values.append(value)
        return key, value

    def get_seq_length(self, layer: int = 0) -> int:
        return 0


class KVCache:
    """Keys and values of n slots, [n, kv_heads, columns, head_dim] a layer.

    All slots write the same column in a step, so that a write is a slice. A slot's tokens stand in
    consecutive columns that end at the current one: when a row moves in, its prompt is put right
    before that column. What stands further left is another row's or nothing, and masked; columns
    that no slot looks at any more go when room runs out. Keys are cached with their rotary
    positions, which are the row's own and not the columns.
    """

    is_compileable = False
    shape = None  # of a step: new ones all the time

    def __init__(self, slots: int, longest_prompt: int, max_new_tokens: int, like: Prompt):
        """Empty. longest_prompt: tokens of the longest that will ever be placed; like: any one."""
        self.longest_prompt = self.column = longest_prompt  # column: where the next write goes
        columns = longest_prompt + min(GROW, max_new_tokens)
        self.keys, self.values = (
            [x.new_empty(slots, x.shape[0], columns, x.shape[2]) for x in layers]
            for layers in (like.keys, like.values)
        )
        for store in (*self.keys, *self.values):  # what is masked must still be finite
            store[:, :, : self.column] = 0.0
        # Added to scores: 0 where a slot looks, -inf elsewhere.
        self.mask = like.keys[0].new_zeros(slots, columns)
        self.start: list[int | None] = [None] * slots  # a slot's first column; None: nobody in it
        self.first, self.padding = self.column, False  # no slot looks further left; not all as far

    def update(self, key, value, layer: int, *args, **kwargs):  # [n, H, 1, D] each
        """Called by every attention layer: store a column, return those that any slot looks at."""
        end = self.column + 1
        self.keys[layer][:, :, self.column : end] = key
        self.values[layer][:, :, self.column : end] = value
        return self.keys[layer][:, :, self.first : end], self.values[layer][:, :, self.first : end]

    def get_seq_length(self, layer: int = 0) -> int:
        return self.column

    def open(self, position: torch.Tensor) -> torch.Tensor | None:
        """The mask of a step, [n, 1, 1, S] over what `update` is to return; None: all see all."""
        return self.mask[:, None, None, self.first : self.column + 1] if self.padding else None

    def advance(self) -> None:
        """A step is over."""
        self.column += 1

    def place(self, slots: list[int], index: torch.Tensor, prompt: Prompt) -> None:
        """Put a prompt into these slots, as if they had just read it; index: the same, [n]."""
        begin = self.column - prompt.keys[0].shape[1]
        run = slots == list(range(slots[0], slots[-1] + 1))
        where = slice(slots[0], slots[-1] + 1) if run else index  # a slice is quicker
        for stores, layers in ((self.keys, prompt.keys), (self.values, prompt.values)):
            for store, new in zip(stores, layers, strict=True):
                store[where, :, begin : self.column] = new
        self.mask[where, :begin] = -torch.inf
        self.mask[where, begin:] = 0.0
        for slot in slots:
            self.start[slot] = begin
        self._look()

    def release(self, slots: list[int]) -> None:
        """These slots' rows have ended: they go on being computed, and count for nothing."""
        for slot in slots:
            self.start[slot] = None
        self._look()

    def keep(self, slots: list[int], index: torch.Tensor) -> None:
        """Drop all other slots; those kept are numbered anew in this order. index: the same."""
        self.start = [self.start[slot] for slot in slots]
        self._copy(index, self.keys[0].shape[2] - self.column)

    def make_room(self) -> None:
        """See to it that there is a column to write to."""
        if self.column == self.keys[0].shape[2]:
            self._copy(None, GROW)

    def _look(self) -> None:
        starts = [start for start in self.start if start is not None]
        self.first = min(starts, default=self.column)
        self.padding = max(starts, default=self.first) > self.first

    def _copy(self, index: torch.Tensor | None, room: int) -> None:
        """New buffers of the slots `index` (None: all) from the first column in use, and room."""
        # Whatever prompt moves in next must fit to the left of the column.
        first = min(self.first, self.column - self.longest_prompt)
        held = self.column - first

        def copy(old: torch.Tensor, dim: int) -> torch.Tensor:
            part = old.narrow(dim, first, held)
            part = part if index is None else part[index]
            new = part.new_empty(*part.shape[:dim], held + room, *part.shape[dim + 1 :])
            new.narrow(dim, 0, held).copy_(part)
            return new

        for store in (self.keys, self.values):
            for i, old in enumerate(store):
                store[i] = copy(old, 2)
        self.mask = copy(self.mask, 1)
        self.mask[:, held:] = 0.0  # columns to come are seen by all
        self.start = [None if start is None else start - first for start in self.start]
        self.column = held
        self._look()


class StaticCache:
    """Keys and values of n slots in buffers that are never replaced, for CUDA graphs.

    [n, kv_heads, columns, head_dim] a layer. A slot's tokens stand in columns 0, 1, ...: each row
    writes at its own position, and all are read up to the end of the bucket that holds the longest.
    Has KVCache's methods.
    """

    is_compileable = False

    def __init__(
        self,
        slots: int,
        longest_prompt: int,
        max_new_tokens: int,
        like: Prompt,
        bucket: int = BUCKET,
    ):
        self.bucket = bucket
        columns = -(-(longest_prompt + max_new_tokens) // ALIGN) * ALIGN
        self.keys, self.values = (
            [x.new_zeros(slots, x.shape[0], columns, x.shape[2]) for x in layers]
            for layers in (like.keys, like.values)
        )
        device = like.keys[0].device
        self.slot, self.at = (
            torch.arange(slots, device=device),
            torch.arange(columns, device=device),
        )
        self.clear()

    def clear(self) -> None:
        """Nobody in any slot; what was stored is written over."""
        # Tokens in each slot at tick 0, so that a tick adds one to all; None: nobody in it.
        self.held: list[int | None] = [None] * len(self.slot)
        self.tick = 0

    @property
    def shape(self) -> int:
        """Columns read in the coming step."""
        held = max((n for n in self.held if n is not None), default=-self.tick) + self.tick + 1
        return min(-(-held // self.bucket) * self.bucket, len(self.at))

    def open(self, position: torch.Tensor) -> torch.Tensor:
        """The mask of a step, [n, 1, 1, S]; position [n]: columns to which `update` writes."""
        self.where, self.seen = (self.slot[: len(position)], position), self.shape
        hidden = self.at[: self.seen] > position[:, None]  # [n, S]
        mask = torch.zeros(hidden.shape, dtype=self.keys[0].dtype, device=hidden.device)
        return mask.masked_fill(hidden, -torch.inf)[:, None, None]

    def update(self, key, value, layer: int, *args, **kwargs):  # [n, H, 1, D] each
        """Called by every attention layer: store a token a slot, return the bucket."""
        slot, position = self.where
        for store, new in ((self.keys[layer], key), (self.values[layer], value)):
            store[slot, :, position] = new[:, :, 0]
        n = len(slot)
        return self.keys[layer][:n, :, : self.seen], self.values[layer][:n, :, : self.seen]

    def get_seq_length(self, layer: int = 0) -> int:
        return 0  # positions and mask are given

    def place(self, slots: list[int], index: torch.Tensor, prompt: Prompt) -> None:
        P = prompt.keys[0].shape[1]
        for stores, layers in ((self.keys, prompt.keys), (self.values, prompt.values)):
            for store, new in zip(stores, layers, strict=True):
                store[index, :, :P] = new
        for slot in slots:
            self.held[slot] = P - self.tick

    def release(self, slots: list[int]) -> None:
        for slot in slots:
            self.held[slot] = None

    def keep(self, slots: list[int], index: torch.Tensor) -> None:
        """These slots' tokens move to the first ones; index: the same, [n]."""
        for store in (*self.keys, *self.values):
            store[: len(slots)] = store[index]
        self.held = [self.held[slot] for slot in slots] + [None] * (len(self.held) - len(slots))

    def make_room(self) -> None:
        """Nothing to do: the buffers are full length."""

    def advance(self) -> None:
        self.tick += 1


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
def decode_attention(model: nn.Module) -> Iterator[None]:
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
