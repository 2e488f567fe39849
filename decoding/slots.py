"""Slots: rows that are decoded side by side, one token each per step, and steps as CUDA graphs.

On the GPU, a step of a small model spends most of its time in Python, launching kernels. The step
is therefore captured once as a CUDA graph and then replayed. A graph holds addresses, not values.
It stays valid while weights (lora.merged), cache and rows change, as long as no tensor is replaced.
"""

import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import nn

from decoding.kvcache import BUCKET, KVCache, Prompt, StaticCache
from decoding.sampling import sample
from harness.output_layer import logits
from model import backbone, head

SHRINK = 0.9  # ended rows leave when less than this share of the slots is still decoding


class Rows:
    """The inputs and results of B rows. A step writes one token to each of n rows."""

    def __init__(self, B: int, max_new: int, end_ids: list[int], settings: tuple, device):
        """settings: temperature, top_p and top_k for sample (decoding/sampling.py)."""
        new = lambda *shape, dtype: torch.zeros(*shape, dtype=dtype, device=device)  # noqa: E731
        self.settings = settings
        self.ends = torch.tensor(end_ids, device=device)
        self.uniform = new(B, max_new, dtype=torch.float64)
        self.budget, self.lens, self.length = (new(B, dtype=torch.int64) for _ in range(3))
        self.finished = new(B, dtype=torch.bool)
        # One extra column. Rows that have ended but are still in a slot write to it.
        self.response = new(B, max_new + 1, dtype=torch.int64)
        self.logp = new(B, max_new + 1, dtype=torch.float32)

    def begin(self, uniform: torch.Tensor, budget: torch.Tensor, lens: torch.Tensor) -> None:
        """Start B new rows: uniforms [B, max_new], response budgets [B], prompt lengths [B]."""
        for mine, given in ((self.uniform, uniform), (self.budget, budget), (self.lens, lens)):
            mine.copy_(given)
        for mine in (self.length, self.finished, self.logp):
            mine.zero_()

    def step(self, row: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample a token for each of these rows from their logits z [n, V].

        Returns the tokens [n] and whether each row has ended, bool [n].
        """
        spare = self.uniform.shape[1]
        j = self.length[row]  # [n] response position
        over = self.finished[row] | (j >= self.budget[row])
        token, logp = sample(z, self.uniform[row, j.clamp_max(spare - 1)], *self.settings)
        column = torch.where(over, spare, j)
        self.response[row, column], self.logp[row, column] = token, logp
        self.length[row] = j + ~over
        self.finished[row] |= ~over & (token[:, None] == self.ends).any(1)
        return token, self.finished[row] | (self.length[row] >= self.budget[row])


@dataclass
class DecodeSetup:
    """How a model decodes. The engine makes one for each model, and tests make their own.

    static means that no tensor is ever replaced and each step has one of few shapes (StaticCache).
    Steps can then be captured as CUDA graphs. Otherwise unused slots are dropped at once and the
    cache is as small as possible (KVCache), which suits the CPU.
    """

    static: bool
    capture: Callable | None = None  # captures a step as a graph; None: steps run eagerly
    bucket: int = BUCKET  # a static cache is read up to a multiple of this many columns
    # Length in tokens of the longest prompt that can come. A static cache has room for it from the
    # start. Otherwise its columns, its graphs and its rounding would depend on earlier prompts.
    longest_prompt: int = 0
    # Static slots and their graphs, kept between calls, with the key that tells what they fit.
    kept: tuple[tuple, "Slots"] | None = field(default=None, repr=False)

    @classmethod
    def for_device(cls, device: torch.device) -> "DecodeSetup":
        """Static slots and graphs on CUDA, a growing cache elsewhere."""
        return cls(True, capture) if device.type == "cuda" else cls(False)


class Slots:
    """n slots. Each has a row, the row's last token and a part of the cache."""

    def __init__(self, model: nn.Module, rows: Rows, slots: int, longest: int, setup: DecodeSetup):
        """longest: length in tokens of the longest prompt that will be placed."""
        self.model, self.rows, self.slots, self.longest = model, rows, slots, longest
        self.setup, self.static = setup, setup.static
        device = rows.length.device
        # Keys: (slots in use, columns read). None: no memory for a graph, the step runs eagerly.
        self.graphs: dict[tuple, torch.cuda.CUDAGraph | None] = {}
        # All graphs share one memory pool, since no graph uses the temporary results of another.
        cuda = setup.capture and device.type == "cuda" and torch.cuda.is_available()
        self.pool = torch.cuda.graph_pool_handle() if cuda else None
        self.row = torch.zeros(slots, dtype=torch.int64, device=device)
        self.token = torch.zeros(slots, dtype=torch.int64, device=device)
        self.over = torch.ones(slots, dtype=torch.bool, device=device)
        self.done = torch.zeros(1, dtype=torch.int64, device=device)  # steps that the device did
        self.asked = 0  # steps that the host started
        self.cache: KVCache | StaticCache | None = None
        self.n = slots  # slots in use

    def begin(self) -> None:
        """Reset the slots for new rows. Only static slots can be reset."""
        self.n, self.asked = self.slots, 0
        self.over.fill_(True)
        self.done.zero_()
        self.cache.clear()

    def place(self, group: list[int], rows: list[int], prompt: Prompt) -> None:
        """Put rows of one prompt into slots and sample their first token."""
        if self.cache is None:
            max_new = self.rows.uniform.shape[1]
            sizes = (self.slots, self.longest, max_new, prompt)
            self.cache = StaticCache(*sizes, self.setup.bucket) if self.static else KVCache(*sizes)
        index, row = torch.tensor([group, rows], device=self.row.device)  # one upload
        self.cache.place(group, index, prompt)
        self.row[index] = row
        z = prompt.logits.expand(len(group), -1)
        self.token[index], self.over[index] = self.rows.step(row, z)

    def look(self) -> list[bool]:
        """Return over[:n]. The host waits for it.

        Raises RuntimeError if a step did not run. A graph that was captured on the wrong device or
        stream is empty, and replaying it does nothing and raises no error.
        """
        *over, done = torch.cat([self.over[: self.n].to(torch.int64), self.done]).tolist()
        if done != self.asked:
            raise RuntimeError(f"{self.asked} decoding steps were started and {done} were done")
        return [bool(x) for x in over]

    def shrink(self, ended: list[bool], waiting: bool) -> list[int]:
        """Release ended rows, given over[:n] as a list. Return the slots free for waiting rows."""
        alive = [slot for slot, one in enumerate(ended) if not one]
        if len(alive) >= SHRINK * len(ended):
            return []
        free = [slot for slot, one in enumerate(ended) if one]
        self.cache.release(free)
        if waiting:
            return free
        n = len(alive)
        if self.static:  # use few different sizes, since each needs its own graphs
            n = self.n
            while -(-n // 2) >= len(alive) and n > 1:
                n = -(-n // 2)
        if n < self.n:
            keep = sorted(alive + free[: n - len(alive)])
            index = torch.tensor(keep, device=self.row.device)
            self.cache.keep(keep, index)
            for mine in (self.row, self.token, self.over):
                mine[:n] = mine[index]
            self.n = n
        return []

    def step(self) -> None:
        """Decode one token in every slot in use."""
        self.cache.make_room()
        key = (self.n, self.cache.shape)
        if graph := self.graphs.get(key):
            graph.replay()
        else:
            self._step()
            if self.static and self.setup.capture and key not in self.graphs:
                self._capture(key)
        self.asked += 1
        self.cache.advance()

    def _step(self) -> None:
        row = self.row[: self.n]
        position = self.rows.lens[row] + self.rows.length[row] - 1  # [n], of the last token
        hidden = backbone(self.model)(
            self.token[: self.n, None],
            attention_mask=self.cache.open(position),
            position_ids=position[:, None],
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state  # [n, 1, H]
        token, over = self.rows.step(row, logits(head(self.model), hidden[:, 0]))
        self.token[: self.n], self.over[: self.n] = token, over
        self.done += 1

    def _capture(self, key: tuple) -> None:
        """Capture this step for later steps. Its kernels have just run, so they are warm."""
        try:
            self.graphs[key] = self.setup.capture(self._step, self.pool)
        except torch.OutOfMemoryError:
            self.graphs[key] = None  # other shapes may still fit
            warnings.warn(f"no memory to capture a decoding step of shape {key}", stacklevel=2)
        except RuntimeError as error:
            self.setup.capture = None  # another attempt would fail too
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            warnings.warn(f"decoding goes on without CUDA graphs: {reason}", stacklevel=2)


def capture(step: Callable[[], None], pool: tuple | None = None) -> torch.cuda.CUDAGraph:
    """Capture a step as a CUDA graph: replay() launches all its kernels at once on the same memory.

    Capturing runs no kernel. The step must use only tensors of the current device whose addresses
    do not change. pool is the memory for temporary results. After a failure, the stream and the
    allocator are as before.
    """
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=pool):
            step()
    except BaseException:
        torch.cuda.set_stream(stream)  # a capture that fails late leaves its own stream current
        memory = torch.cuda.memory
        with suppress(RuntimeError):  # raised if the capture has already ended its allocation
            memory._cuda_endAllocateToPool(stream.device_index, pool)
            memory._cuda_releasePool(stream.device_index, pool)
        raise
    return graph
