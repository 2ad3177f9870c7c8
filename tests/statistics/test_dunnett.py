"""Many to one: against published tables, against Student, against draws."""

import numpy as np
import pytest
from scipy.special import stdtr

from megatron_exp.seeding import Words
from megatron_exp.statistics import dunnett
from megatron_exp.statistics.dunnett import dunnett_critical, dunnett_p


@pytest.mark.parametrize(
    ("alpha", "k", "df", "published"), [(0.05, 2, 5, 3.03), (0.05, 3, 16, 2.59), (0.05, 9, 60, 2.77), (0.01, 3, 16, 3.39)]
)
def test_critical_values_are_those_of_dunnetts_table(alpha, k, df, published):
    assert dunnett_critical(alpha, k, df) == pytest.approx(published, abs=0.006)


@pytest.mark.parametrize("df", [1, 2, 4, 30])
def test_the_quadrature_for_one_comparison_is_students_distribution(df):
    t = np.array([0.5, 2.0, 6.0, 25.0])
    found = np.exp(np.interp(t, dunnett._GRID, dunnett._log_tail(1, df)))
    np.testing.assert_allclose(found, 2 * stdtr(df, -t), rtol=2e-3, atol=1e-12)


def test_p_values_agree_with_draws_that_share_their_reference():
    num, k, df = 40_000, 5, 8
    draws = Words.of(0, "dunnett").normals(num * (k + 1 + df)).reshape(num, -1)
    spread = np.sqrt((draws[:, k + 1 :] ** 2).mean(axis=1))
    largest = np.abs(draws[:, 1 : k + 1] - draws[:, [0]]).max(axis=1) / np.sqrt(2) / spread
    for level in (0.5, 0.1, 0.01):
        threshold = dunnett_critical(level, k, df)
        assert abs((largest >= threshold).mean() - level) < 4 * np.sqrt(level * (1 - level) / num)
        assert dunnett_p(np.array([threshold]), k, df)[0] == pytest.approx(level, rel=1e-6)


def test_an_unknown_statistic_stays_unknown():
    assert np.isnan(dunnett_p(np.array([np.nan, 2.0]), 4, 10)).tolist() == [True, False]
