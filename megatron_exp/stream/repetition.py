"""AI2's repetition filter: instances on which OLMo 2 was not trained because they repeat themselves.

OLMo's loader gives an instance no loss at all where a block of 1 to 13 tokens stands at least 32 times in a row (allenai/OLMo,
olmo/data/util.py `find_periodic_sequences` and MemMapDataset; `instance_filter` of the OLMo-2 configurations). A block of period p stands k times
in a row exactly where (k - 1) * p consecutive tokens equal the token p places before, which is what is looked for here.
"""

from functools import lru_cache

import numpy as np

MAX_PERIOD, MIN_COUNT = 13, 32

_NUM_SAMPLES = 4
"""How many of the sampled positions every run that is long enough contains, whatever its period and place."""


def is_repetitive(tokens: np.ndarray) -> bool:
    """Whether a block of 1 to MAX_PERIOD tokens stands at least MIN_COUNT times in a row in `tokens` (integers, one dimension)."""
    return _may_be_repetitive(tokens) and any(_stands_often(tokens, period) for period in range(1, MAX_PERIOD + 1))


def _may_be_repetitive(tokens: np.ndarray) -> bool:
    """A look at a tenth of the pairs of tokens, which almost all text ends; never false where `is_repetitive` is true."""
    here, before = _samples(len(tokens))
    agrees = tokens[here] == tokens[before]
    num_windows = max(len(agrees) - _NUM_SAMPLES + 1, 0)
    together = agrees[:num_windows]
    for shift in range(1, _NUM_SAMPLES):
        together = together & agrees[shift : shift + num_windows]
    return bool(together.any())


@lru_cache(maxsize=8)
def _samples(length: int) -> tuple[np.ndarray, np.ndarray]:
    """(positions, the same minus their period), period by period: of period p, the multiples of a quarter of the shortest run of interest."""
    here, before = [], []
    for period in range(1, MAX_PERIOD + 1):
        stride = (MIN_COUNT - 1) * period // _NUM_SAMPLES
        positions = np.arange(-(-period // stride) * stride, length, stride)
        here.append(positions)
        before.append(positions - period)
    return np.concatenate(here), np.concatenate(before)


def _stands_often(tokens: np.ndarray, period: int) -> bool:
    """Whether (MIN_COUNT - 1) * period consecutive tokens equal the token `period` places before."""
    differs = np.flatnonzero(tokens[period:] != tokens[:-period])
    borders = np.concatenate([[-1], differs, [len(tokens) - period]])
    return bool(np.diff(borders).max() - 1 >= (MIN_COUNT - 1) * period)
