"""Was a prompt among those that a run trained on? Scores of prompts, and how well they tell.

The scores, each one number a prompt, higher for a prompt that training has touched:

    gain      success of the trained model's samples less that of the base model's
    drift     how much likelier training has made the trained model's samples, token by token
    both      the sum of the ranks of gain and drift
    nearness  minus the Min-kNN distance: prompts seen in training give more alike responses

gain and drift are the two axes of DIBA (arXiv 2511.14045), where both together reach an AUROC of
about 0.8. nearness is that of arXiv 2602.11792 and needs no base model.

drift is a change of probabilities and not a KL: most of the KL is the shift that training brings to
every prompt, which told members from others no better than chance on the tiny world.
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch
from scipy import stats

from evaluation.statistics import bootstrap_interval
from rewards import auroc

DRAWS = 2000  # resamples behind an interval
ANSWERS = ("gain", "drift", "both")  # the scores that the verdict looks at


def gains(base: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """The change of success of each prompt, [n], from correct [n, copies] of both models."""
    return np.asarray(trained, float).mean(1) - np.asarray(base, float).mean(1)


def drifts(
    trained: torch.Tensor, base: torch.Tensor, length: torch.Tensor, copies: int
) -> np.ndarray:
    """The drift of each prompt, [n], a mean change of token probability between -1 and 1.

    trained, base: log-probabilities float32 [n * copies, R] of the trained model's samples under
    both models; length int64 [n * copies]. Each sample counts alike: it contributes the mean over
    its tokens of p_trained - p_base.
    """
    mask = torch.arange(trained.shape[1]) < length[:, None]  # [B, R]
    change = (trained.double().exp() - base.double().exp()).where(mask, 0.0)
    per_sample = change.sum(1) / length.clamp(min=1)  # [B]
    return per_sample.view(-1, copies).mean(1).numpy()


def both(gain: np.ndarray, drift: np.ndarray) -> np.ndarray:
    """The sum of ranks, [n], so that neither scale matters; ties share their mean rank."""
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
    interval. `p` is that of a Mann-Whitney test of the AUROC against 0.5, one-sided: the chance of
    such an AUROC or a larger one if membership did not matter; 1 if all scores are equal.
    """
    score, member = np.asarray(score, float), np.asarray(member, bool)
    interval = bootstrap_interval(
        np.stack([score, member], 1),
        lambda rows: auroc(rows[:, 0], rows[:, 1] > 0),
        draws=DRAWS,
        seed=seed,
    )
    flat = np.ptp(score) == 0
    test = stats.mannwhitneyu(score[member], score[~member], alternative="greater")
    return {
        "members": float(score[member].mean()),
        "held_out": float(score[~member].mean()),
        "auroc": auroc(score, member),
        "low": interval[0],
        "high": interval[1],
        "p": 1.0 if flat else float(test.pvalue),
    }


def memorised(rows: dict[str, dict], level: float = 0.05) -> list[str]:
    """The scores of ANSWERS that tell members from others, with Bonferroni's correction.

    rows: score -> separation(...). Together they are wrong in at most `level` of the runs that left
    no trace.
    """
    return [key for key in ANSWERS if rows[key]["p"] < level / len(ANSWERS)]
