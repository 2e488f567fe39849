"""The algorithm as pure functions on tensors: advantages, policy losses and their clips, KL.

Shapes: B responses in groups of equal size; b of them in a micro-batch, R the longest of these.
Nothing here knows a model, so that a claim about the algorithm can be tested on a table of logits.

What the arms share. With the token ratio R_t = pi(y_t) / pi_old(y_t) and a response's advantage A,
a loss is minus the aggregate over tokens of min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A):

    grpo      rho_t = R_t                       PPO, arXiv 1707.06347; GRPO, 2402.03300
    gspo      rho = exp(mean_t log R_t)         one a response: arXiv 2507.18071
    hoelder   rho = (mean_t R_t^p)^(1/p)        one a response: arXiv 2605.12058; p = 0 is gspo
    cispo     sg(min(R_t, cispo_cap)) A logp_t  in the min's place: MiniMax-M1, arXiv 2506.13585

At the first update of a step every ratio is 1, and all have the same gradient.
"""

import math
from typing import Literal

import torch

Loss = Literal["grpo", "gspo", "cispo", "hoelder"]
Clip = Literal["both", "high", "low", "off"]
LossAgg = Literal["token_mean", "seq_mean", "constant"]
AdvNorm = Literal["group", "group_mean", "leave_one_out", "raw"]
KLType = Literal["k1", "k2", "k3"]

# Bins of the old probability, equal in width, so that one edge is 10/12 = .833 = 1 / (1 + .2): a
# token above it cannot be clipped from above by clip_high = .2.
BINS = 12


# -------------------------------------------------------------------------------------- advantages


def advantages(
    rewards: torch.Tensor,
    group_size: int,
    norm: AdvNorm = "group",
    rounding: torch.Tensor | None = None,
) -> torch.Tensor:
    """Advantages float32 [B] of rewards float32 [B]; groups are consecutive rows.

    rounding: float32 [P], how far apart the rewards of a group may lie by rounding alone.

    group          (r - mean) / (std + 1e-9), std unbiased: GRPO, arXiv 2402.03300
    group_mean     r - mean: Dr. GRPO, arXiv 2503.20783
    leave_one_out  r - mean of the others = G / (G - 1) (r - mean): RLOO, arXiv 2402.14740
    raw            r, no baseline at all

    A group whose rewards are all equal has advantage exactly 0 (raw excepted), and so has a group
    whose rewards differ by no more than rounding: the formula would divide noise by its own size.
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
    """Which groups have rewards that are equal, up to rounding [P], and teach nothing: bool [P]."""
    groups = rewards.view(-1, group_size)
    spread = groups.amax(1) - groups.amin(1)
    return spread <= (0.0 if rounding is None else rounding)


def whiten(advantage: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """(A - mean) / std over all tokens of the batch, float32 [B], as "Spurious Rewards" runs it.

    advantage [B]; tokens int [B], each response's tokens in the loss, by which it is weighted. The
    variance is OpenRLHF's: biased, at least 1e-8 (verl and TRL take the unbiased one, which differs
    by 1 in the number of tokens). Equal advantages throughout stay, or become, exactly 0. With
    responses of several lengths the mean is not 0, and flat groups get an advantage, too.
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

    token_mean (DAPO, arXiv 2503.14476): the sum over tokens / normalizer, the mini-batch's tokens.
    seq_mean (GRPO): the sum of the responses' means / normalizer, the mini-batch's responses.
    constant (Dr. GRPO, arXiv 2503.20783): the sum over tokens / normalizer, responses x
    max_new_tokens. The normalizer is the whole mini-batch's, so the gradient does not depend on
    micro-batches.
    """
    values = values.masked_fill(~mask, 0.0)
    if loss_agg == "seq_mean":
        values = values.sum(1) / mask.sum(1).clamp_min(1)  # [b]
    return values.sum() / normalizer


def normalizer(
    mask_or_length: torch.Tensor, loss_agg: LossAgg, max_new_tokens: int | None = None
) -> float:
    """What a mini-batch's loss is divided by, from its tokens in the loss per response, int [b].

    seq_mean counts the responses that have any, constant all of them; only constant reads
    max_new_tokens.
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
    """A clipped surrogate (see the top of this file) and what the clip did.

    logp (with gradient), old_logp [b, R]; advantage [b]; mask bool [b, R], the tokens in the loss;
    normalizer: see aggregate. Of clip, `high` clips from above only, `low` from below only, `off`
    not at all; cispo has its cap, an absolute ratio, instead. A sequence ratio stands at each of
    its response's tokens, and loss_agg then does as with token ratios.

    Returns the scalar loss and, summed over tokens: tokens, ratio, clip_low and clip_high (how many
    were clipped: see clipped), prob_bins, clip_low_bins and clip_high_bins (int [BINS], the same by
    old probability); ratio_max; and given alignment [b, R] (model.token_stats), clip_pull_low and
    clip_pull_high (see clip_pull).
    """
    # Masked before exp: a padding column may hold anything, and inf * 0 is nan.
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
            "ratio_max": ratio.max(),  # masked columns hold a ratio of their row, or exactly 1
            "clip_low": counts[2].sum(),
            "clip_high": counts[1].sum(),
            "prob_bins": counts.sum(0),
            "clip_low_bins": counts[2],
            "clip_high_bins": counts[1],
        }
        if alignment is not None:
            kept = cispo_cap if loss == "cispo" else 0.0
            removed = (ratio - kept) * share * A  # [b, R], read at clipped tokens only
            stats["clip_pull_low"] = clip_pull(removed, alignment, below)
            stats["clip_pull_high"] = clip_pull(removed, alignment, above)
    return aggregate(-surrogate, mask, loss_agg, normalizer), stats


def sequence_ratio(
    log_ratio: torch.Tensor, mask: torch.Tensor, p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The power mean of a response's n token ratios, at each of its columns: [b, R] twice.

    rho = (mean_t R_t^p)^(1/p), as exp((logsumexp_t(p log R_t) - log n) / p); its limit at p = 0 is
    the geometric mean. In float64: near 0 the difference is divided by a small p. A row without
    tokens has rho = 1. The second is each token's share in it, n softmax_t(p log R_t), without
    gradient: the n columns' sum n rho has the gradient rho share_t on logp_t.
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
    """Which tokens are clipped from above, and which from below: bool [b, R] each.

    ratio [b, R], A [b, 1]. These lose their gradient: ratio > high and A > 0, or ratio < low and
    A < 0; all tokens of a response together where the ratio is the response's. CISPO's are those
    beyond the cap, whatever the sign of A (0 apart): their gradient is scaled down, none is lost.
    """
    above, below = mask & (ratio > high), mask & (ratio < low)
    return above & ((A > 0) | (A != 0) & (loss == "cispo")), below & (A < 0)


def clip_pull(removed: torch.Tensor, alignment: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """How far the clip of the chosen tokens pushed towards the likeliest token: a sum over them.

    removed [b, R]: the factor of grad logp_t, for ascent, that the clip took away: R A for a token
    ratio, rho share A for a sequence ratio, (R - cap) A for CISPO. On the logits z it removed
    removed_t (e_y - pi), and log pi(top), top the likeliest token there, rises along e_top - pi. So

        pull = -removed_t <e_y - pi, e_top - pi>

    is what the clip adds to the ascent on log pi(top), as alignment [b, R] is that inner product.
    Positive: the clip helped the likeliest token.
    """
    return (-removed * alignment)[chosen].sum()


def bins(old_logp: torch.Tensor, mask: torch.Tensor, kind: torch.Tensor) -> torch.Tensor:
    """Tokens counted by old probability, in BINS equal bins: int64 [3, BINS].

    Rows: kind 0 (not clipped), 1 (from above), 2 (from below); kind and old_logp [b, R].
    """
    index = (old_logp.exp() * BINS).long().clamp(0, BINS - 1) + BINS * kind
    index = index.masked_fill(~mask, 3 * BINS)  # one more bin, for what is not in the loss
    return torch.bincount(index.flatten(), minlength=3 * BINS + 1)[:-1].view(3, BINS)


# ---------------------------------------------------------------------------------------------- KL


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
