"""LoRA: the adapter layer, the base model under it, merged weights, and PEFT's format on disk."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from harness.errors import UserError
from model import backbone

# What decoding multiplies by: auto takes merged where memory has room for it.
RolloutWeights = Literal["auto", "merged", "adapter"]


class LoRALinear(nn.Module):
    """y = W x + (alpha / r) B A x, W frozen (Hu et al., arXiv 2106.09685).

    A [r, in] starts kaiming-uniform, B [out, r] zero, so that the adapter is the identity at first.
    Both are kept in fp32 and cast to the activations' type where they are used: an Adam step at
    usual learning rates is smaller than half a bf16 step.

    enabled is False inside adapter_off, use_merged True inside `merged`. merged_weight [out, in] is
    its copy of W + (alpha / r) B A in the computation's type, None where there is none.
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
        low = F.linear(x, self.lora_A.to(x.dtype)) * self.scale  # [..., r], the small one to scale
        B = self.lora_B.to(x.dtype)
        # one pass over the large y, where a product and a sum would take two, and two backward
        return torch.addmm(y.flatten(0, -2), low.flatten(0, -2), B.t()).view(y.shape)

    @torch.no_grad()
    def refresh(self) -> None:
        """Write W + (alpha / r) B A, summed in fp32, to merged_weight, in place if there is one."""
        weight, dtype = self.base.weight, computation_dtype(self.base)
        if hasattr(weight, "quant_state"):
            from bitsandbytes.functional import dequantize_4bit  # imported only for 4-bit layers

            weight = dequantize_4bit(weight.data, weight.quant_state)
        total = torch.addmm(weight.float(), self.lora_B, self.lora_A, alpha=self.scale)
        if self.merged_weight is None:
            self.merged_weight = torch.empty_like(total, dtype=dtype)
        self.merged_weight.copy_(total)


def computation_dtype(linear: nn.Linear) -> torch.dtype:
    """The type in which a layer multiplies: a 4-bit one says so apart from its storage."""
    weight = linear.weight
    if hasattr(weight, "quant_state"):
        return linear.compute_dtype or weight.quant_state.dtype
    return weight.dtype


def add_lora(model: nn.Module, r: int, alpha: float, seed: int = 0) -> None:
    """Put a LoRA adapter on every linear layer but the head, in place."""
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
    """Trainable parameters by name: the adapter's, or all of them in full training."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """The base model: inside, every adapter is skipped. Reference policy and offline scores."""
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
    """For decoding: inside, an adapter layer multiplies once, by a copy of W + (alpha / r) B A.

    The copies are written anew on entering, from the weights as they stand, in place: their
    addresses stay, so a CUDA graph captured over them stays valid as the weights change. free=True
    drops them on leaving (and with them such a graph). They are never re-quantised and never reach
    the stored base: outside, and inside adapter_off, everything is as it would be without them.

    A and B get no gradients inside. Without adapters, or with them off, it does nothing. In bf16
    merging moves the sampler a little off the scored policy: the mean and the largest |sampler logp
    - old_logp| are logged every step (sampler_gap, sampler_gap_max).
    """
    layers = lora_layers(model).values()
    try:
        for layer in layers:
            layer.refresh()
            layer.use_merged = True
        yield
    except torch.OutOfMemoryError:
        free = True  # what follows may need the room
        raise
    finally:
        for layer in layers:
            layer.use_merged = False
            if free:
                layer.merged_weight = None


def weights_address(model: nn.Module) -> tuple:
    """Which weights a forward multiplies by now: while this stays, so does a captured graph."""
    layers = lora_layers(model).values()
    return tuple(
        (x.enabled, x.use_merged, None if x.merged_weight is None else x.merged_weight.data_ptr())
        for x in layers
    )


# ---------------------------------------------------------------------------------------- on disk


def save_tensors(
    tensors: dict[str, torch.Tensor], path: Path, metadata: dict | None = None
) -> None:
    """Write a safetensors file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    tensors = {name: t.detach().contiguous().cpu() for name, t in tensors.items()}
    try:
        save_file(tensors, temporary, metadata={"format": "pt", **(metadata or {})})
        os.replace(temporary, path)
    except SafetensorError as error:  # its name for a full disk, among others
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written: {error}") from error


def save_adapter(model: nn.Module, folder: Path | str, base: str) -> None:
    """Save the adapter in PEFT's format: adapter_config.json and adapter_model.safetensors."""
    layers = lora_layers(model)
    first = next(iter(layers.values()))
    folder = Path(folder)
    tensors = {}
    for name, layer in layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.lora_A
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.lora_B
    save_tensors(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": first.r,
        "lora_alpha": first.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
    }
    temporary = folder / "adapter_config.json.tmp"
    temporary.write_text(json.dumps(config, indent=1) + "\n")
    os.replace(temporary, folder / "adapter_config.json")


# What an adapter_config.json of a plain LoRA may say. None: anything, since it does not change the
# adapter's result. Any other option must be absent or empty.
PLAIN_LORA: dict[str, tuple | None] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # These initialise the adapter and leave the base weights alone; PiSSA and others change them.
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
    "megatron_core": None,
    "qalora_group_size": None,
    "base_model_name_or_path": None,
    "revision": None,
    "task_type": ("CAUSAL_LM",),
    "auto_mapping": None,
    "inference_mode": None,
    "peft_version": None,
    "r": None,
    "lora_alpha": None,
    "lora_dropout": None,
    "target_modules": None,
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
}


def _unknown_options(config: dict) -> str:
    """The options that a plain LoRA does not have, as text; "" where there are none."""
    odd = []
    for key, value in config.items():
        known = PLAIN_LORA.get(key, ())
        empty = value in (None, False, "", [], {}) and key not in ("init_lora_weights", "peft_type")
        if known is not None and not empty and value not in known:
            odd.append(f"{key}={value!r}"[:80])
    if config.get("peft_type") != "LORA":
        odd.append(f"peft_type={config.get('peft_type')!r}"[:80])
    if type(config.get("r")) is not int or config["r"] < 1:
        odd.append(f"r={config.get('r')!r}"[:80])
    if not isinstance(config.get("lora_alpha"), int | float):
        odd.append(f"lora_alpha={config.get('lora_alpha')!r}"[:80])
    return ", ".join(dict.fromkeys(odd))


def load_adapter(model: nn.Module, folder: Path | str) -> None:
    """Add an adapter in PEFT's format to a model that has none.

    Raises UserError if the folder holds no adapter, one of another model, or one with options that
    a plain LoRA does not have.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError as error:
        raise UserError(
            f"{folder}: no adapter here (adapter_config.json and adapter_model.safetensors)"
        ) from error
    except (ValueError, OSError, SafetensorError) as error:
        raise UserError(f"{folder}: the adapter cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{folder}: adapter_config.json is not a JSON object")
    if odd := _unknown_options(config):
        raise UserError(f"{folder}: not a plain LoRA adapter: {odd}")
    if not tensors:
        raise UserError(f"{folder}: adapter_model.safetensors holds no weights")
    add_lora(model, config["r"], config["lora_alpha"])
    for name, layer in lora_layers(model).items():
        keys = [f"base_model.model.{name}.{part}.weight" for part in ("lora_A", "lora_B")]
        if (keys[0] in tensors) != (keys[1] in tensors):
            raise UserError(f"{folder}: {name} has only one of lora_A and lora_B")
        for part, key in zip(("lora_A", "lora_B"), keys, strict=True):
            value = tensors.pop(key, None)
            parameter = getattr(layer, part)
            if value is None:  # a layer that this adapter leaves alone
                parameter.data.zero_()
            elif value.shape != parameter.shape:
                raise UserError(
                    f"{folder}: {name}.{part} is {tuple(value.shape)}, the model wants "
                    f"{tuple(parameter.shape)}: an adapter of another model?"
                )
            else:
                parameter.data.copy_(value)
    if tensors:
        raise UserError(f"{folder}: {next(iter(tensors))} has no place in this model")
