import numpy as np
import pytest
from scipy import stats

from megatron_exp.seeding import Words
from megatron_exp.statistics.differences import stratified_mean_difference

WORDS = Words.of(0, "tests", "differences")


def drawn(num, share=0.4):
    return WORDS.child("treated").uniforms(num) < share


def test_one_stratum_gives_the_difference_of_means_and_the_permutation_variance():
    values, treated = WORDS.normals(60), drawn(60)
    found = stratified_mean_difference(values, treated, np.zeros(60), "greater", WORDS)
    n, m = treated.sum(), (~treated).sum()
    assert found.difference == pytest.approx(values[treated].mean() - values[~treated].mean())
    assert found.standard_error == pytest.approx(np.sqrt(values.var(ddof=1) * (1 / n + 1 / m)))
    assert found.p == pytest.approx(stats.norm.sf(found.difference / found.standard_error))
    welch = stats.ttest_ind(values[treated], values[~treated], equal_var=False)
    assert np.mean(found.interval) == pytest.approx(found.difference)
    assert found.interval.high - found.difference == pytest.approx(1.96 * found.difference / welch.statistic, rel=1e-3)


def test_a_difference_between_strata_is_no_effect():
    strata = np.repeat([0, 1], 200)
    treated = np.concatenate([np.arange(200) < 150, np.arange(200) < 50])
    values = 100.0 * strata + WORDS.normals(400)
    assert abs(stratified_mean_difference(values, treated, strata, "two-sided", WORDS).difference) < 0.5


def test_small_groups_are_tested_by_re_randomising():
    values, treated = np.arange(8.0), np.arange(8) >= 5
    found = stratified_mean_difference(values, treated, np.zeros(8), "greater", WORDS)
    assert found.p == pytest.approx(1 / 56, abs=0.006)  # the highest of 8 choose 3 sums
    assert "re-randomisations" in found.method


def test_strata_with_one_group_only_say_nothing():
    found = stratified_mean_difference(np.ones(4), np.array([True, True, False, False]), np.array([0, 0, 1, 1]), "greater", WORDS)
    assert np.isnan(found.difference) and np.isnan(found.p) and "both groups" in found.method


def test_without_an_effect_p_is_uniform():
    p = [
        stratified_mean_difference(WORDS.normals(60, stream=index), drawn(60), np.arange(60) % 3, "greater", WORDS).p
        for index in range(300)
    ]
    assert stats.kstest(p, "uniform").pvalue > 1e-4
