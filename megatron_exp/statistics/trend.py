"""Does a value grow with a dose that a key dealt?"""

from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

from megatron_exp.statistics.normal import NO_INTERVAL, Interval, Side, p_of_z
from megatron_exp.statistics.ranks import midranks


class Trend(NamedTuple):
    """slope of the values per unit of dose, with Student's standard error and interval; p of the ranks' correlation."""

    slope: float
    standard_error: float
    interval: Interval
    p: float


def trend(values: np.ndarray, doses: np.ndarray, side: Side, level: float = 0.95) -> Trend:
    """Least-squares slope of `values` over `doses`, tested by Spearman's rank correlation r.

    Under re-randomisation of the doses E r = 0 and Var r = 1 / (n - 1) exactly, so z = r sqrt(n - 1). NaN for fewer than
    three values or a single dose. Source: Lehmann, "Nonparametrics" (1975), ch. 7.3. values, doses: float64 [n].
    """
    n = len(values)
    if n < 3 or np.ptp(doses) == 0:
        return Trend(float("nan"), float("nan"), NO_INTERVAL, float("nan"))
    centred = doses - doses.mean()
    slope = float(centred @ values / (centred @ centred))
    residuals = values - values.mean() - slope * centred
    error = float(np.sqrt(residuals @ residuals / (n - 2) / (centred @ centred)))
    half = float(stdtrit(n - 2, 0.5 + level / 2.0)) * error
    correlation = float(np.corrcoef(midranks(values), midranks(doses))[0, 1]) if np.ptp(values) else 0.0
    return Trend(slope, error, Interval(slope - half, slope + half), p_of_z(correlation * np.sqrt(n - 1), side))
