"""Score tokens under a causal LM: log-probability, entropy, self-certainty.

The layers are run by transformers. This file computes the head itself, in fp32 and in chunks.
Models are loaded in harness/loading.py.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedTokenizerBase

from harness.errors import UserError

# Number of fp32 logits that token_stats holds at once: 64 MB for every vocabulary. The backward
# pass holds about five times as much.
LOGITS_CHUNK = 2**24
# Rows of a bf16 head that the CPU converts to fp32 at once: 4 to 14 MB.
HEAD_ROWS = 1024


def backbone(model: nn.Module) -> nn.Module:
    """The decoder without its head: tokens [B, T] -> last_hidden_state [B, T, H]."""
    return getattr(model, model.base_model_prefix)


def head(model: nn.Module) -> nn.Module:
    """The output layer: hidden [..., H] -> logits [..., V]. V can exceed the tokenizer's size."""
    return model.get_output_embeddings()


def logits(model_head: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Logits float32 [n, V] of hidden states [n, H], summed in fp32 and never rounded to bf16.

    A bf16 logit between 16 and 32 is a multiple of 0.125. One step of that grid would move a ratio
    by 13 %, which is large next to the clip range. Scoring, update and sampler all use this
    function. The gradient flows to hidden and, if they are trained, to weight and bias.
    """
    weight = model_head.weight
    if weight.dtype == torch.float32 or type(model_head) is not nn.Linear:
        return model_head(hidden).float()
    return _Float32Logits.apply(hidden, weight, model_head.bias, hidden.is_cuda)


def rounding_error(model: nn.Module) -> float:
    """Estimate how far rounding moves the log-probability of a token, in nats.

    The estimate is the unit roundoff of the forward pass times log V, the scale of the logits. It
    is 0.05 for bf16 and 150,000 tokens, which is three to six times the error that tools.noise
    measures on real models.
    """
    vocabulary = head(model).weight.shape[0]
    return torch.finfo(model.dtype).eps / 2 * math.log(vocabulary)


class _Float32Logits(torch.autograd.Function):
    """Compute h W^T + b in fp32 from bf16 or fp16 h [n, H], W [V, H] and b [V] or None.

    CUDA can multiply such inputs with fp32 output. Elsewhere HEAD_ROWS rows of W at a time are
    converted to fp32. This is exact and needs no fp32 copy of the head. From about eight rows of h
    on, it is as fast as a multiplication by such a copy.
    """

    @staticmethod
    def forward(ctx, h, weight, bias, on_cuda):
        ctx.save_for_backward(h, weight)
        ctx.has_bias, ctx.on_cuda = bias is not None, on_cuda
        if on_cuda:
            z = torch.mm(h, weight.t(), out_dtype=torch.float32)
        else:
            wide, z = h.float(), torch.empty(len(h), len(weight), device=h.device)
            for part, rows in zip(z.split(HEAD_ROWS, 1), weight.split(HEAD_ROWS), strict=True):
                torch.mm(wide, rows.float().t(), out=part)
        return z if bias is None else z.add_(bias)

    @staticmethod
    def backward(ctx, grad):  # [n, V] fp32
        h, weight = ctx.saved_tensors
        to_h = to_weight = to_bias = None
        narrow = grad.to(h.dtype) if ctx.on_cuda else None  # rounded once, like any bf16 gradient
        if ctx.needs_input_grad[0]:
            if ctx.on_cuda:
                to_h = torch.mm(narrow, weight, out_dtype=torch.float32)
            else:
                to_h = torch.zeros(h.shape, device=h.device)
                parts = zip(grad.split(HEAD_ROWS, 1), weight.split(HEAD_ROWS), strict=True)
                for part, rows in parts:
                    to_h.addmm_(part, rows.float())
            to_h = to_h.to(h.dtype)
        if ctx.needs_input_grad[1]:
            if ctx.on_cuda:
                to_weight = torch.mm(narrow.t(), h)
            else:
                to_weight = (grad.t() @ h.float()).to(weight.dtype)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            to_bias = grad.sum(0).to(weight.dtype)
        return to_h, to_weight, to_bias, None


def end_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Collect every token that ends a response.

    These are the end tokens of the tokenizer, the generation config and the model config, and the
    tokens that the chat template writes after an assistant turn. A base model with a chat template
    may end with the document's or the turn's end token, and its configuration often names only one
    of them. Raises UserError if there is no end token.
    """
    ids = set(turn_end_ids(tokenizer))
    for source in (tokenizer, getattr(model, "generation_config", None), model.config):
        eos = getattr(source, "eos_token_id", None)
        ids.update(eos if isinstance(eos, list | tuple) else [] if eos is None else [eos])
    if not ids:
        raise UserError("the tokenizer and the model name no end token: responses would never end")
    return sorted(ids)


def turn_end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the chat template writes after an assistant turn; [] without a template.

    Only tokens that were added to the vocabulary count, because plain text such as a line break
    also occurs within responses. Some templates close a turn only if another turn follows. For
    these, the first added token after the turn counts. The result is [] for a template that cannot
    write such a conversation.
    """
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    added |= set(tokenizer.all_special_ids)
    answer = "(the answer)"
    user = {"role": "user", "content": "1 + 1?"}
    chat = [user, {"role": "assistant", "content": answer}]
    for messages, most in ((chat, None), ([*chat, user], 1)):
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception:  # no template, or it raises (foreign code, run in a sandbox)
            return []
        _, found, behind = text.rpartition(answer)
        ids = tokenizer(behind if found else "", add_special_tokens=False)["input_ids"]
        if ends := [i for i in ids if i in added][:most]:
            return ends
    return []


def checkpoint_activations(model: nn.Module) -> None:
    """Recompute each layer in backward instead of keeping its activations (gradient checkpointing).

    It is non-reentrant, because the reentrant form fails if the embeddings need no gradient.
    """
    # transformers renamed this method. Each supported release has one of the two names.
    old = "gradient_checkpointing_enable"
    getattr(model, "activation_checkpointing_enable", getattr(model, old))({"use_reentrant": False})


# ------------------------------------------------------------------------------------- statistics


@dataclass
class TokenStats:
    """Statistics per response token, float32 [B, R], 0 beyond each response's length.

    logp is the log-probability of the token, entropy is H(p), and self_certainty is KL(U || p), all
    in nats. For alignment see token_stats. All except logp are None unless they were requested.
    """

    logp: torch.Tensor
    entropy: torch.Tensor | None = None
    self_certainty: torch.Tensor | None = None
    alignment: torch.Tensor | None = None


def token_stats(
    model: nn.Module,
    tokens: torch.Tensor,
    prompt_len: torch.Tensor,
    length: torch.Tensor,
    temperature: float = 1.0,
    also: tuple[str, ...] = ("entropy", "self_certainty"),
    chunk: int | None = None,
) -> TokenStats:
    """Score response tokens under the model, holding only one chunk of logits at a time.

    tokens is int64 [B, T], right-padded prompt + response. prompt_len and length are int64 [B], the
    number of tokens of prompt and response. Column j of the result belongs to token prompt_len + j
    and comes from the logits one position earlier. The distribution is p = softmax(z) with
    z = logits / temperature, over all rows of the head. It is computed in fp32 (see logits):

        entropy        H(p)       = -sum_v p_v log p_v       with log p = z - logsumexp(z)
        self_certainty KL(U || p) = logsumexp(z) - mean_v z_v - log V    (arXiv 2505.19590, eq. 2)
        alignment      <e_y - p, e_top - p> = [y = top] - p_top - p_y + sum_v p_v^2

    Here top is the likeliest token. alignment tells how a step along grad_z log p_y moves log p_top
    (see grpo.clip_pull). also names the statistics to compute besides logp. logp is bit for bit
    identical for every choice of also, with and without gradients, so the first ratio of a step is
    exactly 1. chunk is the number of tokens whose logits are held at once, forward and backward. By
    default it is LOGITS_CHUNK / V.
    """
    T = int((prompt_len + length).max())
    R = int(length.max())
    tokens = tokens[:, :T]
    # No attention mask is needed: a causal model never attends to the padding on the right.
    hidden = backbone(model)(tokens, use_cache=False).last_hidden_state  # [B, T, H]
    mask = torch.arange(R, device=tokens.device) < length[:, None]  # [B, R]
    row, column = mask.nonzero(as_tuple=True)  # [N] each, for N response tokens without padding
    position = prompt_len[row] + column
    hidden = hidden[row, position - 1]  # [N, H], the states that predict the response
    target = tokens[row, position]  # [N]

    output = head(model)
    chunk = chunk or max(1, LOGITS_CHUNK // output.weight.shape[0])
    parts = []
    for h, y in zip(hidden.split(chunk), target.split(chunk), strict=True):
        if torch.is_grad_enabled() and hidden.requires_grad:
            # Recompute the chunk's logits in backward instead of keeping them.
            part = checkpoint(_chunk_stats, output, h, y, temperature, also, use_reentrant=False)
        else:
            part = _chunk_stats(output, h, y, temperature, also)
        parts.append(part)

    def scatter(values: tuple[torch.Tensor | None, ...]) -> torch.Tensor | None:
        if values[0] is None:
            return None
        flat = torch.cat(values)  # [N]
        return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, flat)

    return TokenStats(*(scatter(values) for values in zip(*parts, strict=True)))


def _chunk_stats(
    output: nn.Module, h: torch.Tensor, y: torch.Tensor, temperature: float, also: tuple[str, ...]
) -> tuple[torch.Tensor | None, ...]:
    """The fields of TokenStats for n tokens, [n] each, from hidden states h [n, H]."""
    z = logits(output, h)  # [n, V]
    if temperature != 1.0:
        z = z / temperature
    lse = z.logsumexp(-1)  # [n]
    logp = z.gather(-1, y[:, None])[:, 0] - lse
    entropy = certainty = alignment = None
    with torch.no_grad():  # after logp, so the recomputation in backward can stop before this
        if "entropy" in also:
            log_p = z - lse[:, None]
            entropy = -(log_p.exp() * log_p).sum(-1)  # lse - sum p z cancels at small H
        if "self_certainty" in also:
            certainty = lse - z.mean(-1) - math.log(z.shape[-1])
        if "alignment" in also:
            p = (z - lse[:, None]).exp_()  # [n, V]
            likeliest, top = p.max(-1)
            alignment = (y == top).float() - likeliest - logp.exp() + p.square_().sum(-1)
    return logp, entropy, certainty, alignment
