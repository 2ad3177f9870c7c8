"""Rank tests: two groups within strata, and one value among exchangeable controls."""

import itertools
import math
from typing import NamedTuple

import numpy as np
from scipy.special import ndtri

from megatron_exp.seeding import Words
from megatron_exp.statistics.normal import Side, p_of_z

_SMALLEST_NORMAL_GROUP = 10
"""With a smaller group than this the normal approximation of a rank sum is replaced by re-randomisation."""

_WORDS_PER_BLOCK = 1_000_000
"""Bounds the memory of re-randomisation."""


class RankTest(NamedTuple):
    """auc: P(treated > control) + P(equal) / 2 within strata. standard_error: of the AUC under the null. method: how p was found."""

    auc: float
    p: float
    standard_error: float
    method: str


def midranks(values: np.ndarray) -> np.ndarray:
    """float64 [n] ranks from 1, ties sharing their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((2 * last - counts + 1) / 2.0)[inverse]


def stratified_rank_sum(
    values: np.ndarray, treated: np.ndarray, strata: np.ndarray, side: Side, words: Words, num_draws: int = 9_999
) -> RankTest:
    """Wilcoxon's rank-sum test within strata (van Elteren), for an assignment that was drawn within these strata.

    With w_s = 1 / (N_s + 1) the statistic is T = sum_s w_s R_s, R_s the rank sum of the treated in stratum s. Under re-randomisation
    E T = sum w_s n_s (N_s + 1) / 2 and Var T = sum w_s^2 n_s m_s / 12 (N_s + 1 - sum_ties (t^3 - t) / (N_s (N_s - 1))), so z is
    exact in its first two moments. The AUC is the mean of the strata's AUCs with weights n_s m_s / (N_s + 1), the same as in T.
    Strata without both groups say nothing and are left out. With fewer than ten units in a group p comes from all assignments of a
    single stratum where they are at most `num_draws`, else from that many keyed re-randomisations. Sources: van Elteren, Bull. Int.
    Statist. Inst. 37 (1960); Lehmann, "Nonparametrics" (1975), ch. 3.3.

    values float64 [n], treated bool [n], strata [n] of anything that sorts.
    """
    rows = informative(treated, strata)
    values, treated, codes = values[rows], treated[rows], np.unique(strata[rows], return_inverse=True)[1]
    if not len(values):
        return RankTest(float("nan"), float("nan"), float("nan"), "no stratum holds both groups")
    weighted = np.empty(len(values))
    variance, weight_total, centre = 0.0, 0.0, 0.0
    for code in range(codes.max() + 1):
        rows = codes == code
        ranks, n = midranks(values[rows]), int(treated[rows].sum())
        total = len(ranks)
        m = total - n
        weighted[rows] = ranks / (total + 1)
        variance += n * m / 12.0 * (total + 1 - _tie_term(ranks)) / (total + 1) ** 2
        weight_total += n * m / (total + 1)
        centre += n * (n + 1) / 2.0 / (total + 1)
    statistic = float(weighted[treated].sum())
    auc = (statistic - centre) / weight_total
    error = float(np.sqrt(variance)) / weight_total
    if min(treated.sum(), (~treated).sum()) >= _SMALLEST_NORMAL_GROUP:
        z = (auc - 0.5) / error if error > 0 else 0.0
        return RankTest(auc, p_of_z(z, side), error, "stratified rank-sum test, normal approximation")
    if codes.max() == 0 and (num := math.comb(len(values), int(treated.sum()))) <= num_draws:
        p = _exact_p(statistic, weighted, int(treated.sum()), centre + weight_total / 2, side)
        return RankTest(auc, p, error, f"rank-sum test, all {num} assignments")
    draws = rerandomised_sums(weighted, treated, codes, words, num_draws)
    p = monte_carlo_p(statistic - centre - weight_total / 2, draws - centre - weight_total / 2, side)
    return RankTest(auc, p, error, f"stratified rank-sum test, {num_draws} re-randomisations")


def informative(treated: np.ndarray, strata: np.ndarray) -> np.ndarray:
    """bool [n]: whether the row's stratum holds both groups; the others say nothing about a difference."""
    codes = np.unique(strata, return_inverse=True)[1]
    total, number = np.bincount(codes), np.bincount(codes, weights=treated)
    return ((number > 0) & (number < total))[codes]


def _tie_term(ranks: np.ndarray) -> float:
    counts = np.unique(ranks, return_counts=True)[1].astype(np.float64)
    total = len(ranks)
    return float((counts**3 - counts).sum() / (total * (total - 1)))


def _exact_p(observed: float, weighted: np.ndarray, num: int, centre: float, side: Side) -> float:
    """Share of all choices of `num` values whose sum is at least as extreme; one of them is the observed one."""
    chosen = np.array(list(itertools.combinations(range(len(weighted)), num)))
    return float(_extreme(observed - centre, weighted[chosen].sum(axis=1) - centre, side).mean())


def rerandomised_sums(values: np.ndarray, treated: np.ndarray, strata: np.ndarray, words: Words, num_draws: int) -> np.ndarray:
    """float64 [num_draws]: sums of `values` over the treated under keyed re-draws of the assignment within strata."""
    sums = np.zeros(num_draws)
    for code in np.unique(strata):
        rows = np.flatnonzero(strata == code)
        n = int(treated[rows].sum())
        drawn = words.child("rerandomise", int(code))
        block = max(1, _WORDS_PER_BLOCK // len(rows))
        for start in range(0, num_draws, block):
            num = min(block, num_draws - start)
            order = np.argsort(drawn.words(num * len(rows), stream=start).reshape(num, len(rows)), axis=1)
            sums[start : start + num] += values[rows][order[:, :n]].sum(axis=1)
    return sums


def monte_carlo_p(observed: float, draws: np.ndarray, side: Side) -> float:
    """(1 + draws at least as extreme) / (1 + draws), null centre 0; valid at any number of draws.

    Source: Phipson and Smyth, Stat. Appl. Genet. Mol. Biol. 9 (2010).
    """
    return float((1 + _extreme(observed, draws, side).sum()) / (1 + len(draws)))


def _extreme(observed: float, draws: np.ndarray, side: Side) -> np.ndarray:
    """bool [draws]: at least as far from 0 as `observed`, up to rounding."""
    slack = 1e-12 * max(1.0, abs(observed))
    return {
        "greater": draws >= observed - slack,
        "less": draws <= observed + slack,
        "two-sided": np.abs(draws) >= abs(observed) - slack,
    }[side]


def rank_among_controls(value: float, controls: np.ndarray, side: Side) -> float:
    """Rank p-value of one value among m exchangeable controls: (1 + controls at least as extreme) / (m + 1).

    Never below 1 / (m + 1). Exact when the treated one was drawn uniformly from all m + 1. Two-sided: twice the smaller tail, at most 1.
    """
    above = (1 + int((controls >= value).sum())) / (len(controls) + 1)
    below = (1 + int((controls <= value).sum())) / (len(controls) + 1)
    return {"greater": above, "less": below, "two-sided": min(1.0, 2 * min(above, below))}[side]


def smallest_detectable_rank_effect(controls: np.ndarray, alpha: float = 0.05, power: float = 0.8) -> float:
    """Shift of one value that puts it, with probability `power`, among the floor(alpha (m + 1)) highest of m + 1 normal values.

    Infinite where m is too small for p to reach alpha. In the unit of the controls.
    """
    places = int(alpha * (len(controls) + 1))
    if places < 1 or len(controls) < 2:
        return float("inf")
    return float(np.std(controls, ddof=1) * (ndtri(1 - places / (len(controls) + 1)) + ndtri(power)))
