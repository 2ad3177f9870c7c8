"""The payload store: token sequences kept once, as an indexed dataset beside the manifest's tables."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import xxhash

from megatron_exp.shards.indexed import IndexedReader, IndexedWriter

_TOKENS = np.dtype("<i4")
BIN_NAME, IDX_NAME, PREFIX = "payloads.bin", "payloads.idx", "payloads"


def payload_hash(tokens: np.ndarray) -> bytes:
    """16 bytes: xxh3_128 of the ids as little-endian int32."""
    return xxhash.xxh3_128_digest(np.ascontiguousarray(tokens, dtype=_TOKENS).data)


def stored_hashes(payloads: IndexedReader) -> list[bytes]:
    """The hashes of all payloads of a store, in order."""
    data = np.ascontiguousarray(payloads.tokens, dtype=_TOKENS).data.cast("B")
    borders = (payloads.starts * _TOKENS.itemsize).tolist()
    return [xxhash.xxh3_128_digest(data[start:end]) for start, end in pairwise(borders)]


class PayloadStore:
    """Collects token sequences and numbers them; equal sequences share a number. Writes to `directory` as it goes."""

    def __init__(self, directory: Path):
        self._writer = IndexedWriter(directory / BIN_NAME, directory / IDX_NAME, np.dtype(np.int32))
        self._numbers: dict[bytes, int] = {}

    def add(self, tokens: np.ndarray) -> int:
        """The number of this sequence (int32 ids)."""
        digest = payload_hash(tokens)
        number = self._numbers.get(digest)
        if number is None:
            number = self._numbers[digest] = len(self._numbers)
            self._writer.add(np.asarray(tokens, dtype=np.int32))
        return number

    def _hashes(self) -> list[bytes]:
        return list(self._numbers)

    def close(self) -> list[bytes]:
        """Finish the files; the hashes of all sequences in order."""
        self._writer.close()
        return self._hashes()


def open_payloads(directory: Path) -> IndexedReader:
    """The payload store of a manifest; document i is payload i."""
    return IndexedReader(directory / PREFIX)
