"""Tests and intervals that rest on the normal or Student distribution."""

from typing import Literal, NamedTuple

import numpy as np
from scipy.special import ndtr, ndtri, stdtrit

Side = Literal["greater", "less", "two-sided"]


class Interval(NamedTuple):
    """A confidence interval [low, high]."""

    low: float
    high: float


NO_INTERVAL = Interval(float("nan"), float("nan"))


def p_of_z(z: float, side: Side) -> float:
    """The p-value of a standard normal statistic."""
    if side == "two-sided":
        return float(2.0 * ndtr(-abs(z)))
    return float(ndtr(-z if side == "greater" else z))


def z_test(values: np.ndarray, side: Side, sd: float = 1.0) -> tuple[float, float]:
    """(z, p) of z = sqrt(n) mean / sd for independent values of known null standard deviation `sd` and null mean 0."""
    z = float(np.sqrt(len(values)) * np.mean(values) / sd)
    return z, p_of_z(z, side)


def quantile(level: float) -> float:
    """The two-sided normal quantile of a confidence level: 1.96 for 0.95."""
    return float(ndtri(0.5 + level / 2.0))


def mean_interval(values: np.ndarray, level: float = 0.95) -> Interval:
    """Student's interval for the mean of independent values; none for fewer than two."""
    if len(values) < 2:
        return NO_INTERVAL
    half = float(stdtrit(len(values) - 1, 0.5 + level / 2.0)) * standard_error(values)
    return Interval(float(np.mean(values)) - half, float(np.mean(values)) + half)


def standard_error(values: np.ndarray) -> float:
    """Standard error of the mean of independent values; NaN for fewer than two."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def smallest_detectable_effect(
    standard_error: float, side: Side, alpha: float = 0.05, power: float = 0.8, freedom: int | None = None
) -> float:
    """Effect that a test at `alpha` finds with probability `power`: (z_{1-alpha} + z_power) SE, z_{1-alpha/2} if two-sided.

    freedom: of a standard error from few values, whose quantiles are then Student's. In the unit of the standard error. Source: Bloom,
    "Minimum detectable effects", Evaluation Review 19 (1995).
    """
    tail = alpha / 2.0 if side == "two-sided" else alpha
    quantiles = (
        (ndtri(1.0 - tail), ndtri(power)) if freedom is None else (stdtrit(max(freedom, 1), 1.0 - tail), stdtrit(max(freedom, 1), power))
    )
    return float(standard_error * sum(quantiles))
