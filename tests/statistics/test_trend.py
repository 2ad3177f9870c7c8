import numpy as np
import pytest
from scipy import stats

from megatron_exp.seeding import Words
from megatron_exp.statistics.trend import trend

WORDS = Words.of(0, "tests", "trend")
DOSES = np.repeat(np.arange(10.0), 4)


def test_slope_and_interval_are_those_of_least_squares():
    values = 0.3 * DOSES + WORDS.normals(40)
    found, expected = trend(values, DOSES, "greater"), stats.linregress(DOSES, values)
    assert (found.slope, found.standard_error) == pytest.approx((expected.slope, expected.stderr))
    half = stats.t.ppf(0.975, 38) * expected.stderr
    assert found.interval == pytest.approx((expected.slope - half, expected.slope + half))


def test_p_is_that_of_spearmans_correlation():
    values = 0.1 * DOSES + WORDS.normals(40)
    assert trend(values, DOSES, "two-sided").p == pytest.approx(stats.spearmanr(DOSES, values).pvalue, rel=0.3)


def test_p_is_uniform_without_a_trend():
    p = np.array([trend(WORDS.normals(40, stream=i), DOSES, "greater").p for i in range(1000)])
    assert stats.kstest(p, "uniform").pvalue > 1e-4


@pytest.mark.parametrize(("values", "doses"), [([1.0, 2.0], [0.0, 1.0]), ([1.0, 2.0, 3.0], [5.0, 5.0, 5.0])])
def test_too_little_says_nothing(values, doses):
    assert np.isnan(trend(np.array(values), np.array(doses), "greater").p)


def test_equal_values_have_no_trend():
    found = trend(np.ones(40), DOSES, "greater")
    assert found.slope == 0 and found.p == 0.5
