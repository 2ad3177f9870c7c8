"""What must hold of many simulated runs: the nominal rate of false positives, and the power that a smallest detectable effect stands for."""

import numpy as np
from scipy import stats

from megatron_exp.experiments.conformance import simulated_primaries
from megatron_exp.experiments.draft import draft

REPLICATES, MANY = 200, 2_000


def require_no_more_than_nominal(p):
    """p: float [replicates, primaries], of runs without an effect. For few replicates: too many false positives are an error, too few are not."""
    for column in p.T:
        assert stats.binomtest(int((column <= 0.05).sum()), len(column), 0.05, alternative="greater").pvalue > 1e-4


def require_nominal(experiment, context, words):
    """Two-sided, of `MANY` runs without an effect."""
    p, _ = simulated_primaries(experiment, draft(experiment, context), MANY, words, 0.0)
    for column in p.T:  # an exact test of few units attains some levels only: the largest of them up to 5% is its nominal one
        attained = column[column <= 0.05].max(initial=0.0)
        nominal = attained if len(np.unique(column)) < MANY / 4 else 0.05
        assert stats.binomtest(int((column <= 0.05).sum()), MANY, nominal).pvalue > 1e-4


def require_stated_power(experiment, context, words):
    """An effect of the size that four of five runs should detect is detected by so many, within 5 points."""
    planned = draft(experiment, context)
    _, effect = simulated_primaries(experiment, planned, REPLICATES, words.child("null"), 0.0)
    p, _ = simulated_primaries(experiment, planned, MANY, words.child("power"), effect)
    error = np.sqrt(0.8 * 0.2 / MANY)
    assert abs((p[:, 0] <= 0.05).mean() - 0.8) <= 0.05 + 3 * error
