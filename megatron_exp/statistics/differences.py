"""Difference of means between two groups within strata, for an assignment that was drawn within these strata."""

from typing import NamedTuple

import numpy as np

from megatron_exp.seeding import Words
from megatron_exp.statistics.normal import NO_INTERVAL, Interval, Side, p_of_z, quantile
from megatron_exp.statistics.ranks import informative, monte_carlo_p, rerandomised_sums

_SMALLEST_NORMAL_GROUP = 10
"""With a smaller group than this the normal approximation is replaced by re-randomisation, as for rank sums."""


class MeanDifference(NamedTuple):
    """difference: treated minus control. standard_error: of the difference under the null. method: how p was found."""

    difference: float
    interval: Interval
    p: float
    standard_error: float
    method: str


def stratified_mean_difference(
    values: np.ndarray, treated: np.ndarray, strata: np.ndarray, side: Side, words: Words, level: float = 0.95, num_draws: int = 9_999
) -> MeanDifference:
    """Mean of the treated minus mean of the controls within strata, tested by re-randomising the assignment.

    With w_s = n_s m_s / N_s the estimate is sum w_s (difference in stratum s) / sum w_s, and sum w_s (difference) equals the sum of the treated
    values minus their strata's means. Under re-randomisation the variance of this sum is sum w_s S_s^2, S_s^2 the variance within the stratum over both
    groups, which gives z; with fewer than ten units in a group p comes from `num_draws` keyed re-randomisations. The interval takes the variances
    of the two groups apart. Strata without both groups say nothing and are left out. Source: Imbens and Rubin, "Causal Inference" (2015), ch. 9.

    values float64 [n], treated bool [n], strata [n] of anything that sorts.
    """
    rows = informative(treated, strata)
    values, treated, codes = values[rows], treated[rows], np.unique(strata[rows], return_inverse=True)[1]
    if not len(values):
        return MeanDifference(float("nan"), NO_INTERVAL, float("nan"), float("nan"), "no stratum holds both groups")
    centred, weight_total, null_variance, variance = np.empty(len(values)), 0.0, 0.0, 0.0
    for code in range(codes.max() + 1):
        here = codes == code
        ours, theirs = values[here & treated], values[here & ~treated]
        weight, within = len(ours) * len(theirs) / here.sum(), float(values[here].var(ddof=1))
        centred[here] = values[here] - values[here].mean()
        weight_total += weight
        null_variance += weight * within
        variance += weight**2 * sum((part.var(ddof=1) if len(part) > 1 else within) / len(part) for part in (ours, theirs))
    total = float(centred[treated].sum())
    difference, error = total / weight_total, float(np.sqrt(null_variance)) / weight_total
    half = quantile(level) * float(np.sqrt(variance)) / weight_total
    interval = Interval(difference - half, difference + half)
    if min(treated.sum(), (~treated).sum()) >= _SMALLEST_NORMAL_GROUP:
        z = difference / error if error > 0 else 0.0
        return MeanDifference(difference, interval, p_of_z(z, side), error, "stratified difference of means, normal approximation")
    p = monte_carlo_p(total, rerandomised_sums(centred, treated, codes, words, num_draws), side)
    return MeanDifference(difference, interval, p, error, f"stratified difference of means, {num_draws} re-randomisations")
