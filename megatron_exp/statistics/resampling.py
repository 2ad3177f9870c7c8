"""Sign flips over pairs and bootstraps over clusters; every draw is keyed."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from megatron_exp.seeding import Words
from megatron_exp.statistics.normal import Interval, Side, p_of_z
from megatron_exp.statistics.ranks import monte_carlo_p

_EXACT_PAIRS = 16
_MOST_DRAWN_PAIRS = 200
_FLIP_SLACK = 1e-12


class SignFlipTest(NamedTuple):
    """mean of the differences, p, and how p was found."""

    mean: float
    p: float
    method: str


def sign_flip_test(differences: np.ndarray, side: Side, words: Words, num_draws: int = 99_999) -> SignFlipTest:
    """Randomisation test of pairs in which a fair coin decided who is treated (Fisher, "The Design of Experiments", 1935).

    Under the null every difference d_j (treated minus control) is as likely as -d_j. All 2^n sign patterns are counted
    for up to 16 pairs, so the smallest one-sided p is 2^-n; more pairs take `num_draws` keyed patterns, more than 200 the normal
    approximation z = sum d / sqrt(sum d^2), whose variance is that over all patterns.
    """
    n, total = len(differences), float(np.sum(differences))
    if n == 0:
        return SignFlipTest(float("nan"), float("nan"), "no pairs")
    if n > _MOST_DRAWN_PAIRS:
        spread = float(np.sqrt(np.sum(np.square(differences))))
        return SignFlipTest(
            total / n, p_of_z(total / spread if spread else 0.0, side), f"sign-flip test over {n} pairs, normal approximation"
        )
    if n > _EXACT_PAIRS:
        signs = _keyed_signs(words.child("sign-flips"), num_draws, n)
        return SignFlipTest(total / n, monte_carlo_p(total, signs @ differences, side), f"sign-flip test over {n} pairs, {num_draws} draws")
    patterns = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    sums = patterns @ differences
    slack = _FLIP_SLACK * float(np.abs(differences).sum())
    extreme = {"greater": sums >= total - slack, "less": sums <= total + slack, "two-sided": np.abs(sums) >= abs(total) - slack}[side]
    return SignFlipTest(total / n, float(extreme.mean()), f"exact sign-flip test over {n} pairs")


def _keyed_signs(words: Words, num_draws: int, num: int) -> np.ndarray:
    """float64 [num_draws, num] of +1 and -1, 64 to a word."""
    per_draw = -(-num // 64)
    packed = words.words(num_draws * per_draw).reshape(num_draws, per_draw).astype("<u8").view(np.uint8)
    return 1.0 - 2.0 * np.unpackbits(packed, axis=1)[:, :num]


def cluster_bootstrap(
    clusters: np.ndarray, statistic: Callable[[np.ndarray], float], words: Words, level: float = 0.95, num_draws: int = 1_000
) -> Interval:
    """Percentile interval of `statistic(rows)`, rows being drawn as whole clusters with replacement.

    clusters: int [n], cluster of each row; every row of a cluster drawn k times occurs k times. With few clusters (below about 20)
    such an interval is too narrow; print the values instead. Source: Davison and Hinkley, "Bootstrap Methods" (1997), ch. 3.8.
    """
    members = [np.flatnonzero(clusters == cluster) for cluster in np.unique(clusters)]
    chosen = words.child("clusters").integers(num_draws * len(members), len(members)).reshape(num_draws, len(members))
    draws = np.array([statistic(np.concatenate([members[c] for c in row])) for row in chosen])
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))
