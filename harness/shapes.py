"""Models without memory: what a run would need, planned from a model's configuration alone."""

from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from decoding.kvcache import EXPANDED_ATTENTION
from harness.plan import Plan, plan_run
from lora import add_lora
from model import backbone, checkpoint_activations


def meta_model(
    config: PretrainedConfig, quant: str, lora_r: int, dtype: torch.dtype, checkpointing: bool
) -> nn.Module:
    """The model that training has, all tensors on the meta device; 4-bit weights by their sizes."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.tie_weights()
    model.requires_grad_(False)
    model.train()
    if quant == "nf4":
        for linear in backbone(model).modules():
            if isinstance(linear, nn.Linear):
                _pack(linear, dtype)
    if lora_r:
        add_lora(model, lora_r, 2 * lora_r)
    else:
        model.requires_grad_(True)
    if checkpointing:
        checkpoint_activations(model)
    return model


def _pack(linear: nn.Linear, dtype: torch.dtype) -> None:
    """NF4 with double quantisation: half a byte a weight, a byte a block of 64 of them, a float a
    block of 256 of those; and the code books."""
    new = lambda n, kind: torch.empty(n, dtype=kind, device="meta")  # noqa: E731
    n = linear.in_features * linear.out_features
    blocks = -(-n // 64)
    inner = SimpleNamespace(
        absmax=new(-(-blocks // 256), torch.float32),
        offset=None,
        state2=None,
        code=new(256, torch.float32),
    )
    state = SimpleNamespace(
        absmax=new(blocks, torch.uint8),
        code=new(16, torch.float32),
        offset=new(1, torch.float32),
        shape=(linear.out_features, linear.in_features),
        state2=inner,
        dtype=dtype,
    )
    weight = nn.Parameter(new(n // 2, torch.uint8), requires_grad=False)
    weight.quant_state = state
    linear.weight, linear.compute_dtype = weight, dtype


def planned(cfg, config: PretrainedConfig, room: int) -> Plan:
    """The plan of a run (settings.Config) of this model on a GPU with room bytes free.

    dtype=auto is bfloat16, as on a GPU of the Ampere generation or later.
    """
    dtype = torch.float32 if cfg.dtype == "float32" else torch.bfloat16
    model = meta_model(config, cfg.quant, cfg.lora_r, dtype, cfg.gradient_checkpointing)
    if dtype == torch.float32:
        model.config._attn_implementation = EXPANDED_ATTENTION
    return replace(plan_run([model], cfg), device=room)
