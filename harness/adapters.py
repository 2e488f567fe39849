"""Adapters on disk, in PEFT's format."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from harness.errors import UserError
from harness.files import put_in_place, temporary_for, write_whole
from harness.strict_json import read_json
from lora import add_lora, lora_layers


def save_tensors(
    tensors: dict[str, torch.Tensor],
    path: Path,
    metadata: dict | None = None,
    before: Callable[[], None] = lambda: None,
) -> None:
    """Write a safetensors file. A crash leaves the old or the new file.

    `before` is called when the new file is complete, before it replaces the old one. Raises
    UserError if the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_for(path)
    tensors = {name: t.detach().contiguous().cpu() for name, t in tensors.items()}
    try:
        save_file(tensors, temporary, metadata={"format": "pt", **(metadata or {})})
        before()
        put_in_place(temporary, path)
    except SafetensorError as error:  # for example on a full disk
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
    write_whole(folder / "adapter_config.json", json.dumps(config, indent=1) + "\n")


# The options that an adapter_config.json of a plain LoRA may have, with their allowed values. None
# allows any value, because the option does not change the result. Other options must be empty.
PLAIN_LORA: dict[str, tuple | None] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # These leave the base weights alone. Others, such as PiSSA, change them.
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


LARGEST_RANK = 100_000  # above any model's width


def _unknown_options(config: dict) -> str:
    """The options that a plain LoRA does not have, as text; "" if there are none."""
    odd = []
    for key, value in config.items():
        known = PLAIN_LORA.get(key, ())
        empty = value in (None, False, "", [], {}) and key not in ("init_lora_weights", "peft_type")
        if known is not None and not empty and value not in known:
            odd.append(f"{key}={value!r}"[:80])
    if config.get("peft_type") != "LORA":
        odd.append(f"peft_type={config.get('peft_type')!r}"[:80])
    if type(config.get("r")) is not int or not 1 <= config["r"] <= LARGEST_RANK:
        odd.append(f"r={config.get('r')!r}"[:80])
    alpha = config.get("lora_alpha")
    if type(alpha) not in (int, float) or not abs(alpha) <= 1e9:  # nor nan
        odd.append(f"lora_alpha={config.get('lora_alpha')!r}"[:80])
    return ", ".join(dict.fromkeys(odd))


def read_adapter_config(folder: Path) -> dict:
    """The configuration of an adapter. Raises UserError if it is not that of a plain LoRA."""
    try:
        config = read_json(folder / "adapter_config.json")
    except FileNotFoundError as error:
        raise UserError(f"{folder}: no adapter here: adapter_config.json is missing") from error
    except (ValueError, OSError) as error:
        raise UserError(f"{folder}: the adapter cannot be read: {error}") from error
    if odd := _unknown_options(config):
        raise UserError(f"{folder}: not a plain LoRA adapter: {odd}")
    return config


def load_adapter(model: nn.Module, folder: Path | str) -> None:
    """Add an adapter in PEFT's format to a model that has none.

    Raises UserError if the folder holds no adapter, one of another model, or one with options that
    a plain LoRA does not have.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    try:
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError as error:
        raise UserError(f"{folder}: no adapter_model.safetensors in it") from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: the adapter cannot be read: {error}") from error
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
            if value is None:  # this adapter does not adapt the layer
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
