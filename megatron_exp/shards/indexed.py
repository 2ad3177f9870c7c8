r"""Megatron's IndexedDataset format, written and read without Megatron and in bounded memory.

`NAME.bin` holds the token ids of all documents, one after another. `NAME.idx` is, little-endian and packed: the magic
`MMIDIDX\0\0`, uint64 version 1, uint8 dtype code, uint64 number of sequences n, uint64 number of document borders
d + 1, then int32 lengths [n], int64 byte offsets [n] and int64 document borders [d + 1], counted in sequences. We write one
sequence per document, as Megatron's preprocess_data.py does without sentence splitting.
"""

import bisect
import struct
from array import array
from functools import cached_property
from pathlib import Path
from types import TracebackType

import numpy as np

from megatron_exp.errors import UserError
from megatron_exp.files import require_file
from megatron_exp.shards.checksums import FileSum, SummedWriter

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPE_OF_CODE: dict[int, np.dtype] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
_CODE_OF_DTYPE = {dtype: code for code, dtype in _DTYPE_OF_CODE.items()}
_MAX_LENGTH = 2**31 - 1
_PIECE = 1 << 20  # documents handled at a time where an index is made


def token_dtype(vocabulary_size: int) -> np.dtype:
    """The dtype Megatron gives to a vocabulary: uint16 below 65,500 ids, else int32 (`DType.optimal_dtype`)."""
    return np.dtype("<u2") if vocabulary_size < 65_500 else np.dtype("<i4")


def write_index(path: Path, lengths: np.ndarray, dtype: np.dtype) -> FileSum:
    """Write the .idx of documents of these lengths (int32 [num_documents], in tokens) stored as `dtype`."""
    lengths = np.asarray(lengths, dtype="<i4")
    num_documents = len(lengths)
    writer = SummedWriter(path)
    try:
        writer.write(_HEADER.pack(_MAGIC, _VERSION, _code(dtype), num_documents, num_documents + 1))
        writer.write(lengths.tobytes())
        offset = 0
        for start in range(0, num_documents, _PIECE):
            ends = offset + np.cumsum(lengths[start : start + _PIECE], dtype=np.int64) * dtype.itemsize
            writer.write(np.concatenate([[offset], ends[:-1]]).astype("<i8").tobytes())
            offset = int(ends[-1])
        for start in range(0, num_documents + 1, _PIECE):
            writer.write(np.arange(start, min(start + _PIECE, num_documents + 1), dtype="<i8").tobytes())
        return writer.finish()
    except BaseException:
        writer.abandon()
        raise


def _code(dtype: np.dtype) -> int:
    if np.dtype(dtype) not in _CODE_OF_DTYPE:
        raise ValueError(f"tokens are stored as int32 or uint16, not {dtype}")
    return _CODE_OF_DTYPE[np.dtype(dtype)]


class IndexedWriter:
    """Writes documents one after another; `close` makes .bin and then .idx durable. Keeps 4 bytes per document.

    As a context manager it closes at the end and leaves nothing behind after an error.
    """

    def __init__(self, bin_path: Path, idx_path: Path, dtype: np.dtype):
        self.dtype = np.dtype(dtype).newbyteorder("<")
        _code(self.dtype)
        self.bin_sum: FileSum | None = None
        self.idx_sum: FileSum | None = None
        self._idx_path = Path(idx_path)
        self._bin = SummedWriter(bin_path)
        self._lengths = array("i")

    @property
    def num_documents(self) -> int:
        return len(self._lengths)

    @property
    def num_bytes(self) -> int:
        """Bytes of tokens written so far."""
        return self._bin.num_bytes

    def add(self, tokens: np.ndarray) -> None:
        """Append one document (integer ids, one dimension)."""
        ids = np.asarray(tokens)
        if ids.dtype != self.dtype and ids.size:
            limits = np.iinfo(self.dtype)
            if not (limits.min <= ids.min() and ids.max() <= limits.max):
                raise ValueError(f"token ids from {ids.min()} to {ids.max()} do not fit {self.dtype}")
        if len(ids) > _MAX_LENGTH:
            raise _too_long(len(ids))
        self.add_stored(np.ascontiguousarray(ids, dtype=self.dtype).data)
        self._lengths.append(len(ids))

    def add_stored(self, data: bytes | memoryview) -> None:
        """Append tokens that are already stored as this dtype; their documents are declared with `add_lengths`."""
        self._bin.write(data)

    def add_lengths(self, lengths: np.ndarray) -> None:
        """Declare the next documents by their numbers of tokens."""
        if len(lengths) and int(np.max(lengths)) > _MAX_LENGTH:
            raise _too_long(int(np.max(lengths)))
        self._lengths.frombytes(np.asarray(lengths, dtype=np.int32).tobytes())

    def close(self) -> None:
        """Make both files durable; AssertionError where tokens and lengths do not add up."""
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        total = int(lengths.sum(dtype=np.int64)) * self.dtype.itemsize
        assert total == self._bin.num_bytes, f"{self._bin.path}: lengths declare {total} bytes, {self._bin.num_bytes} were written"
        self.bin_sum = self._bin.finish()
        self.idx_sum = write_index(self._idx_path, lengths, self.dtype)

    def abandon(self) -> None:
        """Drop what was written."""
        self._bin.abandon()

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


def _too_long(length: int) -> ValueError:
    return ValueError(f"a document of {length} tokens does not fit the format, whose lengths are int32")


class IndexedReader:
    """An indexed dataset on disk. Opening costs the same whatever its size; tokens and index are memory-mapped.

    Raises:
        UserError: A file is missing, is not in this format, or its length disagrees with the index; the message names it.
    """

    def __init__(self, prefix: Path):
        self.bin_path = require_file(Path(f"{prefix}.bin"), "the tokens of an indexed dataset")
        self.idx_path = require_file(Path(f"{prefix}.idx"), "the index of an indexed dataset")
        self.dtype, self._num_sequences, num_borders = self._header()
        self.num_documents = num_borders - 1
        lengths_end = _HEADER.size + 4 * self._num_sequences
        pointers_end = lengths_end + 8 * self._num_sequences
        self._require_size(self.idx_path, pointers_end + 8 * num_borders)
        self._lengths = self._map("<i4", _HEADER.size, self._num_sequences)
        self._pointers = self._map("<i8", lengths_end, self._num_sequences)
        self._borders = self._map("<i8", pointers_end, num_borders)
        last = int(self._pointers[-1]) + int(self._lengths[-1]) * self.dtype.itemsize if self._num_sequences else 0
        self._require_size(self.bin_path, last)
        self.num_tokens = last // self.dtype.itemsize

    def _header(self) -> tuple[np.dtype, int, int]:
        with open(self.idx_path, "rb") as file:
            raw = file.read(_HEADER.size)
        if len(raw) < _HEADER.size or raw[: len(_MAGIC)] != _MAGIC:
            raise UserError(
                f"{self.idx_path} is not the index of a Megatron indexed dataset (its first bytes are {raw[:9]!r}). Check the path, or make it again."
            )
        _, version, code, num_sequences, num_borders = _HEADER.unpack(raw)
        if version != _VERSION or code not in _DTYPE_OF_CODE or num_borders < 1:
            raise UserError(
                f"{self.idx_path} has version {version} and dtype code {code}; version 1 with int32 (4) or uint16 (8) tokens is read. "
                "The file is damaged or from another tool: make it again."
            )
        return np.dtype(_DTYPE_OF_CODE[code]), int(num_sequences), int(num_borders)

    def _require_size(self, path: Path, expected: int) -> None:
        actual = path.stat().st_size
        if actual != expected:
            raise UserError(
                f"{path} has {actual} bytes where its index says {expected}. It is cut short, damaged or belongs to another index: restore it or make it again."
            )

    def _map(self, dtype: str, offset: int, count: int) -> np.ndarray:
        if not count:
            return np.empty(0, dtype=dtype)
        return plain_map(np.memmap(self.idx_path, dtype=dtype, mode="r", offset=offset, shape=(count,)))

    @cached_property
    def tokens(self) -> np.ndarray:
        """Memory map of all token ids, read-only, [num_tokens]."""
        return open_tokens(self.bin_path, self.dtype, self.num_tokens)

    @cached_property
    def starts(self) -> np.ndarray:
        """int64 [num_documents + 1]: first token of each document, and the number of tokens."""
        pointers = np.append(np.asarray(self._pointers), self.num_tokens * self.dtype.itemsize)
        if pointers[0] != 0 or np.any(np.diff(pointers) != np.asarray(self._lengths, dtype=np.int64) * self.dtype.itemsize):
            raise UserError(
                f"{self.idx_path}: lengths and offsets contradict each other. The index is damaged: restore it or make it again."
            )
        if self._borders[0] != 0 or self._borders[-1] != self._num_sequences or np.any(np.diff(self._borders) < 0):
            raise UserError(f"{self.idx_path}: the document borders are not in order. The index is damaged: restore it or make it again.")
        return pointers[self._borders] // self.dtype.itemsize

    def document_of(self, token: int) -> tuple[int, int]:
        """The document that holds this token, and its first token: by bisection of the mapped index, which is not read whole. IndexError outside."""
        if not 0 <= token < self.num_tokens:
            raise IndexError(f"token {token} of {self.num_tokens} in {self.bin_path}")
        # numpy's own search would copy the mapped columns, which the format does not align.
        sequence = bisect.bisect_right(self._pointers, token * self.dtype.itemsize) - 1
        document = bisect.bisect_right(self._borders, sequence) - 1
        return document, int(self._pointers[int(self._borders[document])]) // self.dtype.itemsize

    def document(self, index: int) -> np.ndarray:
        """Token ids of one document (a view of the map)."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents} in {self.idx_path}")
        first, last = int(self._borders[index]), int(self._borders[index + 1])
        start = int(self._pointers[first]) // self.dtype.itemsize if first < last else 0
        length = int(self._lengths[first]) if last == first + 1 else int(self._lengths[first:last].sum(dtype=np.int64))
        return self.tokens[start : start + length]


def open_tokens(path: Path, dtype: np.dtype, num_tokens: int) -> np.ndarray:
    """Memory-map a .bin file, read-only; UserError where it is missing or has another length."""
    path = require_file(path, "the tokens of a shard")
    expected, actual = num_tokens * dtype.itemsize, path.stat().st_size
    if actual != expected:
        raise UserError(
            f"{path} has {actual} bytes where {expected} are recorded. It is cut short or was replaced: restore it, or make the corpus again."
        )
    return plain_map(np.memmap(path, dtype=dtype, mode="r")) if num_tokens else np.empty(0, dtype=dtype)


def plain_map(mapped: np.ndarray) -> np.ndarray:
    """The same map without its subclass, which makes every slice and every element of it several times dearer."""
    return mapped.view(np.ndarray)
