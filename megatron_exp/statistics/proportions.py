"""Intervals and tests for counts out of a number of trials."""

import numpy as np
from scipy.special import bdtr, bdtrc

from megatron_exp.statistics.normal import NO_INTERVAL, Interval, Side, quantile


def wilson_interval(successes: int, num: int, level: float = 0.95) -> Interval:
    """Wilson's score interval for a proportion: (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n). J. Am. Stat. Assoc. 22 (1927)."""
    if num == 0:
        return NO_INTERVAL
    z, rate = quantile(level), successes / num
    centre = rate + z * z / (2 * num)
    half = z * np.sqrt(rate * (1 - rate) / num + z * z / (4 * num * num))
    scale = 1 + z * z / num
    return Interval(float(max(0.0, (centre - half) / scale)), float(min(1.0, (centre + half) / scale)))


def binomial_p(successes: int, num: int, rate: float, side: Side) -> float:
    """Exact p of `successes` out of `num` under a true rate; two-sided is twice the smaller tail, at most 1."""
    upper = float(bdtrc(successes - 1, num, rate)) if successes > 0 else 1.0
    lower = float(bdtr(successes, num, rate))
    return {"greater": upper, "less": lower, "two-sided": min(1.0, 2 * min(upper, lower))}[side]
