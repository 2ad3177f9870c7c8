import numpy as np
import pytest
from scipy import stats

from megatron_exp.seeding import Words
from megatron_exp.statistics.decay import fit_power_law
from megatron_exp.statistics.multiplicity import holm
from megatron_exp.statistics.normal import mean_interval, smallest_detectable_effect, standard_error, z_test
from megatron_exp.statistics.proportions import binomial_p, wilson_interval

WORDS = Words.of(1, "tests", "formulas")


@pytest.mark.parametrize("side", ["greater", "less", "two-sided"])
def test_the_z_test_of_known_unit_variance(side):
    values = np.array([0.5, 1.5, -0.25, 0.75])
    z, p = z_test(values, side)
    assert z == pytest.approx(2 * values.mean())
    expected = {"greater": stats.norm.sf(z), "less": stats.norm.cdf(z), "two-sided": 2 * stats.norm.sf(abs(z))}
    assert p == pytest.approx(expected[side])


def test_a_far_tail_does_not_round_to_zero():
    assert 0 < z_test(np.full(100, 2.0), "greater")[1] < 1e-80


def test_the_mean_interval_is_students():
    values = WORDS.normals(12)
    expected = stats.t.interval(0.95, 11, loc=values.mean(), scale=stats.sem(values))
    np.testing.assert_allclose(mean_interval(values), expected)
    assert np.isnan(mean_interval(values[:1])).all() and np.isnan(standard_error(values[:1]))


def test_the_detectable_effect_is_found_with_the_stated_power():
    effect = smallest_detectable_effect(1.0, "greater", alpha=0.05, power=0.8)
    assert stats.norm.sf(stats.norm.isf(0.05) - effect) == pytest.approx(0.8)
    two_sided = smallest_detectable_effect(1.0, "two-sided", alpha=0.05, power=0.8)
    assert stats.norm.sf(stats.norm.isf(0.025) - two_sided) == pytest.approx(0.8)


@pytest.mark.parametrize("successes,num", [(0, 10), (3, 10), (10, 10), (57, 200)])
def test_wilsons_interval_equals_scipys(successes, num):
    expected = stats.binomtest(successes, num).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose(wilson_interval(successes, num), expected, atol=1e-12)


@pytest.mark.parametrize("side", ["greater", "less"])
@pytest.mark.parametrize("successes", [0, 1, 7, 20])
def test_the_binomial_tail_equals_scipys(side, successes):
    assert binomial_p(successes, 20, 0.1, side) == pytest.approx(stats.binomtest(successes, 20, 0.1, alternative=side).pvalue)


def test_holm_on_a_known_example():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])


def test_holm_never_passes_a_larger_p_below_a_smaller_one_nor_above_one():
    p = WORDS.child("holm").uniforms(20)
    adjusted = holm(p)
    assert np.all(np.diff(adjusted[np.argsort(p)]) >= 0) and adjusted.max() <= 1


def test_a_test_that_could_not_be_done_keeps_its_place_in_the_family():
    adjusted = holm([0.01, float("nan")])
    assert adjusted[0] == pytest.approx(0.02) and np.isnan(adjusted[1])


def test_the_power_law_finds_the_parameters_it_was_made_with():
    elapsed = np.array([1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0])
    fit = fit_power_law(elapsed, 0.2 * (1 + elapsed / 30.0) ** -0.7)
    assert fit.amplitude == pytest.approx(0.2, rel=0.05)
    assert fit.time == pytest.approx(30.0, rel=0.25)
    assert fit.exponent == pytest.approx(0.7, rel=0.1)


def test_too_few_points_give_no_power_law():
    assert np.isnan(fit_power_law(np.array([1.0, 2.0]), np.array([0.1, 0.05]))).all()
