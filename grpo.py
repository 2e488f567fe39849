"""The algorithm as pure functions on tensors: advantages, policy losses and their clips, KL.

Shapes: a step has B responses in groups of equal size. A micro-batch has b of them, and R is the
length of its longest response. P is the number of groups (one per prompt), G the group size.
Nothing here uses a model, so every claim about the algorithm can be tested on a table of logits.

All losses share one form. The token ratio is R_t = pi(y_t) / pi_old(y_t), and A is the advantage of
the response. The loss is minus the aggregate over tokens of

    min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)

where the losses differ in rho:

    grpo      rho_t = R_t                       PPO, arXiv 1707.06347; GRPO, 2402.03300
    gspo      rho = exp(mean_t log R_t)         one per response, arXiv 2507.18071
    hoelder   rho = (mean_t R_t^p)^(1/p)        one per response, arXiv 2605.12058; p = 0 is gspo
    cispo     sg(min(R_t, cispo_cap)) A logp_t  replaces the min: MiniMax-M1, arXiv 2506.13585

sg means stop-gradient. At the first update of a step every ratio is 1, and all four losses have the
same gradient.
"""

import math
from typing import Literal

import torch

Loss = Literal["grpo", "gspo", "cispo", "hoelder"]
Clip = Literal["both", "high", "low", "off"]
LossAgg = Literal["token_mean", "seq_mean", "constant"]
AdvNorm = Literal["group", "group_mean", "leave_one_out", "raw"]
KLType = Literal["k1", "k2", "k3"]

# Number of equal bins of the old probability. With 12, one edge is 10/12 = .833 = 1 / (1 + .2). A
# token above that edge cannot be clipped from above with clip_high = .2.
BINS = 12


# -------------------------------------------------------------------------------------- advantages


def advantages(
    rewards: torch.Tensor,
    group_size: int,
    norm: AdvNorm = "group",
    rounding: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute advantages float32 [B] from rewards float32 [B]. Groups are consecutive rows.

    rounding is float32 [P]: how far apart the rewards of a group can lie because of rounding alone.

    group          (r - mean) / (std + 1e-9), std unbiased: GRPO, arXiv 2402.03300
    group_mean     r - mean: Dr. GRPO, arXiv 2503.20783
    leave_one_out  r - mean of the others = G / (G - 1) (r - mean): RLOO, arXiv 2402.14740
    raw            r, without a baseline

    A group whose rewards are all equal has advantage exactly 0 (except with raw). The same holds
    for a group whose rewards differ by no more than rounding, because the formula would divide
    noise by the size of that noise.
    """
    if norm == "raw":
        return rewards.float()
    groups = rewards.double().view(-1, group_size)  # [P, G]
    centred = groups - groups.mean(1, keepdim=True)
    if norm == "group" and group_size > 1:
        centred = centred / (groups.std(1, keepdim=True) + 1e-9)
    if norm == "leave_one_out" and group_size > 1:
        centred = centred * group_size / (group_size - 1)
    flat = flat_groups(rewards, group_size, rounding)
    return centred.masked_fill(flat[:, None], 0.0).view(-1).float()


def flat_groups(
    rewards: torch.Tensor, group_size: int, rounding: torch.Tensor | None = None
) -> torch.Tensor:
    """Find the groups that teach nothing: their rewards are equal up to rounding [P]. bool [P]."""
    groups = rewards.view(-1, group_size)
    spread = groups.amax(1) - groups.amin(1)
    return spread <= (0.0 if rounding is None else rounding)


def whiten(advantage: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Whiten advantages over all tokens of the batch: (A - mean) / std, float32 [B].

    The released code of "Spurious Rewards" does this. advantage is [B]. tokens is int [B], the
    number of each response's tokens in the loss, which is the weight of the response. The variance
    is the one of OpenRLHF: biased and at least 1e-8. (verl and TRL use the unbiased variance, which
    divides by one token less.) If all advantages are equal, the result is exactly 0. If response
    lengths differ, the mean before whitening is not 0, so flat groups get an advantage too.
    """
    counted = advantage[tokens > 0]
    if not len(counted) or counted.amax() == counted.amin():
        return torch.zeros_like(advantage)
    a, weight = advantage.double(), tokens.double() / tokens.sum()
    mean = (a * weight).sum()
    variance = ((a - mean) ** 2 * weight).sum()
    return ((a - mean) / variance.clamp_min(1e-8).sqrt()).float()


# ------------------------------------------------------------------------------------- aggregation


def aggregate(
    values: torch.Tensor, mask: torch.Tensor, loss_agg: LossAgg, normalizer: float
) -> torch.Tensor:
    """This micro-batch's share of the mini-batch's mean: values [b, R], mask bool [b, R] -> scalar.

    token_mean  sum over tokens / tokens of the mini-batch: DAPO, arXiv 2503.14476
    seq_mean    sum of the responses' means / responses of the mini-batch: GRPO
    constant    sum over tokens / (responses x max_new_tokens): Dr. GRPO, arXiv 2503.20783

    normalizer is the divisor. It covers the whole mini-batch, so the gradient does not depend on
    the split into micro-batches.
    """
    values = values.masked_fill(~mask, 0.0)
    if loss_agg == "seq_mean":
        values = values.sum(1) / mask.sum(1).clamp_min(1)  # [b]
    return values.sum() / normalizer


def normalizer(
    mask_or_length: torch.Tensor, loss_agg: LossAgg, max_new_tokens: int | None = None
) -> float:
    """The divisor of a mini-batch's loss (see aggregate).

    mask_or_length is the mask of the tokens in the loss, bool [b, R], or their number per response,
    int [b]. seq_mean counts only responses with tokens in the loss. constant counts all responses,
    and only constant reads max_new_tokens.
    """
    tokens = mask_or_length.sum(1) if mask_or_length.dim() == 2 else mask_or_length
    if loss_agg == "constant":
        return float(len(tokens) * max_new_tokens)
    n = tokens.sum() if loss_agg == "token_mean" else (tokens > 0).sum()
    return max(float(n), 1.0)


# ------------------------------------------------------------------------------------------ losses


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
    loss: Loss = "grpo",
    cispo_cap: float = 5.0,
    hoelder_p: float = 2.0,
    alignment: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Compute a clipped surrogate loss (see the top of this file) and the clip statistics.

    logp (with gradient) and old_logp are [b, R], advantage is [b], and mask is bool [b, R], the
    tokens in the loss. For normalizer see aggregate. clip=high clips only from above, low only from
    below, and off not at all. cispo uses its cap instead, which is an absolute ratio. A sequence
    ratio is written to every token of its response and then aggregated like token ratios.

    Returns the scalar loss and a dict of statistics. These are sums over tokens:
      tokens, ratio
      outside                                    number of tokens outside the band (see outside)
      clip_low, clip_high                        number of clipped tokens (see clipped)
      prob_bins, clip_low_bins, clip_high_bins   int [BINS], the same counts by old probability
      clip_pull_low, clip_pull_high              see clip_pull; only if alignment [b, R] is given
                                                 (from model.token_stats)
    ratio_max is a maximum.
    """
    # Mask before exp: a padding column can hold any value, and inf * 0 is nan.
    log_ratio = (logp - old_logp).masked_fill(~mask, 0.0)
    if loss in ("gspo", "hoelder"):
        ratio, share = sequence_ratio(log_ratio, mask, hoelder_p if loss == "hoelder" else 0.0)
    else:
        ratio, share = log_ratio.exp(), torch.ones_like(log_ratio)  # [b, R]
    A = advantage[:, None]  # [b, 1]
    low = 1 - clip_low if clip in ("both", "low") else 0.0
    high = 1 + clip_high if clip in ("both", "high") else math.inf
    if loss == "cispo":
        low, high = 0.0, cispo_cap
        surrogate = ratio.detach().clamp(low, high) * A * logp.masked_fill(~mask, 0.0)
    else:
        surrogate = torch.minimum(ratio * A, ratio.clamp(low, high) * A)

    with torch.no_grad():
        above, below = clipped(ratio, A, mask, low, high, loss)
        counts = bins(old_logp, mask, above + 2 * below)
        stats = {
            "tokens": counts.sum(),
            "ratio": ratio.masked_fill(~mask, 0.0).sum(),
            "outside": outside(ratio, mask, clip_low, clip_high).sum(),
            "ratio_max": ratio.max(),  # a masked column holds its row's ratio or exactly 1
            "clip_low": counts[2].sum(),
            "clip_high": counts[1].sum(),
            "prob_bins": counts.sum(0),
            "clip_low_bins": counts[2],
            "clip_high_bins": counts[1],
        }
        if alignment is not None:
            kept = cispo_cap if loss == "cispo" else 0.0
            removed = (ratio - kept) * share * A  # [b, R], used at clipped tokens only
            stats["clip_pull_low"] = clip_pull(removed, alignment, below)
            stats["clip_pull_high"] = clip_pull(removed, alignment, above)
    return aggregate(-surrogate, mask, loss_agg, normalizer), stats


def sequence_ratio(
    log_ratio: torch.Tensor, mask: torch.Tensor, p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the power mean of each response's n token ratios, and each token's share in it.

    Both results are [b, R]. The first is rho = (mean_t R_t^p)^(1/p) at every column, computed as
    exp((logsumexp_t(p log R_t) - log n) / p). Its limit at p = 0 is the geometric mean. It is
    computed in float64, because the difference is divided by p, which can be near 0. A row without
    tokens has rho = 1. The second is share_t = n softmax_t(p log R_t), without gradient. The sum of
    the n columns is n rho, and its gradient on logp_t is rho share_t.
    """
    inside = mask | ~mask.any(1, keepdim=True)  # [b, R]; log_ratio is 0 in an empty row
    n = inside.sum(1, keepdim=True).double()  # [b, 1]
    x = log_ratio.double()
    scaled = (p * x).masked_fill(~inside, -math.inf)
    if abs(p) < 1e-6:
        log_rho = x.sum(1, keepdim=True) / n  # masked columns are 0
    else:
        log_rho = (scaled.logsumexp(1, keepdim=True) - n.log()) / p
    ratio = log_rho.exp().to(log_ratio.dtype).expand_as(log_ratio)
    return ratio, (n * scaled.detach().softmax(1)).to(log_ratio.dtype)


# ------------------------------------------------------------------------------- what the clip does


def clipped(
    ratio: torch.Tensor, A: torch.Tensor, mask: torch.Tensor, low: float, high: float, loss: Loss
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the tokens that are clipped from above and those clipped from below: bool [b, R] each.

    ratio is [b, R], A is [b, 1]. A token loses its gradient if ratio > high and A > 0, or if
    ratio < low and A < 0. With a sequence ratio this holds for all tokens of a response together.
    For CISPO, a token counts as clipped if its ratio is above the cap and A is not 0, whatever the
    sign of A. Such a token keeps its gradient, scaled down.
    """
    above, below = mask & (ratio > high), mask & (ratio < low)
    return above & ((A > 0) | (A != 0) & (loss == "cispo")), below & (A < 0)


def outside(
    ratio: torch.Tensor, mask: torch.Tensor, clip_low: float, clip_high: float
) -> torch.Tensor:
    """Find the tokens whose ratio is outside [1 - clip_low, 1 + clip_high], bool [b, R].

    Neither the sign of the advantage nor the clip that is switched on matters: with clip=off these
    are the tokens that a clip could have met. ratio and mask are [b, R].
    """
    return mask & ((ratio < 1 - clip_low) | (ratio > 1 + clip_high))


def clip_pull(removed: torch.Tensor, alignment: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """How far clipping the chosen tokens pushed towards the likeliest token: a sum over them.

    removed [b, R] is the factor of grad logp_t (for ascent) that the clip took away: R A for a
    token ratio, rho share A for a sequence ratio, (R - cap) A for CISPO. On the logits z, the clip
    took away removed_t (e_y - pi). Let top be the likeliest token at that position. The gradient of
    log pi(top) is e_top - pi. The clip therefore adds to the ascent on log pi(top)

        pull = -removed_t <e_y - pi, e_top - pi>

    where alignment [b, R] is the inner product. A positive pull means that the clip helped the
    likeliest token. The pull weights every token equally, like token_mean.
    """
    return (-removed * alignment)[chosen].sum()


def bins(old_logp: torch.Tensor, mask: torch.Tensor, kind: torch.Tensor) -> torch.Tensor:
    """Count tokens by old probability in BINS equal bins: int64 [3, BINS].

    Row 0 counts tokens that are not clipped (kind 0), row 1 those clipped from above (kind 1), and
    row 2 those clipped from below (kind 2). kind and old_logp are [b, R].
    """
    index = (old_logp.exp() * BINS).long().clamp(0, BINS - 1) + BINS * kind
    index = index.masked_fill(~mask, 3 * BINS)  # one extra bin for tokens outside the loss
    return torch.bincount(index.flatten(), minlength=3 * BINS + 1)[:-1].view(3, BINS)


# ---------------------------------------------------------------------------------------------- KL


def kl(logp: torch.Tensor, ref_logp: torch.Tensor, kind: KLType = "k3") -> torch.Tensor:
    """Estimate KL(policy || reference) at each sampled token. The result has the shape of logp.

    With d = ref_logp - logp (Schulman, "Approximating KL divergence", 2020):
    k1 = -d, k2 = d^2 / 2, k3 = exp(d) - d - 1. The values of k1 and k3 are unbiased. As terms of a
    loss they act differently. On-policy, the expected gradient of k1 is 0, that of k2 is the
    gradient of the reverse KL, and that of k3 is the gradient of the forward KL.
    """
    d = ref_logp - logp
    if kind == "k1":
        return -d
    if kind == "k2":
        return d * d / 2
    return d.exp() - d - 1
