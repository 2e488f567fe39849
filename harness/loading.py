"""Load a causal LM (plain or NF4) and its tokenizer. Refuse models that are not supported."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from huggingface_hub import constants
from huggingface_hub.utils import get_session
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from decoding.kvcache import EXPANDED_ATTENTION
from harness import gguf
from harness.errors import UserError
from harness.leftovers import remove_leftovers
from harness.output_layer import logits
from model import backbone, head

# Models with fewer parameters get one CPU thread. For them a second thread costs more than it
# gains, above all if other work keeps the cores busy (the tiny world once took 12 times as long).
SMALL_MODEL = 2_000_000


# From so many parameters on, bf16 is faster than fp32 on a CPU that multiplies it natively.
LARGE_MODEL = 50_000_000


def choose_device(
    device: str, dtype: str, model: str = "", full: bool = False
) -> tuple[torch.device, torch.dtype]:
    """Resolve auto. A GPU gets its index and becomes the current device.

    dtype=auto is bfloat16 on a GPU. On a CPU it is bfloat16 if the CPU multiplies it natively and
    `model` (hub id or folder) has at least LARGE_MODEL parameters, and the choice is printed. It is
    float32 otherwise, and always if `full`, for training all weights.

    Raises UserError for a device that is missing or is neither cpu nor cuda, and for bfloat16 on a
    GPU without hardware for it.
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
        on_cpu = resolved.type == "cpu"
        dtype = "float32" if full or (on_cpu and not _cpu_prefers_bf16(model)) else "bfloat16"
    if resolved.type == "cuda" and dtype == "bfloat16":
        if torch.cuda.get_device_capability(resolved) < (8, 0):
            raise UserError(
                f"dtype bfloat16 needs a GPU of the Ampere generation or later, and {name} is older"
                ": --dtype=float32"
            )
    return resolved, getattr(torch, dtype)


def _cpu_prefers_bf16(model: str) -> bool:
    """Whether dtype=auto is bfloat16 on this CPU. Prints the choice for a large model."""
    if not model or (size := _parameters(model)) < LARGE_MODEL:
        return False
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    chosen, verb = ("bfloat16", "multiplies") if native else ("float32", "does not multiply")
    reason = f"{size / 1e6:,.0f} M parameters, and this processor {verb} bfloat16 natively"
    print(f"dtype: {chosen} ({reason})")
    return native


def _parameters(name: str) -> int:
    """The number of a model's parameters, from its configuration alone."""
    name = gguf.resolve(name)
    with _readable_errors(name, "model"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model.tie_weights()
    return sum(p.numel() for p in model.parameters())


def _prepare_cuda(device: torch.device) -> None:
    """Make the device the current one. CUDA graphs are captured on its stream."""
    # Shapes vary from step to step, and segments of fixed size would leave gaps in memory. PyTorch
    # reads this when it first uses the GPU.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    torch.cuda.set_device(device)
    # cuDNN's attention may differ with and without gradients, and the first ratio of a step must be
    # exactly 1. It also plans anew for each shape.
    torch.backends.cuda.enable_cudnn_sdp(False)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a hub id, folder or GGUF file. Raises UserError if that fails."""
    name = gguf.resolve(name)
    with _readable_errors(name, "tokenizer"):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def load_model(
    name: str,
    quant: str = "none",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Load a causal LM by hub id, folder or GGUF file, all weights frozen, in train mode.

    quant is "none" or "nf4": bitsandbytes NF4 with double quantisation for every linear layer
    except the head. dtype is that of the weights (none) or of the computation (nf4). In eval mode
    bitsandbytes may repack 4-bit weights in place on some CPUs, and gradients are then silently
    lost. The model is therefore in train mode, which changes nothing else, because all dropout is
    set to 0. For a small model on the CPU, torch is set to one thread.

    Raises UserError for a model that cannot be loaded, or that this code would get wrong
    (sliding-window attention, or logits that are not a linear map of the last hidden state).
    """
    remove_leftovers(gguf.CACHE)
    name = gguf.resolve(name)
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
        hf_logging.set_verbosity_error()  # _refuse_incomplete reports what it would print
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


# Buffers that are computed at loading. Old checkpoints store them nevertheless.
COMPUTED = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias")


def _refuse_incomplete(name: str, info: dict) -> None:
    """Refuse a model with missing or unknown weights.

    transformers would draw missing weights at random without a seed, and ignore unknown ones.
    """
    unknown = [key for key in info["unexpected_keys"] if not key.endswith(COMPUTED)]
    for what, keys in (("lacks", list(info["missing_keys"])), ("has no place for", unknown)):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise UserError(
                f"model {name!r}: {what} the weights {sorted(keys)[0]}{more}: the folder is "
                "incomplete, or its config.json belongs to another model"
            )


@contextmanager
def _readable_errors(name: str, what: str) -> Iterator[None]:
    """Turn the errors of from_pretrained into a UserError of one line.

    A hub that does not answer within three seconds is not asked again, because transformers would
    ask it for a minute. A copy in the cache is then used.
    """
    try:
        with _hub_if_it_answers(name):
            yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # foreign files fail in many ways inside foreign code
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{what} {name!r}: needs code of its own, which is never run here: use a model "
                "whose architecture transformers knows"
            ) from error
        local = os.path.exists(name)  # False for a name that is too long
        hint = (
            "the folder must hold config.json, the weights (*.safetensors) and a tokenizer"
            if local
            else "there is no such folder, and the hub cannot be reached or has no such model: "
            "name a local folder"
        )
        raise UserError(f"{what} {name!r}: {hint} ({reason})") from error


@contextmanager
def _hub_if_it_answers(name: str) -> Iterator[None]:
    """Work offline inside if name is no folder and the hub cannot be reached."""
    offline = constants.HF_HUB_OFFLINE
    if not os.path.exists(name) and not offline:
        constants.HF_HUB_OFFLINE = not _hub_answers()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


@lru_cache
def _hub_answers() -> bool:
    """Whether the hub gives any answer. Asked once per process."""
    try:
        get_session().head(constants.ENDPOINT, timeout=3)
        return True
    except Exception:  # no network, no such host, a proxy that refuses
        return False


def check_positions(model: torch.nn.Module, max_prompt_tokens: int, max_new_tokens: int) -> None:
    """Raise UserError if a prompt and its response can be longer than the model's positions."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions and max_prompt_tokens + max_new_tokens > positions:
        raise UserError(
            f"max_prompt_tokens + max_new_tokens = {max_prompt_tokens} + {max_new_tokens} exceeds "
            f"the model's {positions} positions: lower one of them"
        )


@torch.no_grad()
def _refuse_unknown_architecture(model: nn.Module, name: str) -> None:
    """Refuse sliding-window attention, and logits that are computed in another way than ours."""
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
