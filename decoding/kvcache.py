"""The KV caches and the attention function that decoding passes to the layers of transformers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

GROW = 128  # columns by which a KVCache grows; a small number keeps short responses cheap
BUCKET = 256  # a StaticCache is read up to a multiple of this many columns
ALIGN = 64  # the columns of a StaticCache are a multiple of this, since kernels pad odd widths


@dataclass
class Prompt:
    """A prefilled prompt: keys and values [kv_heads, P, head_dim] per layer, next logits [V]."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    logits: torch.Tensor


class PrefillCache:
    """The cache of a prefill. It keeps each layer's keys and values, [u, kv_heads, P, head_dim]."""

    is_compileable = False  # transformers reads this

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
    """Keys and values of n slots, [n, kv_heads, columns, head_dim] per layer.

    All slots write to the same column in a step, so that a write is a slice. The tokens of a slot
    are in consecutive columns that end at the current one. When a row moves in, its prompt is put
    directly before that column. Columns further left belong to an earlier row or to none, and are
    masked. When room runs out, columns that no slot reads any more are dropped. Keys are cached
    with their rotary positions, which count within the row and are not column numbers.
    """

    is_compileable = False
    shape = None  # steps have no fixed shape

    def __init__(self, slots: int, longest_prompt: int, max_new_tokens: int, like: Prompt):
        """Start empty.

        longest_prompt is the length in tokens of the longest prompt that will be placed. like is
        any prefilled prompt; it gives the shapes.
        """
        self.longest_prompt = self.column = longest_prompt  # column: the next one to be written
        columns = longest_prompt + min(GROW, max_new_tokens)
        self.keys, self.values = (
            [x.new_empty(slots, x.shape[0], columns, x.shape[2]) for x in layers]
            for layers in (like.keys, like.values)
        )
        for store in (*self.keys, *self.values):  # masked values must be finite too
            store[:, :, : self.column] = 0.0
        # Added to attention scores: 0 at columns that a slot reads, -inf elsewhere.
        self.mask = like.keys[0].new_zeros(slots, columns)
        self.start: list[int | None] = [None] * slots  # a slot's first column; None: empty
        # first: the leftmost column that any slot reads. padding: whether slots start differently.
        self.first, self.padding = self.column, False

    def update(self, key, value, layer: int, *args, **kwargs):  # [n, H, 1, D] each
        """Store a column and return the columns that any slot reads. Attention layers call this."""
        end = self.column + 1
        self.keys[layer][:, :, self.column : end] = key
        self.values[layer][:, :, self.column : end] = value
        return self.keys[layer][:, :, self.first : end], self.values[layer][:, :, self.first : end]

    def get_seq_length(self, layer: int = 0) -> int:
        return self.column

    def open(self, position: torch.Tensor) -> torch.Tensor | None:
        """The mask of a step, [n, 1, 1, S] over the columns that `update` will return.

        None means that every slot reads all of them.
        """
        return self.mask[:, None, None, self.first : self.column + 1] if self.padding else None

    def advance(self) -> None:
        """Move to the next column at the end of a step."""
        self.column += 1

    def place(self, slots: list[int], index: torch.Tensor, prompt: Prompt) -> None:
        """Put a prompt into these slots, as if they had just read it. index: the slots as [n]."""
        begin = self.column - prompt.keys[0].shape[1]
        run = slots == list(range(slots[0], slots[-1] + 1))
        where = slice(slots[0], slots[-1] + 1) if run else index  # a slice is faster
        for stores, layers in ((self.keys, prompt.keys), (self.values, prompt.values)):
            for store, new in zip(stores, layers, strict=True):
                store[where, :, begin : self.column] = new
        self.mask[where, :begin] = -torch.inf
        self.mask[where, begin:] = 0.0
        for slot in slots:
            self.start[slot] = begin
        self._look()

    def release(self, slots: list[int]) -> None:
        """Mark the rows of these slots as ended. They are still computed, but no longer used."""
        for slot in slots:
            self.start[slot] = None
        self._look()

    def keep(self, slots: list[int], index: torch.Tensor) -> None:
        """Drop all other slots and renumber these in this order. index: the slots as [n]."""
        self.start = [self.start[slot] for slot in slots]
        self._copy(index, self.keys[0].shape[2] - self.column)

    def make_room(self) -> None:
        """Make sure that there is a column to write to."""
        if self.column == self.keys[0].shape[2]:
            self._copy(None, GROW)

    def _look(self) -> None:
        starts = [start for start in self.start if start is not None]
        self.first = min(starts, default=self.column)
        self.padding = max(starts, default=self.first) > self.first

    def _copy(self, index: torch.Tensor | None, room: int) -> None:
        """Copy the slots `index` (None: all) to new buffers with room for `room` more columns.

        The copy starts at the first column in use.
        """
        # The longest prompt must still fit to the left of the current column.
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
        self.mask[:, held:] = 0.0  # every slot reads future columns
        self.start = [None if start is None else start - first for start in self.start]
        self.column = held
        self._look()


class StaticCache:
    """Keys and values of n slots in buffers that are never replaced, for CUDA graphs.

    Shape [n, kv_heads, columns, head_dim] per layer. The tokens of a slot are in columns 0, 1, ...
    Each row writes at its own position. All slots are read up to the end of the bucket that holds
    the longest one. The class has the same methods as KVCache.
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
        """Empty all slots. New rows overwrite what is stored."""
        # Tokens in each slot, counted back to tick 0, so a tick adds one to all. None: empty.
        self.held: list[int | None] = [None] * len(self.slot)
        self.tick = 0

    @property
    def shape(self) -> int:
        """Number of columns that the next step reads."""
        held = max((n for n in self.held if n is not None), default=-self.tick) + self.tick + 1
        return min(-(-held // self.bucket) * self.bucket, len(self.at))

    def open(self, position: torch.Tensor) -> torch.Tensor:
        """The mask of a step, [n, 1, 1, S]. position [n]: the columns that `update` writes."""
        self.where, self.seen = (self.slot[: len(position)], position), self.shape
        hidden = self.at[: self.seen] > position[:, None]  # [n, S]
        mask = torch.zeros(hidden.shape, dtype=self.keys[0].dtype, device=hidden.device)
        return mask.masked_fill(hidden, -torch.inf)[:, None, None]

    def update(self, key, value, layer: int, *args, **kwargs):  # [n, H, 1, D] each
        """Store one token per slot and return the bucket. Each attention layer calls it."""
        slot, position = self.where
        for store, new in ((self.keys[layer], key), (self.values[layer], value)):
            store[slot, :, position] = new[:, :, 0]
        n = len(slot)
        return self.keys[layer][:n, :, : self.seen], self.values[layer][:n, :, : self.seen]

    def get_seq_length(self, layer: int = 0) -> int:
        return 0  # not used, since positions and mask are passed in

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
        """Move the tokens of these slots to the first slots. index: the slots as [n]."""
        for store in (*self.keys, *self.values):
            store[: len(slots)] = store[index]
        self.held = [self.held[slot] for slot in slots] + [None] * (len(self.held) - len(slots))

    def make_room(self) -> None:
        """Nothing to do: the buffers have their full length from the start."""

    def advance(self) -> None:
        self.tick += 1


def _attention(module, query, key, value, mask, scaling=None, **kwargs):
    """Attention of one new token per row: [n, heads, 1, D] over [n, kv_heads, S, D].

    With grouped-query attention, query heads that share a key head are viewed as query rows, so
    keys and values are not repeated. Longer queries (prefill) use the function of transformers, or
    expanded_attention in fp32 on CUDA.
    """
    if query.shape[2] > 1:
        if query.is_cuda and query.dtype == torch.float32:
            return expanded_attention(module, query, key, value, mask, scaling=scaling)
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)
    n, heads, _, D = query.shape
    query = query.reshape(n, key.shape[1], heads // key.shape[1], D)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(n, 1, heads, D), None


def expanded_attention(module, query, key, value, mask, scaling=None, **kwargs):
    """Causal attention [n, heads, T, D] for fp32 on CUDA, in prefill, scoring and update.

    Keys and values are repeated for each query head. Flash attention takes no fp32 and the
    memory-efficient kernel takes no grouped heads, so otherwise all T x T scores would be held. No
    mask is needed, since padding is on the right.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    out = F.scaled_dot_product_attention(query, key, value, scale=scaling, is_causal=True)
    return out.transpose(1, 2).contiguous(), None


EXPANDED_ATTENTION = "nanorlvr_expanded"
AttentionInterface.register("nanorlvr_decode", _attention)
AttentionInterface.register(EXPANDED_ATTENTION, expanded_attention)


@contextmanager
def decode_attention(model: nn.Module) -> Iterator[None]:
    """Use our attention function, without gradients, inside this context.

    Gradient checkpointing is off, because it would drop the cache.
    """
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
