"""Correction for testing several outcomes of one family."""

from collections.abc import Sequence

import numpy as np


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's step-down adjusted p-values, float64 [n], in the given order (Scand. J. Statist. 6, 1979).

    A NaN stands for a pre-registered test that could not be done: it keeps its place in the family (counted as p = 1, so that nobody
    gains from losing a test) and stays NaN.
    """
    p = np.asarray(p_values, dtype=np.float64)
    counted = np.where(np.isnan(p), 1.0, p)
    order = np.argsort(counted, kind="stable")
    stepped = np.maximum.accumulate(counted[order] * (len(p) - np.arange(len(p))))
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(stepped, 1.0)
    return np.where(np.isnan(p), np.nan, adjusted)
