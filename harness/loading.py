"""Load a causal LM (plain or NF4) and its tokenizer, and refuse what we would get wrong."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from harness.errors import UserError
from model import backbone, head
from output_layer import logits

# Below so many parameters a second thread costs more than it brings on the CPU, most of all where
# other work keeps the cores busy (12 times as long was seen for the tiny world).
SMALL_MODEL = 2_000_000


def choose_device(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Resolve auto; a GPU gets its index and becomes the current device.

    Raises UserError for a device that is not there or is neither cpu nor cuda, and for bfloat16 on
    a GPU that has no units for it.
    """
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        resolved = torch.device(name)
        if resolved.type not in ("cpu", "cuda"):
            raise UserError(f"device {device!r} is not supported: --device=cpu or --device=cuda")
        if resolved.type == "cuda":
            resolved = torch.device("cuda", resolved.index or 0)
            _prepare_cuda(resolved)
        torch.zeros(1, device=resolved)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {device!r} cannot be used here ({reason})") from error
    if dtype == "auto":
        dtype = "bfloat16" if resolved.type == "cuda" else "float32"
    if resolved.type == "cuda" and dtype == "bfloat16":
        if torch.cuda.get_device_capability(resolved) < (8, 0):
            raise UserError(
                f"dtype bfloat16 needs a GPU of the Ampere generation or later, and {name} is older"
                ": --dtype=float32"
            )
    return resolved, getattr(torch, dtype)


def _prepare_cuda(device: torch.device) -> None:
    """Make the device the current one, on whose stream graphs are captured."""
    # Shapes vary from step to step, and fixed segments would leave holes. Read at the first use.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    torch.cuda.set_device(device)
    # cuDNN's attention may differ with and without gradients, and the first ratio of a step must be
    # exactly 1. It also plans anew for each shape.
    torch.backends.cuda.enable_cudnn_sdp(False)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub id or folder. Raises UserError if there is none within reach."""
    with _readable_errors(name, "tokenizer"):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def load_model(
    name: str,
    quant: str = "none",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Load a Hugging Face causal LM by hub id or folder, every weight frozen, in train mode.

    quant: "none", or "nf4" = bitsandbytes NF4 with double quantisation for every linear layer but
    the head. dtype is the weights' (plain) or the computation's (nf4). Train mode is on purpose and
    harmless, since all dropout is set to 0: in eval mode bitsandbytes may repack 4-bit weights in
    place on some CPUs, after which gradients are silently lost. For a small model on the CPU,
    torch is set to one thread.

    Raises UserError for a model that is not within reach, or whose layers we would get wrong
    (sliding-window attention, logits that are more than a linear map of the last hidden state).
    """
    with _readable_errors(name, "model"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        for key in ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop"):
            if hasattr(config, key):
                setattr(config, key, 0.0)
        extra = {}
        if quant == "nf4":
            from transformers import BitsAndBytesConfig  # bitsandbytes is imported only for NF4

            extra["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
            extra["device_map"] = {"": str(device)}
        bars, verbosity = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
        hf_logging.disable_progress_bar()
        hf_logging.set_verbosity_error()  # _refuse_incomplete says in a line what it would print
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                name,
                config=config,
                dtype=dtype,
                attn_implementation="sdpa",
                trust_remote_code=False,
                output_loading_info=True,
                **extra,
            )
        finally:
            hf_logging.set_verbosity(verbosity)
            if bars:
                hf_logging.enable_progress_bar()
    _refuse_incomplete(name, info)
    if quant == "none":
        model.to(device)
    if str(device) == "cpu" and model.num_parameters() < SMALL_MODEL:
        torch.set_num_threads(1)
    if torch.device(device).type == "cuda" and dtype == torch.float32:
        model.config._attn_implementation = EXPANDED_ATTENTION
    model.requires_grad_(False)
    model.train()
    _refuse_unknown_architecture(model, name)
    return model


# Buffers that old checkpoints store although they are computed.
COMPUTED = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias")


def _refuse_incomplete(name: str, info: dict) -> None:
    """transformers draws missing weights at random, without a seed, and leaves unknown ones out."""
    unknown = [key for key in info["unexpected_keys"] if not key.endswith(COMPUTED)]
    for what, keys in (("lacks", list(info["missing_keys"])), ("has no place for", unknown)):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise UserError(
                f"model {name!r}: {what} the weights {sorted(keys)[0]}{more}: the folder is "
                "incomplete, or holds another model than its config.json says"
            )


EXPANDED_ATTENTION = "nanorlvr_expanded"


def _expanded_attention(module, query, key, value, mask, scaling=None, **kwargs):
    """Causal attention [n, heads, T, D] in fp32 on CUDA, keys and values repeated for their heads.

    Flash attention takes no fp32, and the memory-efficient kernel takes no grouped heads: without
    this all T x T scores would be held. No mask: padding stands to the right.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    out = F.scaled_dot_product_attention(query, key, value, scale=scaling, is_causal=True)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(EXPANDED_ATTENTION, _expanded_attention)


@contextmanager
def _readable_errors(name: str, what: str) -> Iterator[None]:
    """Turn the many ways in which from_pretrained fails into one line."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:  # OSError: absent, or no hub
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{what} {name!r}: asks to run code of its own, which is never run here: use a "
                "model whose architecture transformers knows"
            ) from error
        local = Path(name).exists()
        hint = (
            "the folder must hold config.json, the weights (*.safetensors) and a tokenizer"
            if local
            else "no such folder here, and the hub is not within reach or has no such model: "
            "name a local folder"
        )
        raise UserError(f"{what} {name!r}: {hint} ({reason})") from error


def check_positions(model: torch.nn.Module, max_prompt_tokens: int, max_new_tokens: int) -> None:
    """A prompt and response longer than the model's positions is an error, before any work."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions and max_prompt_tokens + max_new_tokens > positions:
        raise UserError(
            f"max_prompt_tokens + max_new_tokens = {max_prompt_tokens} + {max_new_tokens} exceeds "
            f"the model's {positions} positions: lower one of them"
        )


@torch.no_grad()
def _refuse_unknown_architecture(model: nn.Module, name: str) -> None:
    kinds = set(getattr(model.config, "layer_types", None) or []) - {"full_attention"}
    if kinds or (
        getattr(model.config, "sliding_window", None) and not hasattr(model.config, "layer_types")
    ):
        raise UserError(
            f"model {name!r}: its layers are not all full attention "
            f"({', '.join(sorted(kinds)) or 'sliding window'}): not supported"
        )
    tokens = torch.arange(4, device=next(model.parameters()).device)[None] % model.config.vocab_size
    theirs = model(tokens, use_cache=False).logits[0]  # [4, V]
    ours = logits(head(model), backbone(model)(tokens, use_cache=False).last_hidden_state[0])
    tolerance = 1e-5 if theirs.dtype == torch.float32 else 1e-2
    if not torch.allclose(theirs.float(), ours, rtol=tolerance, atol=tolerance):
        raise UserError(
            f"model {name!r}: its logits are not a linear map of the last hidden state "
            "(soft-capping or scaling): not supported"
        )
