import itertools

import numpy as np
import pytest
from scipy import stats

from megatron_exp.seeding import Words
from megatron_exp.statistics.roc import auc, auc_interval, tpr_at_fpr, tpr_interval, tpr_p

WORDS = Words.of(5, "tests", "roc")


def test_auc_counts_ties_as_one_half():
    assert auc(np.array([1.0, 2.0]), np.array([1.0, 0.0])) == pytest.approx((0.5 + 1 + 1 + 1) / 4)


def test_the_interval_of_an_auc_contains_it_and_is_not_degenerate_at_the_ends():
    for value in (0.0, 0.3, 0.5, 0.9, 1.0):
        low, high = auc_interval(value, 20, 30)
        assert 0.0 <= low <= value <= high <= 1.0
        assert high - low > 0.02


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.0])
def test_the_interval_of_an_auc_covers_the_truth(shift):
    truth = stats.norm.cdf(shift / np.sqrt(2))
    covered = 0
    for i in range(400):
        draws = WORDS.child("cover", i).normals(80)
        low, high = auc_interval(auc(draws[:30] + shift, draws[30:]), 30, 50)
        covered += low <= truth <= high
    assert stats.binomtest(covered, 400, 0.95).pvalue > 1e-4


def test_the_threshold_admits_at_most_the_stated_share_of_negatives():
    negatives = np.arange(1000.0)
    # floor(0.01 x 1000) = 10 negatives may lie above, so the threshold is 989 and 989.5 is above it
    assert tpr_at_fpr(np.array([989.0, 989.5, 2000.0]), negatives) == pytest.approx(2 / 3)


def test_tied_negatives_at_the_threshold_never_raise_the_false_positive_rate():
    negatives = np.ones(100)
    assert tpr_at_fpr(np.ones(50), negatives) == 0.0
    assert tpr_at_fpr(np.full(50, 1.1), negatives) == 1.0


def test_the_rate_equals_the_best_threshold_found_by_trying_all():
    draws = np.round(WORDS.child("brute").normals(700), 1)
    positives, negatives = draws[:200] + 0.7, draws[200:]
    best = max((positives > t).mean() for t in np.concatenate([negatives, positives]) if (negatives > t).mean() <= 0.01)
    assert tpr_at_fpr(positives, negatives) == pytest.approx(best)


def test_the_bootstrap_interval_covers_the_true_rate():
    truth = stats.norm.sf(stats.norm.isf(0.05) - 1.5)
    covered = 0
    for i in range(100):
        draws = WORDS.child("boot", i).normals(500)
        low, high = tpr_interval(draws[:200] + 1.5, draws[200:], WORDS.child("draws", i), fpr=0.05, num_draws=200)
        covered += low <= truth <= high
    assert covered >= 85


def test_the_exact_p_of_a_rate_equals_the_share_of_permutations():
    positives, negatives = np.array([3.0, 2.5, 0.1, 2.9]), np.array([1.0, 2.7, 0.5, 0.2, 0.3, 0.9])
    everything, observed = np.concatenate([positives, negatives]), tpr_at_fpr(positives, negatives, fpr=0.2)
    rates = []
    for chosen in itertools.combinations(range(10), 4):
        mask = np.isin(np.arange(10), chosen)
        rates.append(tpr_at_fpr(everything[mask], everything[~mask], fpr=0.2))
    assert tpr_p(positives, negatives, fpr=0.2) == pytest.approx(np.mean(np.array(rates) >= observed - 1e-12))


def test_no_positive_above_the_threshold_says_nothing():
    assert tpr_p(np.zeros(5), np.arange(1.0, 101.0)) == 1.0
