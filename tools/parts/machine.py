"""What the machine can do, and what of it a piece of work used: ceilings, costs, peak memory.

For tools.bench alone. A ceiling is measured, never looked up: a share of it then means the same on
a quiet machine and on a busy one.
"""

import ctypes
import platform
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from model import backbone, head


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, so that a clock read next to this measures what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# ------------------------------------------------------------------------------------------- time


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of one call."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes/s of a large copy (read and written both counted), FLOP/s of a large matmul in dtype.

    With the threads the run has. The best of five each: whatever else is running only slows them.
    """
    cuda = device.type == "cuda"
    elements = 2**29 if cuda else 2**26  # 2 GB, or 256 MB: larger than any cache
    source, target = torch.zeros(2, elements, device=device)
    copy = min(seconds(partial(target.copy_, source), device) for _ in range(5))
    n = 8192 if cuda else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    product = torch.empty_like(a)
    matmul = min(seconds(partial(torch.mm, a, a, out=product), device) for _ in range(5))
    return 2 * source.nbytes / copy, 2 * n**3 / matmul


def exponent(sizes: list[int], costs: list[float]) -> float:
    """The power b of cost ~ size^b: least squares on the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


# ------------------------------------------------------------------------------------------- work


class Cost:
    """What a model must compute and read at least, from its shape.

    FLOP: 2 a weight and token in the decoder's linear layers and, for response tokens, in the
    head, and 4 x layers x heads x head_dim a pair of positions in attention. Padding, recomputed
    activations and the adapter are not counted: work that a faster program would not do.
    Bytes: the weights in the compute type, once a forward (NF4 ones too, since they are
    multiplied in it), and the filled part of the KV cache.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        c = model.config
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        linears = [m for m in backbone(model).modules() if isinstance(m, nn.Linear)]
        self.decoder = sum(m.in_features * m.out_features for m in linears)
        self.head = head(model).weight.numel()
        self.attention = 4 * c.num_hidden_layers * c.num_attention_heads * head_dim
        size = torch.finfo(dtype).bits // 8
        self.weight_bytes = (self.decoder + self.head) * size
        self.kv_bytes = 2 * c.num_hidden_layers * c.num_key_value_heads * head_dim * size

    def forward_flop(self, prompt_len: torch.Tensor, length: torch.Tensor) -> float:
        """One forward over responses and their prompts; prompt_len, length int64 [B]."""
        total = (prompt_len + length).double()
        pairs = (total * (total + 1) / 2).sum()
        flop = 2 * self.decoder * total.sum() + 2 * self.head * length.sum()
        return float(flop + self.attention * pairs)

    def sampling(
        self, prompt_len: torch.Tensor, length: torch.Tensor, group: int, rows: int
    ) -> tuple[float, float]:
        """(FLOP, bytes) of sampling: each prompt once, then a token at a time, `rows` at once.

        The fewest decoding steps of any schedule: the longest response, or all tokens over rows.
        """
        once = prompt_len[::group].double()
        repeated = self.forward_flop(prompt_len, torch.zeros_like(length))
        prefill = self.forward_flop(once, torch.zeros_like(once))
        flop = self.forward_flop(prompt_len, length) - repeated + prefill
        steps = max(int(length.max()), -(-int(length.sum()) // rows))
        # token j of a response reads the prompt and the j tokens before it
        read = (length * prompt_len + length * (length - 1) / 2).sum()
        return flop, steps * self.weight_bytes + float(read) * self.kv_bytes


# ----------------------------------------------------------------------------------------- memory


class PeakMemory:
    """Peak memory between start and stop, in GB: (growth over what was held at the start, peak).

    CUDA: the caching allocator's max_memory_allocated, reset at the start. Linux: the process's
    VmHWM, reset through /proc/self/clear_refs after freed memory has been given back
    (malloc_trim). Elsewhere not known: (nan, nan).
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.before = float("nan")

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device) / 1e9
            return
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self.before = _status("VmRSS")
        except (OSError, AttributeError):  # not Linux, not glibc, or not allowed
            self.before = float("nan")

    def stop(self) -> tuple[float, float]:
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) / 1e9
        else:
            peak = _status("VmHWM") if self.before == self.before else float("nan")
        return peak - self.before, peak


def _status(key: str) -> float:
    """A line of /proc/self/status, GB."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{key}:\s+(\d+)", text, re.M)[1]) * 1024 / 1e9
