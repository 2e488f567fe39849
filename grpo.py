"""GRPO as pure functions on tensors: advantages, policy loss with its clip arms, KL.

Shapes: B responses in groups of equal size, R the longest response of the rows at hand. Nothing
here knows a model, so that a claim about the algorithm can be tested on a table of logits.
"""

from typing import Literal

import torch

Clip = Literal["both", "high", "low", "off"]
LossAgg = Literal["token_mean", "seq_mean"]
AdvNorm = Literal["group", "group_mean"]
KLType = Literal["k1", "k2", "k3"]


def advantages(rewards: torch.Tensor, group_size: int, norm: AdvNorm = "group") -> torch.Tensor:
    """Group-relative advantages, float32 [B], from rewards float32 [B].

    Groups are consecutive rows. "group": (r - mean) / (std + 1e-9), std unbiased (GRPO, arXiv
    2402.03300); "group_mean": r - mean (Dr. GRPO, arXiv 2503.20783). A group whose rewards are all
    equal has advantage exactly 0: by the formula, rounding of its mean would be divided by 1e-9.
    """
    groups = rewards.double().view(-1, group_size)  # [P, G]
    centred = groups - groups.mean(1, keepdim=True)
    if norm == "group" and group_size > 1:
        centred = centred / (groups.std(1, keepdim=True) + 1e-9)
    flat = flat_groups(rewards, group_size)
    return centred.masked_fill(flat[:, None], 0.0).view(-1).float()


def flat_groups(rewards: torch.Tensor, group_size: int) -> torch.Tensor:
    """Which groups have equal rewards throughout, and so nothing to teach: bool [P]."""
    groups = rewards.view(-1, group_size)
    return groups.amax(1) == groups.amin(1)


def aggregate(
    values: torch.Tensor, mask: torch.Tensor, loss_agg: LossAgg, normalizer: float
) -> torch.Tensor:
    """This micro-batch's share of the mini-batch's mean: values [b, R], mask bool [b, R] -> scalar.

    token_mean (DAPO, arXiv 2503.14476): the sum over tokens / normalizer, the mini-batch's tokens.
    seq_mean (GRPO): the sum of the responses' means / normalizer, the mini-batch's responses.
    The normalizer is the whole mini-batch's, so the gradient does not depend on micro-batches.
    """
    values = values.masked_fill(~mask, 0.0)
    if loss_agg == "seq_mean":
        values = values.sum(1) / mask.sum(1).clamp_min(1)  # [b]
    return values.sum() / normalizer


def normalizer(mask_or_length: torch.Tensor, loss_agg: LossAgg) -> float:
    """What a mini-batch's loss is divided by, from its tokens in the loss per response, int [b]."""
    tokens = mask_or_length.sum(1) if mask_or_length.dim() == 2 else mask_or_length
    n = tokens.sum() if loss_agg == "token_mean" else (tokens > 0).sum()
    return max(float(n), 1.0)


def policy_loss(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantage: torch.Tensor,
    mask: torch.Tensor,
    normalizer: float,
    clip: Clip = "both",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    loss_agg: LossAgg = "token_mean",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """GRPO's clipped surrogate and what the clip did.

    logp (with gradient), old_logp [b, R]; advantage [b]; mask bool [b, R], the tokens in the loss;
    normalizer: see aggregate. With R = exp(logp - old_logp) (PPO, arXiv 1707.06347),

        loss = -min(R A, clip(R, 1 - clip_low, 1 + clip_high) A)

    where `high` clips from above only, `low` from below only, and `off` leaves -R A. The clip
    removes a token's gradient where R > 1 + clip_high and A > 0, or R < 1 - clip_low and A < 0.

    Returns the scalar loss and, over tokens, clip_low and clip_high (how many lost their gradient
    to the clip), ratio (sum), ratio_max, tokens (how many).
    """
    # Masked before exp: a padding column may hold anything, and inf * 0 is nan.
    log_ratio = (logp - old_logp).masked_fill(~mask, 0.0)
    ratio = log_ratio.exp()  # [b, R]
    A = advantage[:, None]  # [b, 1]
    low = 1 - clip_low if clip in ("both", "low") else None
    high = 1 + clip_high if clip in ("both", "high") else None
    surrogate = ratio * A
    if low is not None or high is not None:
        surrogate = torch.minimum(surrogate, ratio.clamp(low, high) * A)
    loss = aggregate(-surrogate, mask, loss_agg, normalizer)

    with torch.no_grad():
        none = torch.zeros_like(mask)
        stats = {
            "clip_low": (mask & (ratio < low) & (A < 0) if low is not None else none).sum(),
            "clip_high": (mask & (ratio > high) & (A > 0) if high is not None else none).sum(),
            "ratio": ratio.masked_fill(~mask, 0.0).sum(),
            "ratio_max": ratio.max(),  # masked columns hold exactly 1
            "tokens": mask.sum(),
        }
    return loss, stats


def kl(logp: torch.Tensor, ref_logp: torch.Tensor, kind: KLType = "k3") -> torch.Tensor:
    """Estimators of KL(policy || reference) at each sampled token, same shape as logp.

    With d = ref_logp - logp (Schulman, "Approximating KL divergence", 2020):
    k1 = -d, k2 = d^2 / 2, k3 = exp(d) - d - 1. As values, k1 and k3 are unbiased. As terms of a
    loss they are something else: on-policy, k1's gradient has expectation 0, k2's is that of the
    reverse KL, and k3's is neither (it is the forward KL's).
    """
    d = ref_logp - logp
    if kind == "k1":
        return -d
    if kind == "k2":
        return d * d / 2
    return d.exp() - d - 1
