"""Was a prompt among those that a run trained on? Scores of prompts, and how well they tell.

The scores, each one number a prompt, higher for a prompt that training has touched:

    gain      success of the trained model's samples less that of the base model's
    drift     how far the policy moved on its own samples: an estimate of KL(trained || base)
    both      the sum of the ranks of gain and drift
    nearness  minus the Min-kNN distance: prompts seen in training give more alike responses

gain and drift are the two axes of DIBA (arXiv 2511.14045), where both together reach an AUROC of
about 0.8. nearness is that of arXiv 2602.11792 and needs no base model.
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch
from scipy import stats

from evaluation.statistics import bootstrap_interval
from grpo import kl
from rewards import auroc

DRAWS = 2000  # resamples behind an interval


def gains(base: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """The change of success of each prompt, [n], from correct [n, copies] of both models."""
    return np.asarray(trained, float).mean(1) - np.asarray(base, float).mean(1)


def drifts(
    trained: torch.Tensor, base: torch.Tensor, length: torch.Tensor, copies: int
) -> np.ndarray:
    """The drift of each prompt, [n], in nats a token.

    trained, base: log-probabilities float32 [n * copies, R] of the trained model's samples under
    both models; length int64 [n * copies]. Each sample counts alike: it contributes the mean over
    its tokens of exp(-d) - 1 + d with d = log trained - log base, which estimates the KL from the
    trained model to the base and is never negative (grpo.kl, k3).
    """
    mask = torch.arange(trained.shape[1]) < length[:, None]  # [B, R]
    values = kl(trained.double(), base.double(), "k3").where(mask, 0.0)
    per_sample = values.sum(1) / length.clamp(min=1)  # [B]
    return per_sample.view(-1, copies).mean(1).numpy()


def both(gain: np.ndarray, drift: np.ndarray) -> np.ndarray:
    """The sum of ranks, [n]. Ranks, as drift has a long tail; ties share their mean rank."""
    return stats.rankdata(gain) + stats.rankdata(drift)


def min_knn_distance(responses: Sequence[Sequence[int]], k: int = 0) -> float:
    """How unlike the responses to one prompt are: 0 = each has a twin, 1 = nothing in common.

    For each response (token ids) the smallest edit distance to another one, over the longer
    length of the two; then the mean of the k smallest of these. k = 0 takes all of them. Raises
    ValueError for fewer than two responses.
    """
    n = len(responses)
    if n < 2:
        raise ValueError("a distance needs two or more responses")
    pairs = list(combinations(range(n), 2))
    distances = edit_distances([(responses[i], responses[j]) for i, j in pairs])
    nearest = np.full(n, np.inf)
    for (i, j), distance in zip(pairs, distances, strict=True):
        share = distance / max(len(responses[i]), len(responses[j]), 1)
        nearest[[i, j]] = np.minimum(nearest[[i, j]], share)
    return float(np.sort(nearest)[: k or n].mean())


def edit_distances(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> np.ndarray:
    """Levenshtein distances of pairs of sequences, int64 [n]; all pairs are computed at once."""
    n = len(pairs)
    rows, columns = (np.array([len(pair[i]) for pair in pairs], int) for i in (0, 1))
    height, width = int(rows.max(initial=0)), int(columns.max(initial=0))
    a, b = np.full((n, height), -1), np.full((n, width), -2)  # padding equals nothing
    for i, (left, right) in enumerate(pairs):
        a[i, : len(left)], b[i, : len(right)] = left, right
    steps = np.arange(width + 1)
    table = np.tile(steps, (n, 1))  # distances of a[:0] to each b[:j]
    found = table[np.arange(n), columns]
    for i in range(height):
        new = np.empty_like(table)
        new[:, 0] = i + 1
        change = table[:, :-1] + (a[:, i : i + 1] != b)
        new[:, 1:] = np.minimum(change, table[:, 1:] + 1)
        # Insertions along a row: new[j] = min over j' <= j of new[j'] + (j - j').
        table = np.minimum.accumulate(new - steps, axis=1) + steps
        found = np.where(rows == i + 1, table[np.arange(n), columns], found)
    return found


def separation(score: np.ndarray, member: np.ndarray, seed: int = 0) -> dict:
    """How well a score tells members from others: means, AUROC and its 95 % bootstrap interval.

    score [n], member bool [n]. All scores equal give exactly 0.5, also for both ends of the
    interval.
    """
    score, member = np.asarray(score, float), np.asarray(member, bool)
    interval = bootstrap_interval(
        np.stack([score, member], 1),
        lambda rows: auroc(rows[:, 0], rows[:, 1] > 0),
        draws=DRAWS,
        seed=seed,
    )
    return {
        "members": float(score[member].mean()),
        "held_out": float(score[~member].mean()),
        "auroc": auroc(score, member),
        "low": interval[0],
        "high": interval[1],
    }
