"""Many groups against one shared reference: the joint distribution of Student statistics that have the reference in common.

With equal group sizes the k statistics T_j = (mean_j - mean_0) / (S sqrt(2 / K)) have pairwise correlation 1/2 exactly, because all of them contain
mean_0. So P(max |T_j| <= c) = E[(Phi(z + sqrt(2) c s) - Phi(z - sqrt(2) c s))^k], z standard normal, s^2 chi-square over its degrees of freedom.
Source: Dunnett, "A multiple comparison procedure for comparing several treatments with a control", JASA 50 (1955).
"""

from functools import lru_cache

import numpy as np
from scipy.special import gammaln, ndtr, stdtr

_Z = np.linspace(-8.5, 8.5, 103)
_Z_WEIGHTS = np.exp(-0.5 * _Z**2) / np.sqrt(2.0 * np.pi) * (_Z[1] - _Z[0])
_LOG_S = np.linspace(-14.0, 2.5, 291)
"""Both integrands are smooth and vanish at the ends, so that the trapezoidal rule converges faster than any power."""
_GRID = np.concatenate([np.linspace(0.0, 12.0, 241), np.geomspace(12.2, 400.0, 80)])


def dunnett_p(t: np.ndarray, num_compared: int, df: int) -> np.ndarray:
    """P(max |T_j| >= |t|) of `num_compared` statistics against one reference: p-values adjusted within the comparison. Shape of `t`.

    t: Student statistics of `df` degrees of freedom; NaN stays NaN. Exact to about 1e-6 below |t| = 400, from where on the value at 400 is given.
    """
    t = np.abs(np.asarray(t, dtype=np.float64))
    if num_compared == 1:
        return 2.0 * stdtr(df, -t)
    return np.where(np.isnan(t), np.nan, np.exp(np.interp(np.minimum(t, _GRID[-1]), _GRID, _log_tail(num_compared, df))))


def dunnett_critical(alpha: float, num_compared: int, df: int) -> float:
    """c with P(max |T_j| >= c) = alpha: all intervals mean_j - mean_0 +- c S sqrt(2 / K) hold together with probability 1 - alpha."""
    tail = _log_tail(num_compared, df)
    return float(np.interp(-np.log(alpha), -tail, _GRID))


@lru_cache(maxsize=256)
def _log_tail(num_compared: int, df: int) -> np.ndarray:
    """log P(max |T_j| >= c) on the grid of c."""
    s = np.exp(_LOG_S)
    log_density = 0.5 * df * np.log(0.5 * df) + np.log(2.0) - gammaln(0.5 * df) + (df - 1) * _LOG_S - 0.5 * df * s**2
    weights = np.exp(log_density + _LOG_S) * (_LOG_S[1] - _LOG_S[0])
    weights /= weights.sum()  # what is left of the error of the rule cancels
    tail = np.empty(len(_GRID))
    for index, c in enumerate(_GRID):
        shift = np.sqrt(2.0) * c * s[:, None]
        inside = ndtr(_Z + shift) - ndtr(_Z - shift)
        tail[index] = weights @ (-np.expm1(num_compared * np.log(np.maximum(inside, 1e-300))) @ _Z_WEIGHTS)
    return np.log(np.clip(np.minimum.accumulate(tail), 1e-300, 1.0))
