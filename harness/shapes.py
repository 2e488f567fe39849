"""Models without memory: what a run would need, planned from a model's configuration alone."""

from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from harness.memory import Plan, largest_micro_batch, plan
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
        state2=inner,
        dtype=dtype,
    )
    weight = nn.Parameter(new(n // 2, torch.uint8), requires_grad=False)
    weight.quant_state = state
    linear.weight, linear.compute_dtype = weight, dtype


def planned(cfg, config: PretrainedConfig, room: int) -> Plan:
    """The plan of a run (settings.Config) of this model in bf16 on a GPU with room bytes free."""
    model = meta_model(config, cfg.quant, cfg.lora_r, torch.bfloat16, cfg.gradient_checkpointing)
    in_update = -(-cfg.prompts_per_step * cfg.group_size // cfg.updates_per_step)
    lengths = (cfg.max_prompt_tokens, cfg.max_new_tokens)
    rows, T = largest_micro_batch(cfg.micro_batch_tokens, in_update, *lengths)
    decoded = cfg.max_prompt_tokens + max(cfg.max_new_tokens, cfg.eval_new_tokens)
    result = plan([model], rows * T, decoded, cfg.rollout_rows, cfg.gradient_checkpointing)
    return replace(result, device=room)
