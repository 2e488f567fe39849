"""LoRA: the adapter layer, the base model without it, and merged weights.

harness/adapters.py reads and writes adapters in PEFT's format.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from harness.errors import UserError
from model import backbone

# The weights that decoding uses. auto means merged if memory has room for the copy, else adapter.
RolloutWeights = Literal["auto", "merged", "adapter"]


class LoRALinear(nn.Module):
    """y = W x + (alpha / r) B A x with W frozen (Hu et al., arXiv 2106.09685).

    A [r, in] starts kaiming-uniform and B [out, r] starts at zero, so at first the adapter changes
    nothing. Both are kept in fp32 and cast to the activations' type when used, because an Adam
    step at usual learning rates is smaller than half a bf16 step.

    enabled is False inside adapter_off. use_merged is True inside `merged`. merged_weight [out, in]
    is a copy of W + (alpha / r) B A in the layer's computation type, or None if there is no copy.
    """

    def __init__(self, base: nn.Linear, r: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.base = base
        self.r, self.alpha = r, alpha
        self.scale = alpha / r
        self.enabled, self.use_merged = True, False
        self.merged_weight: torch.Tensor | None = None
        device = base.weight.device
        a = torch.empty(r, base.in_features)
        bound = 1 / math.sqrt(base.in_features)  # kaiming_uniform_ with a = sqrt(5), as PEFT does
        a.uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(a.to(device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [..., in] -> [..., out]
        if self.enabled and self.use_merged:
            return F.linear(x, self.merged_weight, self.base.bias)
        y = self.base(x)
        if not self.enabled:
            return y
        low = F.linear(x, self.lora_A.to(x.dtype)) * self.scale  # [..., r], the smaller tensor
        B = self.lora_B.to(x.dtype)
        # addmm passes over the large y once. A product and a sum would pass over it twice, in the
        # forward and in the backward pass.
        return torch.addmm(y.flatten(0, -2), low.flatten(0, -2), B.t()).view(y.shape)

    @torch.no_grad()
    def refresh(self) -> None:
        """Write W + (alpha / r) B A, summed in fp32, to merged_weight, in place if it exists."""
        weight, dtype = self.base.weight, computation_dtype(self.base)
        if hasattr(weight, "quant_state"):
            from bitsandbytes.functional import dequantize_4bit  # imported only for 4-bit layers

            weight = dequantize_4bit(weight.data, weight.quant_state)
        total = torch.addmm(weight.float(), self.lora_B, self.lora_A, alpha=self.scale)
        if self.merged_weight is None:
            self.merged_weight = torch.empty_like(total, dtype=dtype)
        self.merged_weight.copy_(total)


def computation_dtype(linear: nn.Linear) -> torch.dtype:
    """The type in which a layer multiplies. A 4-bit layer has it separate from its storage type."""
    weight = linear.weight
    if hasattr(weight, "quant_state"):
        return linear.compute_dtype or weight.quant_state.dtype
    return weight.dtype


def add_lora(model: nn.Module, r: int, alpha: float, seed: int = 0) -> None:
    """Put a LoRA adapter on every linear layer except the head, in place.

    Raises UserError if the model has no linear layers.
    """
    generator = torch.Generator().manual_seed(seed)
    decoder = backbone(model)
    linears = [(name, m) for name, m in decoder.named_modules() if isinstance(m, nn.Linear)]
    if not linears:
        raise UserError("the model has no nn.Linear layers for LoRA: use --lora_r=0")
    for name, linear in linears:
        parent, _, leaf = name.rpartition(".")
        setattr(decoder.get_submodule(parent), leaf, LoRALinear(linear, r, alpha, generator))


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Adapter layers by module name, in model order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name: those of the adapter, or all parameters in full training."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Skip every adapter inside this context, so that the model is the base model.

    It is used for the reference policy and for scores by the base model.
    """
    layers = lora_layers(model).values()
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


# --------------------------------------------------------------------------------- merged weights


@contextmanager
def merged(model: nn.Module, free: bool = False) -> Iterator[None]:
    """For decoding: each adapter layer multiplies once inside, by a copy of W + (alpha / r) B A.

    On entering, the copies are written again from the current weights, in place. Their addresses do
    not change, so a CUDA graph captured over them stays valid when the weights change. free=True
    drops the copies on leaving, which makes such a graph invalid. The copies are never quantised
    again and never change the stored base weights. Outside, and inside adapter_off, they have no
    effect.

    A and B get no gradients inside. Without adapters, or with adapters off, this does nothing. In
    bf16, merging moves the sampler slightly away from the scored policy. Every step logs the mean
    and the largest |sampler logp - old_logp| as sampler_gap and sampler_gap_max.
    """
    layers = lora_layers(model).values()
    try:
        for layer in layers:
            layer.refresh()
            layer.use_merged = True
        yield
    except torch.OutOfMemoryError:
        free = True  # the caller may need the memory
        raise
    finally:
        for layer in layers:
            layer.use_merged = False
            if free:
                layer.merged_weight = None


def weights_address(model: nn.Module) -> tuple:
    """Identify the weights that a forward pass uses now.

    A captured graph stays valid as long as this value stays the same.
    """
    layers = lora_layers(model).values()
    return tuple(
        (x.enabled, x.use_merged, None if x.merged_weight is None else x.merged_weight.data_ptr())
        for x in layers
    )
