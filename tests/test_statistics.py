"""Errors, intervals and tests of evals, each against scipy or a count by brute force."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from evaluation.statistics import (
    bootstrap_interval,
    majority_is_right,
    mcnemar,
    paired_difference,
    pass_at_k,
    pass_curve,
    standard_error,
)


def shares(n: int = 60, seed: int = 0) -> np.ndarray:
    """Accuracies of n problems with 8 samples each, [n]."""
    return np.random.default_rng(seed).integers(9, size=n) / 8


def test_standard_error_is_scipys():
    assert standard_error(shares()) == pytest.approx(stats.sem(shares()))
    assert standard_error([0.5]) is None


def test_bootstrap_interval_agrees_with_scipys():
    """Two percentile bootstraps with other draws agree up to the error of 10,000 draws."""
    ours = bootstrap_interval(shares())
    theirs = stats.bootstrap(
        (shares(),), np.mean, n_resamples=10_000, method="percentile", random_state=1
    ).confidence_interval
    assert ours == pytest.approx(tuple(theirs), abs=0.1 * stats.sem(shares()))
    assert ours == bootstrap_interval(shares())  # seeded
    assert bootstrap_interval([1.0]) is None


def test_bootstrap_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(3)
    covered = 0
    for i in range(300):
        low, high = bootstrap_interval(rng.binomial(8, 0.3, size=80) / 8, draws=400, seed=i)
        covered += low <= 0.3 <= high
    assert stats.binomtest(covered, 300, 0.95).pvalue > 0.001


def test_bootstrap_of_another_statistic_draws_problems_whole():
    pairs = np.stack([shares(seed=1), shares(seed=2)], 1)  # [n, 2]

    def gap(v: np.ndarray) -> float:
        return v[:, 1].mean() - v[:, 0].mean()

    ours = bootstrap_interval(pairs, gap, draws=2000)
    assert ours == pytest.approx(bootstrap_interval(pairs[:, 1] - pairs[:, 0], draws=2000))


def test_paired_difference_is_scipys_paired_t_test():
    a, b = shares(seed=1), np.clip(shares(seed=1) + shares(seed=2) / 4, 0, 1)
    d = paired_difference(a, b)
    assert d.mean == pytest.approx(b.mean() - a.mean()) and d.n == 60
    assert d.stderr == pytest.approx(stats.sem(b - a))
    assert d.p == pytest.approx(stats.ttest_rel(b, a).pvalue)
    assert (d.low, d.high) == bootstrap_interval(b - a) and d.low < d.mean < d.high


def test_paired_difference_at_its_edges():
    same = paired_difference([0.5, 1.0], [0.5, 1.0])
    assert (same.mean, same.low, same.high, same.p) == (0, 0, 0, 1)
    assert paired_difference([0, 0], [1, 1]).p == 0
    assert paired_difference([0.0], [1.0]).stderr is None
    for a, b in (([1.0], [1.0, 0.0]), ([], [])):
        with pytest.raises(ValueError):
            paired_difference(a, b)


@pytest.mark.parametrize("b,c", [(0, 0), (0, 5), (3, 9), (7, 7), (12, 4)])
def test_mcnemar_by_counting_all_outcomes(b, c):
    """The share of all 2^(b+c) outcomes that are at least as uneven as the one seen."""
    outcomes = range(2 ** (b + c))
    uneven = sum(abs(2 * i.bit_count() - (b + c)) >= abs(b - c) for i in outcomes)
    assert mcnemar(b, c) == pytest.approx(uneven / 2 ** (b + c))


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_by_counting_all_subsets(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_of_many_samples_is_exact():
    assert pass_at_k(2000, 1, 1000) == pytest.approx(0.5)
    assert math.isclose(pass_at_k(2000, 3, 1), 3 / 2000)
    for bad in ((4, 2, 5), (4, 2, 0), (4, 5, 1), (4, -1, 1)):
        with pytest.raises(ValueError):
            pass_at_k(*bad)


def test_pass_curve_starts_at_the_mean_and_ends_at_any():
    right = [[True, False, False], [False, False, False], [True, True, True, True]]
    curve = pass_curve(right)
    assert len(curve) == 3  # the fewest samples that a problem has
    assert curve[0][0] == pytest.approx((1 / 3 + 0 + 1) / 3)
    assert curve[2] == (pytest.approx(2 / 3), pytest.approx(stats.sem([1, 0, 1])))


@pytest.mark.parametrize(
    "clusters,right,share",
    [
        ([0, 0, 1], [True, True, False], 1),
        ([0, 1, 1], [True, False, False], 0),
        ([0, 1], [True, False], 0.5),  # a tie, broken by chance
        ([-1, -1, 0], [False, False, True], 1),  # no answer, no vote
        ([-1, -1], [False, False], 0),
        ([0, 0, 1, 1, 2], [False, False, True, True, False], 0.5),
    ],
)
def test_majority(clusters, right, share):
    assert majority_is_right(clusters, right) == share
