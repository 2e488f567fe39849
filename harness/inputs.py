"""Fingerprints of what a run reads: its problems and the weights it starts from.

The name of a file or model may stand for other content when a run is resumed. The run would then go
on as another experiment under the same config.json.
"""

import hashlib
import json
from dataclasses import asdict

import torch
from torch import Tensor, nn

from data import Problem


def of_problems(items: list[tuple[Problem, list[int]]]) -> str:
    """The number of problems, and a hash of them and of their prompts' token ids, in order."""
    content = json.dumps([(asdict(problem), ids) for problem, ids in items])
    return f"{len(items)} problems, {_short_hash(content)}"


def of_weights(model: nn.Module) -> str:
    """A hash of a model's weights, computed from the name, type and bits of each.

    It depends on the type of the weights, but not on the number of threads. A plain model has the
    same one on every device.
    """
    return _short_hash(
        json.dumps([(name, str(p.dtype), _sum_of_bits(p)) for name, p in model.named_parameters()])
    )


def weights_key(what: str, model: nn.Module) -> str:
    """The key of a fingerprint of weights. Only fingerprints with the same key can be compared."""
    first = next(model.parameters())
    stored = any(p.dtype == torch.uint8 for p in model.parameters())  # NF4
    return f"{what} ({first.dtype}{f', nf4 on {first.device.type}' if stored else ''})"


def _sum_of_bits(parameter: nn.Parameter) -> list[int]:
    """The sum of the parameter's bytes as 64-bit integers, which is exact in any order."""
    data: Tensor = parameter.data.reshape(-1).view(torch.uint8)
    if data.storage_offset() % 8:
        data = data.clone()
    whole = len(data) // 8 * 8
    parts = data[:whole].view(torch.int64), data[whole:].to(torch.int64)
    return [part.sum().item() for part in parts]


def _short_hash(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()[:16]
