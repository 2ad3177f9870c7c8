"""The power law of forgetting, fitted without starting values."""

from typing import NamedTuple

import numpy as np

_TIMES_PER_DECADE = 20
_EXPONENTS = np.linspace(0.05, 4.0, 80)
_FEWEST_POINTS = 4


class PowerLaw(NamedTuple):
    """gain(t) = amplitude (1 + t / time)^(-exponent); NaN where fewer than four points were given."""

    amplitude: float
    time: float
    exponent: float


def fit_power_law(elapsed: np.ndarray, gain: np.ndarray) -> PowerLaw:
    """Least squares over a grid of times (a tenth of the smallest to ten times the largest) and exponents (0.05 to 4).

    The amplitude is linear and solved for, so the fit has no starting value and no local minimum to miss. elapsed: float64 [n] updates
    since the reference point, >= 0. A value at the end of the grid says the data do not identify the parameter.
    """
    positive = elapsed[elapsed > 0]
    if len(elapsed) < _FEWEST_POINTS or not len(positive):
        return PowerLaw(float("nan"), float("nan"), float("nan"))
    first, last = np.log10(positive.min() / 10.0), np.log10(positive.max() * 10.0)
    times = np.logspace(first, last, int((last - first) * _TIMES_PER_DECADE) + 1)
    shape = (1.0 + elapsed[None, None, :] / times[:, None, None]) ** -_EXPONENTS[None, :, None]
    amplitude = (shape * gain).sum(-1) / (shape**2).sum(-1)
    error = ((gain - amplitude[..., None] * shape) ** 2).sum(-1)
    i, j = np.unravel_index(int(np.argmin(error)), error.shape)
    return PowerLaw(float(amplitude[i, j]), float(times[i]), float(_EXPONENTS[j]))
