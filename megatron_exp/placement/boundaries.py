"""Where documents begin inside slots, from the index of the shards."""

from functools import lru_cache

import numpy as np

from megatron_exp.stream.base import Stream

_SLOTS_KEPT = 1 << 16


class DocumentBoundaries:
    """Callable: the offsets in [0, S) of a slot at which a document begins; 0 only where one begins with the slot."""

    def __init__(self, stream: Stream):
        self._stream = stream
        self._of = lru_cache(maxsize=_SLOTS_KEPT)(self._look_up)

    def __call__(self, slot: int) -> np.ndarray:
        """int64, rising, of the slot's base content."""
        return self._of(slot)

    def _look_up(self, slot: int) -> np.ndarray:
        _, _, _, shard, offset = self._stream.instance(slot)
        starts = self._stream.corpus.document_starts(shard)
        first, end = np.searchsorted(starts, [offset, offset + self._stream.geometry.sequence_length])
        return np.unique(starts[first:end]) - offset  # empty documents share their beginning with the next one
