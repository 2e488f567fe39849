"""Merge a run's adapter into its base model: a folder that transformers and vLLM load as it is.

    python -m tools.merge out/random_reward-tiny-seed0 out/merged
    python -m tools.merge RUN OUT --dtype=bfloat16

The merged weights are those that the run trained and decoded with: an NF4 base is dequantised, and
W + (alpha / r) B A is summed in float32 and rounded once. OUT is written whole or not at all.
"""

import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from harness.adapters import load_adapter
from harness.configurator import configure
from harness.errors import UserError, run
from harness.loading import choose_device, load_model, load_tokenizer
from harness.runfiles import over_its_base, stale
from lora import lora_layers
from tasks import tiny


@dataclass
class MergeConfig:
    """Merge an adapter into its base model: python -m tools.merge RUN OUT [--key=value]"""

    model: str = ""  # base model; not given: as it is recorded beside the adapter
    quant: Literal["none", "nf4"] = "none"  # of the base in training; not given: as recorded
    device: str = "auto"  # auto = cuda if available, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the weights that are written
    adapter: str = field(default="", init=False)  # found in RUN


def find_adapter(named: str) -> str:
    """The adapter's folder of a run, or the folder itself if it is an adapter.

    Raises UserError where there is none.
    """
    folder = Path(named)
    for candidate in (folder / "adapter", folder):
        if (candidate / "adapter_config.json").is_file():
            return str(candidate)
    if (folder / "model").is_dir():
        raise UserError(f"{named}: all weights were trained: {folder / 'model'} is a whole model")
    raise UserError(f"{named}: no adapter in it: name a run's folder or an adapter's")


@torch.no_grad()
def merge(
    adapter: str, base: str, quant: str, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """The base model with the adapter in its weights, none of them quantised."""
    trained = load_model(base, quant, dtype, device)
    load_adapter(trained, adapter)
    plain = load_model(base, "none", dtype, device)
    for name, layer in lora_layers(trained).items():
        layer.refresh()
        plain.get_submodule(name).weight.copy_(layer.merged_weight)
        layer.merged_weight = None
    return plain


def save_model(model: nn.Module, tokenizer, out: Path) -> None:
    """Write a model and its tokenizer in Hugging Face's format, whole or not at all."""
    temporary = out.with_name(out.name + ".tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        for part in (model, tokenizer):
            part.save_pretrained(temporary)
        os.replace(temporary, out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}") from error


def main(argv: list[str]) -> None:
    options = [arg for arg in argv if arg.startswith("-") or re.match(r"\w+=", arg)]
    folders = [arg for arg in argv if arg not in options]
    cfg, sources = configure(MergeConfig, options)
    if len(folders) != 2:
        raise UserError("name a run and a folder to write, in this order")
    out = Path(folders[1])
    if out.exists():
        raise UserError(f"{out}: is already there: name another folder, or delete it")
    cfg.adapter = adapter = find_adapter(folders[0])
    if warning := stale(adapter):
        print(f"warning: {warning}")
    cfg = over_its_base(cfg, sources.given)
    device, dtype = choose_device(cfg.device, cfg.dtype)
    base = tiny.resolve(cfg.model)
    model = merge(adapter, base, cfg.quant, dtype, device)
    save_model(model, load_tokenizer(base), out)
    print(f"{out}: {base} with {adapter}, {str(dtype).removeprefix('torch.')}")


if __name__ == "__main__":
    run(main)
