"""Errors, intervals and tests for evals.

The unit is the problem: k samples of one problem are not k problems. Every function therefore takes
one value per problem, such as the share of its samples that are right.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95  # of every interval
DRAWS = 10_000  # resamples of a bootstrap
CHUNK = 1_000_000  # indices drawn at once, which bounds the memory

Values = Sequence[float] | np.ndarray


def standard_error(values: Values) -> float | None:
    """The standard error of the mean over n problems, std / sqrt(n), std unbiased; None if n < 2.

    values: [n], one per problem.
    """
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return None
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def bootstrap_interval(
    values: Values,
    statistic: Callable[[np.ndarray], float] | None = None,
    level: float = LEVEL,
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[float, float] | None:
    """The percentile bootstrap interval of a statistic over n problems; None if n < 2.

    values: [n] or [n, ...], one row per problem; problems are drawn with replacement, whole.
    statistic: a function of resampled values [n, ...] -> float; None is the mean of values [n],
    which is computed for many draws at once. The draws are a function of seed and n. Resamples
    where the statistic is nan (such as an AUROC with one class only) are left out.
    Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13.
    """
    values = np.asarray(values, dtype=float)
    n = len(values)
    if n < 2:
        return None
    generator = np.random.default_rng(seed)
    found: list[float] = []
    while len(found) < draws:
        rows = min(draws - len(found), max(1, CHUNK // n))
        index = generator.integers(n, size=(rows, n))  # [rows, n]
        if statistic is None:
            found += values[index].mean(1).tolist()
        else:
            found += [float(statistic(values[one])) for one in index]
    edges = ((1 - level) / 2, (1 + level) / 2)
    low, high = np.nanquantile(found, edges)
    return float(low), float(high)


@dataclass(frozen=True)
class Difference:
    """A mean difference over n problems; stderr, low, high and p are None if n < 2."""

    mean: float
    stderr: float | None  # of the mean, over problems
    low: float | None  # bootstrap interval
    high: float | None
    p: float | None  # of a paired t test, two-sided; 1 if all differences are 0
    n: int


def paired_difference(a: Values, b: Values, level: float = LEVEL, seed: int = 0) -> Difference:
    """The mean of b - a over the same n problems, with its error, interval and test.

    a, b: [n] each, in the same order of problems. Pairing removes what makes problems differ in
    difficulty, so the error is smaller than that of two separate means. ValueError if the lengths
    differ or are 0.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"two lists of one length above 0 are needed, not {a.shape} and {b.shape}")
    d = b - a
    if len(d) < 2:
        return Difference(float(d.mean()), None, None, None, None, len(d))
    low, high = bootstrap_interval(d, level=level, seed=seed)
    if np.ptp(d) == 0:  # the t test divides by 0 here
        p = 1.0 if d[0] == 0 else 0.0
    else:
        p = float(stats.ttest_rel(b, a).pvalue)
    return Difference(float(d.mean()), standard_error(d), low, high, p, len(d))


def mcnemar(b: int, c: int) -> float:
    """The two-sided p value of McNemar's exact test.

    b and c count the problems on which exactly one of two models is right: only the first, only the
    second. If the models are equally good, each of the b + c falls to either side with probability
    1/2. The result is 1 if there are none. Source: McNemar, Psychometrika 12 (1947); the exact
    version is the binomial test.
    """
    return float(stats.binomtest(b, b + c, 0.5).pvalue) if b + c else 1.0


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of a problem's n samples, drawn without replacement, hold a right one.

    c of the n samples are right. The result, 1 - C(n - c, k) / C(n, k), is an unbiased estimate of
    pass@k for 1 <= k <= n (Chen et al., arXiv 2107.03374). ValueError for other arguments.
    """
    if not (1 <= k <= n and 0 <= c <= n):
        raise ValueError(f"pass_at_k needs 1 <= k <= n and 0 <= c <= n, not n={n}, c={c}, k={k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def pass_curve(right: Sequence[Sequence[bool]]) -> list[tuple[float, float | None]]:
    """(pass@k, its standard error over problems) for k = 1, 2, ..., n.

    right: [problems][samples]. n is the smallest number of samples that a problem has.
    """
    counts = [(len(row), sum(map(bool, row))) for row in right]
    curve = []
    for k in range(1, min(n for n, _ in counts) + 1):
        values = [pass_at_k(n, c, k) for n, c in counts]
        curve.append((float(np.mean(values)), standard_error(values)))
    return curve


def majority_is_right(clusters: Sequence[int], right: Sequence[bool]) -> float:
    """Whether the most common answer of one problem's samples is right: maj@k, k = len(clusters).

    clusters: [k], equal numbers for equivalent answers, below 0 for no answer (these do not vote).
    right: [k]. A tie is broken by chance, so the result is then the share of right samples in the
    tied clusters, weighted by cluster. It is 0 if no sample has an answer.
    """
    votes: dict[int, list[bool]] = {}
    for cluster, verdict in zip(clusters, right, strict=True):
        if cluster >= 0:
            votes.setdefault(cluster, []).append(bool(verdict))
    if not votes:
        return 0.0
    most = max(map(len, votes.values()))
    tied = [v for v in votes.values() if len(v) == most]
    # Equivalent answers have one verdict, but for pairs that the grader could not decide.
    return float(np.mean([np.mean(v) for v in tied]))
