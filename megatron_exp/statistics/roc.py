"""Membership scores against held-out scores: AUC and true positive rate at a fixed false positive rate."""

from collections.abc import Callable

import numpy as np
from scipy.special import gammaln

from megatron_exp.seeding import Words
from megatron_exp.statistics.normal import Interval, quantile
from megatron_exp.statistics.ranks import midranks

_BISECTIONS = 60


def auc(positives: np.ndarray, negatives: np.ndarray) -> float:
    """P(positive > negative) + P(equal) / 2, by ranks (Mann-Whitney U over n m)."""
    n, m = len(positives), len(negatives)
    rank_sum = midranks(np.concatenate([positives, negatives]))[:n].sum()
    return float((rank_sum - n * (n + 1) / 2) / (n * m))


def auc_interval(value: float, num_positives: int, num_negatives: int, level: float = 0.95) -> Interval:
    """Score-type interval for an AUC: all a with |a - value| <= z sqrt(V(a)), never degenerate at 0 or 1.

    V(a) = a (1 - a) (1 + N* ((1 - a) / (2 - a) + a / (1 + a))) / (n m), N* = (n + m) / 2 - 1.
    Source: Newcombe, Statistics in Medicine 25 (2006) 559-573, method 5.
    """
    z, product, n_star = quantile(level), num_positives * num_negatives, (num_positives + num_negatives) / 2 - 1

    value = min(max(value, 0.0), 1.0)  # a weighted mean of AUCs may exceed them by rounding

    def outside(a: float) -> bool:
        variance = a * (1 - a) * (1 + n_star * ((1 - a) / (2 - a) + a / (1 + a))) / product
        return abs(a - value) > z * np.sqrt(variance)

    return Interval(_border(value, 0.0, outside), _border(value, 1.0, outside))


def _border(inside: float, outer: float, outside: Callable[[float], bool]) -> float:
    """The border between `inside` and `outer`, by bisection."""
    if not outside(outer):
        return outer
    for _ in range(_BISECTIONS):
        middle = (inside + outer) / 2
        inside, outer = (inside, middle) if outside(middle) else (middle, outer)
    return inside


def tpr_at_fpr(positives: np.ndarray, negatives: np.ndarray, fpr: float = 0.01) -> float:
    """The largest true positive rate over thresholds whose false positive rate is at most `fpr`.

    Positive means score > t. The best threshold is the (k + 1)-th highest negative, k = floor(fpr m): then at most k of m negatives
    lie above. The false positive rate moves in steps of 1 / m, so m should be at least 1 / fpr, better ten times that.
    """
    return float(_tpr(positives[None, :], np.sort(negatives)[None, :], fpr)[0])


def _tpr(positives: np.ndarray, sorted_negatives: np.ndarray, fpr: float) -> np.ndarray:
    """[draws] rates of scores [draws, n] and ascending negatives [draws, m]."""
    m = sorted_negatives.shape[1]
    allowed = int(np.floor(fpr * m + 1e-9))
    return (positives > sorted_negatives[:, [m - 1 - allowed]]).mean(axis=1)


def tpr_p(positives: np.ndarray, negatives: np.ndarray, fpr: float = 0.01) -> float:
    """P of a true positive rate at least as large, were positives and negatives exchangeable: exact, by ranks alone.

    With k negatives allowed, x or more positives above the (k + 1)-th negative means: among the x + k highest of all n + m scores at
    most k are negatives, a hypergeometric tail. Positives tied with the threshold do not count, which only makes p larger.
    """
    n, m = len(positives), len(negatives)
    allowed = int(np.floor(fpr * m + 1e-9))
    above = round(tpr_at_fpr(positives, negatives, fpr) * n)
    if above == 0:
        return 1.0
    i, drawn = np.arange(allowed + 1), above + allowed
    i = i[drawn - i <= n]
    log_p = _log_choose(m, i) + _log_choose(n, drawn - i) - _log_choose(n + m, drawn)
    return float(min(1.0, np.exp(log_p).sum()))


def _log_choose(n: int, k: np.ndarray | int) -> np.ndarray:
    return gammaln(n + 1) - gammaln(np.asarray(k) + 1) - gammaln(n - np.asarray(k) + 1)


def tpr_interval(
    positives: np.ndarray, negatives: np.ndarray, words: Words, fpr: float = 0.01, level: float = 0.95, num_draws: int = 1_000
) -> Interval:
    """Percentile bootstrap: positives and negatives are resampled independently and the threshold is found anew each time."""
    n, m = len(positives), len(negatives)
    draws = np.empty(num_draws)
    for start in range(0, num_draws, 100):  # blocks bound the memory: 100 x (n + m) indices
        block = min(100, num_draws - start)
        chosen_n = words.child("positives").integers(block * n, n, stream=start).reshape(block, n)
        chosen_m = words.child("negatives").integers(block * m, m, stream=start).reshape(block, m)
        draws[start : start + block] = _tpr(positives[chosen_n], np.sort(negatives[chosen_m], axis=1), fpr)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))
