"""What the machine can do, and how much of it a piece of work used, for tools.bench.

Ceilings of speed are measured, not taken from a data sheet, so that a share of a ceiling means the
same on a quiet machine and on a busy one.
"""

import ctypes
import math
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
    """Wait for the GPU to finish, so that a clock read after this includes its work."""
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


# ---- time


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of one call."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes/s of a large copy (read plus written), and FLOP/s of a large matmul in dtype.

    Uses the threads that the run uses. Each is the best of five, because other processes can only
    slow it down.
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
    """The power b of cost ~ size^b, by least squares on the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


# ---- work


class Cost:
    """The least that a model must compute and read, from its shape.

    FLOP: 2 per weight and token in the linear layers of the decoder, 2 per weight and response
    token in the head, and 4 x layers x heads x head_dim per pair of positions in attention.
    Padding, recomputed activations and the adapter do not count: a faster program would avoid them.
    Bytes: the weights once per forward in the compute type (also of NF4 weights, which are
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
        """FLOP of one forward over prompts and responses; prompt_len, length int64 [B]."""
        total = (prompt_len + length).double()
        pairs = (total * (total + 1) / 2).sum()
        flop = 2 * self.decoder * total.sum() + 2 * self.head * length.sum()
        return float(flop + self.attention * pairs)

    def sampling(
        self, prompt_len: torch.Tensor, length: torch.Tensor, group: int, rows: int
    ) -> tuple[float, float]:
        """(FLOP, bytes) of sampling: each prompt once, then one token at a time for `rows` rows.

        Counts the fewest decoding steps that any schedule needs: the length of the longest
        response, or all tokens divided by rows, whichever is larger.
        """
        once = prompt_len[::group].double()
        repeated = self.forward_flop(prompt_len, torch.zeros_like(length))
        prefill = self.forward_flop(once, torch.zeros_like(once))
        flop = self.forward_flop(prompt_len, length) - repeated + prefill
        steps = max(int(length.max()), -(-int(length.sum()) // rows))
        # token j of a response reads the prompt and the j tokens before it
        read = (length * prompt_len + length * (length - 1) / 2).sum()
        return flop, steps * self.weight_bytes + float(read) * self.kv_bytes


# ---- memory


class PeakMemory:
    """Peak memory between start and stop, in GB: (growth since the start, peak).

    CUDA: the allocator's max_memory_allocated, which is reset at the start. Linux: the VmHWM of the
    process, which is reset through /proc/self/clear_refs after malloc_trim has returned freed
    memory. Other systems: unknown, (nan, nan).
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
            peak = float("nan") if math.isnan(self.before) else _status("VmHWM")
        return peak - self.before, peak


def _status(key: str) -> float:
    """A line of /proc/self/status in GB."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{key}:\s+(\d+)", text, re.M)[1]) * 1024 / 1e9
