"""Score tokens under a causal LM: log-probability, entropy, self-certainty.

The layers are run by transformers. The head is computed here, in fp32 and in chunks.
Models are loaded in harness/loading.py.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from harness.errors import UserError
from harness.output_layer import logits, weighted_rows

# Number of fp32 logits that token_stats computes at once: 64 MB for every vocabulary. It holds
# twice as much, and three times as much in the backward pass of a trained head.
LOGITS_CHUNK = 2**24


def backbone(model: nn.Module) -> nn.Module:
    """The decoder without its head: tokens [B, T] -> last_hidden_state [B, T, H]."""
    return getattr(model, model.base_model_prefix)


def head(model: nn.Module) -> nn.Module:
    """The output layer: hidden [..., H] -> logits [..., V]. V can exceed the tokenizer's size."""
    return model.get_output_embeddings()


def rounding_error(model: nn.Module) -> float:
    """Estimate how far rounding moves the log-probability of a token, in nats.

    The estimate is the unit roundoff of the forward pass times log V, the scale of the logits. It
    is 0.05 for bf16 and 150,000 tokens, which is three to six times the error that tools.noise
    measures on real models.
    """
    vocabulary = head(model).weight.shape[0]
    return torch.finfo(model.dtype).eps / 2 * math.log(vocabulary)


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
    weights = list(output.parameters())
    for h, y in zip(hidden.split(chunk), target.split(chunk), strict=True):
        if torch.is_grad_enabled():
            part = _Chunk.apply(h, y, output, temperature, also, *weights)
        else:
            part = _chunk_stats(output, h, y, temperature, also)[0]
        parts.append(part)

    def scatter(values: tuple[torch.Tensor | None, ...]) -> torch.Tensor | None:
        if values[0] is None:
            return None
        flat = torch.cat(values)  # [N]
        return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, flat)

    return TokenStats(*(scatter(values) for values in zip(*parts, strict=True)))


def _chunk_stats(
    output: nn.Module, h: torch.Tensor, y: torch.Tensor, temperature: float, also: tuple[str, ...]
) -> tuple[tuple[torch.Tensor | None, ...], torch.Tensor, torch.Tensor]:
    """The fields of TokenStats for n tokens, [n] each, from hidden states h [n, H].

    Also returns e = exp(z - max z) [n, V] and its sum over the vocabulary [n], so p = e / sum.
    Everything is computed without gradient.
    """
    z = logits(output, h)  # [n, V]; changed in place, since a pass over new memory costs double
    if temperature != 1.0:
        z.div_(temperature)
    top, likeliest = z.max(-1)  # [n]
    z.sub_(top[:, None])
    e = z.exp()
    total = e.sum(-1)  # [n]
    log_total = total.log()
    logp = z.gather(-1, y[:, None])[:, 0] - log_total
    entropy = certainty = alignment = None
    if "entropy" in also:
        entropy = log_total - torch.linalg.vecdot(e, z) / total  # no term is negative
    if "self_certainty" in also:
        certainty = log_total - z.mean(-1) - math.log(z.shape[-1])
    if "alignment" in also:
        squares = torch.linalg.vecdot(e, e) / total**2
        alignment = (y == likeliest).float() - 1 / total - logp.exp() + squares
    return (logp, entropy, certainty, alignment), e, total


class _Chunk(torch.autograd.Function):
    """_chunk_stats with the gradient of logp, which on z is (e_y - p) / temperature.

    If the head is frozen, the forward pass multiplies this by W at once and keeps the result, [n,
    H]. So nothing is computed again in backward. If the head is trained, its gradient needs the
    factors from above, and backward computes the logits again.
    """

    @staticmethod
    def forward(ctx, h, y, output, temperature, also, *weights):
        stats, e, total = _chunk_stats(output, h, y, temperature, also)
        logp, *others = stats
        ctx.mark_non_differentiable(*(x for x in others if x is not None))
        ctx.set_materialize_grads(False)
        ctx.output, ctx.temperature = output, temperature
        ctx.frozen = type(output) is nn.Linear and not any(ctx.needs_input_grad[5:])
        if not ctx.frozen:
            ctx.save_for_backward(h, y, logp)
        elif ctx.needs_input_grad[0]:
            # -(e_y - p) times total. 1 - p_y is rounded once here; as a difference it would cancel.
            e.scatter_(-1, y[:, None], (torch.expm1(logp) * total)[:, None])
            slope = weighted_rows(e, output.weight) / (-temperature * total[:, None])
            ctx.save_for_backward(slope.to(h.dtype))
        return stats

    @staticmethod
    def backward(ctx, to_logp, *others):
        rest = [None] * (len(ctx.needs_input_grad) - 1)
        if to_logp is None:
            return None, *rest
        if ctx.frozen:
            (slope,) = ctx.saved_tensors
            return (to_logp[:, None] * slope).to(slope.dtype), *rest
        h, y, logp = ctx.saved_tensors
        with torch.enable_grad():
            h = h.detach().requires_grad_(ctx.needs_input_grad[0])
            z = logits(ctx.output, h)
        to_z = (z.detach() / ctx.temperature).softmax(-1)
        to_z.scatter_(-1, y[:, None], torch.expm1(logp)[:, None])  # p - e_y
        to_z.mul_(to_logp[:, None] / -ctx.temperature)
        inputs = [h, *ctx.output.parameters()]
        found = torch.autograd.grad(z, [x for x in inputs if x.requires_grad], to_z)
        found = iter(found)
        to_h, *to_weights = [next(found) if x.requires_grad else None for x in inputs]
        return to_h, None, None, None, None, *to_weights
