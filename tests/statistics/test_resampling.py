import itertools

import numpy as np
import pytest
from scipy import stats

from megatron_exp.seeding import Words
from megatron_exp.statistics.resampling import cluster_bootstrap, sign_flip_test

WORDS = Words.of(3, "tests", "resampling")


def test_nine_pairs_that_all_agree_give_one_in_512():
    assert sign_flip_test(np.arange(1.0, 10.0), "greater", WORDS).p == pytest.approx(1 / 512)
    assert sign_flip_test(np.arange(1.0, 10.0), "two-sided", WORDS).p == pytest.approx(2 / 512)
    assert sign_flip_test(np.arange(1.0, 10.0), "less", WORDS).p == 1.0


def test_the_exact_test_counts_every_sign_pattern():
    differences = np.array([0.3, -0.1, 0.8, 0.2, -0.5, 0.4])
    sums = [np.dot(signs, differences) for signs in itertools.product([1, -1], repeat=6)]
    expected = np.mean(np.array(sums) >= differences.sum() - 1e-12)
    assert sign_flip_test(differences, "greater", WORDS).p == pytest.approx(expected)


def test_many_pairs_are_drawn_by_key_and_agree_with_scipy():
    differences = WORDS.child("many").normals(70) + 0.2
    ours = sign_flip_test(differences, "greater", WORDS, num_draws=19_999)
    theirs = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=19_999, alternative="greater", rng=np.random.default_rng(0)
    )
    assert ours.p == pytest.approx(theirs.pvalue, abs=5 * np.sqrt(2 * theirs.pvalue / 19_999))
    assert ours == sign_flip_test(differences, "greater", WORDS, num_draws=19_999)


@pytest.mark.parametrize("pairs", [9, 24])
def test_p_values_are_calibrated_under_the_null(pairs):
    p = [sign_flip_test(WORDS.child("null", pairs, i).normals(pairs), "greater", WORDS.child(i), 199).p for i in range(400)]
    assert stats.binomtest(int(np.sum(np.array(p) <= 0.05)), len(p), 0.05).pvalue > 1e-4


def test_the_bootstrap_draws_whole_clusters():
    clusters = np.repeat(np.arange(30), 20)
    effects = np.repeat(WORDS.child("clusters").normals(30), 20)
    values = effects + 0.01 * WORDS.child("rows").normals(600)
    low, high = cluster_bootstrap(clusters, lambda rows: float(values[rows].mean()), WORDS)
    by_cluster = stats.sem(effects[::20])
    assert high - low == pytest.approx(2 * 1.96 * by_cluster, rel=0.25)  # a bootstrap of rows would be 4.5 times narrower


def test_the_bootstrap_is_keyed():
    clusters, values = np.arange(40), WORDS.child("keyed").normals(40)

    def interval(words):
        return cluster_bootstrap(clusters, lambda rows: float(values[rows].mean()), words, num_draws=50)

    assert interval(WORDS) == interval(WORDS)
    assert interval(WORDS) != interval(WORDS.child("other"))
