import numpy as np
import pytest
from scipy import stats

from megatron_exp.seeding import Words
from megatron_exp.statistics.ranks import midranks, rank_among_controls, smallest_detectable_rank_effect, stratified_rank_sum

WORDS = Words.of(11, "tests", "ranks")
ONE_STRATUM = np.zeros(60, np.int64)


def normals(*names, num):
    return WORDS.child(*names).normals(num)


def test_midranks_share_ranks_among_ties_as_scipy_does():
    values = np.array([3.0, 1.0, 3.0, 2.0, 3.0, 1.0])
    np.testing.assert_array_equal(midranks(values), stats.rankdata(values))


@pytest.mark.parametrize("side", ["greater", "less", "two-sided"])
@pytest.mark.parametrize("rounded", [False, True])
def test_one_stratum_is_scipys_mann_whitney_test_with_ties_too(side, rounded):
    values = normals("mw", num=60)
    values = np.round(values, 0) if rounded else values
    treated = np.arange(60) < 25
    ours = stratified_rank_sum(values, treated, ONE_STRATUM, side, WORDS)
    theirs = stats.mannwhitneyu(values[treated], values[~treated], alternative=side, use_continuity=False, method="asymptotic")
    assert ours.p == pytest.approx(theirs.pvalue, rel=1e-9)
    assert ours.auc == pytest.approx(theirs.statistic / (25 * 35))


def test_differences_between_strata_do_not_count():
    strata = np.repeat([0, 1], 40)
    values = normals("strata", num=80) + 100.0 * strata
    treated = np.concatenate([np.arange(40) < 36, np.arange(40) < 4])  # most treated units lie in the lower stratum
    assert stratified_rank_sum(values, treated, np.zeros(80, np.int64), "two-sided", WORDS).p < 1e-4
    assert stratified_rank_sum(values, treated, strata, "two-sided", WORDS).p > 1e-3


def test_strata_without_both_groups_are_left_out_and_nothing_left_is_nan():
    values, treated = np.arange(6.0), np.array([True, True, True, False, False, False])
    result = stratified_rank_sum(values, treated, treated.astype(int), "greater", WORDS)
    assert np.isnan(result.p) and "no stratum" in result.method


@pytest.mark.parametrize("side", ["greater", "less", "two-sided"])
def test_very_small_groups_are_tested_over_all_assignments_as_scipy_does(side):
    values = np.array([2.1, 1.7, 3.0, 0.2, 0.5, 1.1, 0.3, 0.9])
    treated = np.array([True, True, True, False, False, False, False, False])
    ours = stratified_rank_sum(values, treated, np.zeros(8, int), side, WORDS)
    exact = stats.mannwhitneyu(values[treated], values[~treated], alternative=side, method="exact").pvalue
    assert "all 56 assignments" in ours.method and ours.p == pytest.approx(exact)


def test_small_groups_are_re_randomised_and_agree_with_the_exact_distribution():
    values, treated = normals("small", num=18), np.arange(18) < 9
    ours = stratified_rank_sum(values, treated, np.zeros(18, int), "greater", WORDS)
    exact = stats.mannwhitneyu(values[treated], values[~treated], alternative="greater", method="exact").pvalue
    assert "re-randomisations" in ours.method
    assert ours.p == pytest.approx(exact, abs=4 * np.sqrt(exact / 9_999))


def test_the_reported_standard_error_is_that_of_the_auc_under_the_null():
    strata = np.repeat([0, 1, 2], [20, 30, 50])
    treated = np.arange(100) % 3 == 0
    aucs = [stratified_rank_sum(normals("se", i, num=100), treated, strata, "greater", WORDS) for i in range(400)]
    assert np.std([one.auc for one in aucs]) == pytest.approx(aucs[0].standard_error, rel=0.15)


@pytest.mark.parametrize("group", [5, 20])
def test_p_values_are_calibrated_under_the_null(group):
    strata = np.repeat([0, 1], 2 * group // 2)
    treated = np.arange(2 * group) % 2 == 0
    p = [
        stratified_rank_sum(normals("null", group, i, num=2 * group), treated, strata, "greater", WORDS.child(i), 199).p for i in range(400)
    ]
    assert stats.binomtest(int(np.sum(np.array(p) <= 0.05)), len(p), 0.05).pvalue > 1e-4


def test_one_value_among_controls_never_goes_below_one_over_m_plus_one():
    controls = np.arange(19.0)
    assert rank_among_controls(100.0, controls, "greater") == pytest.approx(1 / 20)
    assert rank_among_controls(100.0, controls, "less") == 1.0
    assert rank_among_controls(18.0, controls, "greater") == pytest.approx(2 / 20)
    assert rank_among_controls(100.0, controls, "two-sided") == pytest.approx(2 / 20)


def test_a_rank_test_that_cannot_reach_alpha_has_no_detectable_effect():
    assert smallest_detectable_rank_effect(np.arange(10.0)) == np.inf
    assert np.isfinite(smallest_detectable_rank_effect(normals("controls", num=19)))


def test_the_detectable_rank_effect_is_found_with_the_stated_power():
    found = []
    for i in range(400):
        draws = normals("power", i, num=100)
        effect = smallest_detectable_rank_effect(np.array([-1.0, 1.0] * 50) * np.sqrt(99 / 100))  # controls of sd exactly 1
        found.append(rank_among_controls(draws[0] + effect, draws[1:], "greater") <= 0.05)
    assert 0.72 < np.mean(found) < 0.88
