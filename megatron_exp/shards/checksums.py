"""Checksums per block: a file's xxh3_64 of every MiB, and one root over them, so that damage is found and placed."""

import os
import tokenize
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from megatron_exp import fingerprint
from megatron_exp.errors import UserError
from megatron_exp.files import DurableWriter, durable_file

BLOCK_BYTES = 1 << 20
"""Bytes under one checksum; part of the format, because roots depend on it."""

ARRAY_ERRORS = (OSError, ValueError, EOFError, MemoryError, SyntaxError, tokenize.TokenError)
"""What `numpy.load` raises for a damaged file: its header is Python source."""

_BLOCKS_PER_TASK = 32


def root_of(sums: np.ndarray) -> str:
    """The root hash of a file: a fingerprint over its block sums (uint64, in file order)."""
    return fingerprint.of_array(np.asarray(sums, dtype=np.uint64))


class BlockSums:
    """Block sums of a byte stream that arrives in pieces of any size."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._sums: list[int] = []
        self._block = xxhash.xxh3_64()

    def update(self, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        while len(view):
            room = BLOCK_BYTES - self.num_bytes % BLOCK_BYTES
            piece = view[:room]
            self._block.update(piece)
            self.num_bytes += len(piece)
            if len(piece) == room:
                self._close_block()
            view = view[room:]

    def _close_block(self) -> None:
        self._sums.append(self._block.intdigest())
        self._block.reset()

    def finish(self) -> np.ndarray:
        """uint64 [ceil(num_bytes / BLOCK_BYTES)]; the last block may be short. Call once, after the last byte."""
        if self.num_bytes % BLOCK_BYTES:
            self._close_block()
        return np.array(self._sums, dtype=np.uint64)


@dataclass(frozen=True, eq=False)
class FileSum:
    """What is recorded of a file: its length and the root over `sums`."""

    num_bytes: int
    sums: np.ndarray

    @property
    def root(self) -> str:
        return root_of(self.sums)

    def as_record(self) -> dict[str, int | str]:
        return {"bytes": self.num_bytes, "root": self.root}


class SummedWriter:
    """A durable file whose block sums are made while it is written. Also the sink that pyarrow writes Parquet into.

    Small writes, of which pyarrow makes hundreds, are gathered into blocks.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.closed = False
        self.num_bytes = 0
        self._writer = DurableWriter(self.path)
        self._sums = BlockSums()
        self._waiting = bytearray()

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        self.num_bytes += len(view)
        if len(self._waiting) + len(view) < BLOCK_BYTES:
            self._waiting += view
        else:
            self._pass_on()
            self._sums.update(view)
            self._writer.write(view)
        return len(view)

    def _pass_on(self) -> None:
        if self._waiting:
            gathered = bytes(self._waiting)
            self._sums.update(gathered)
            self._writer.write(gathered)
            self._waiting.clear()

    def tell(self) -> int:
        return self.num_bytes

    def flush(self) -> None:
        """Nothing to do before `finish`: pyarrow asks for it, durability comes from closing."""

    def finish(self) -> FileSum:
        """Make the file durable and visible under its name."""
        self._pass_on()
        self._writer.close()
        self.closed = True
        return FileSum(self.num_bytes, self._sums.finish())

    def abandon(self) -> None:
        """Drop what was written; does nothing after `finish`."""
        if not self.closed:
            self._writer.abandon()
            self.closed = True


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file durably."""
    with durable_file(path) as writer:
        np.lib.format.write_array(writer, array, allow_pickle=False)


def file_sum(path: Path) -> FileSum:
    """Of a file as it is now."""
    return FileSum(path.stat().st_size, sums_of_file(path))


def sums_of_file(path: Path, *, threads: int = 1) -> np.ndarray:
    """uint64 block sums of a file as it is now. Reading and hashing both leave the interpreter, so threads share the work."""
    num_blocks = -(-path.stat().st_size // BLOCK_BYTES)
    sums = np.empty(num_blocks, dtype=np.uint64)
    with open(path, "rb", buffering=0) as file, ThreadPoolExecutor(threads) as pool:

        def work(start: int) -> None:
            buffer = bytearray(BLOCK_BYTES)
            for block in range(start, min(start + _BLOCKS_PER_TASK, num_blocks)):
                sums[block] = xxhash.xxh3_64_intdigest(_read_block(file.fileno(), block, buffer))

        list(pool.map(work, range(0, num_blocks, _BLOCKS_PER_TASK)))
    return sums


def _read_block(descriptor: int, block: int, buffer: bytearray) -> memoryview:
    """One block, read into the buffer; the system may give less than was asked for."""
    view, filled = memoryview(buffer), 0
    while filled < BLOCK_BYTES and (num := os.preadv(descriptor, [view[filled:]], block * BLOCK_BYTES + filled)):
        filled += num
    return view[:filled]


def read_checked(path: Path, start: int, stop: int, sums: np.ndarray) -> Iterator[memoryview]:
    """Bytes [start, stop) of a file, every block they touch compared with its sum before it is handed out.

    Raises:
        UserError: A block differs from its sum, or the file ends early.
    """
    first = start // BLOCK_BYTES
    with open(path, "rb", buffering=0) as file:
        for block_index in range(first, -(-stop // BLOCK_BYTES)):
            offset = block_index * BLOCK_BYTES
            file.seek(offset)
            block = file.read(BLOCK_BYTES)
            if xxhash.xxh3_64_intdigest(block) != int(sums[block_index]):
                raise UserError(
                    f"{path} was changed or damaged after it was written: the block at byte {offset} no longer agrees with its checksum. "
                    "Remove this file and run the same command again; only its input is read again."
                )
            yield memoryview(block)[max(start - offset, 0) : stop - offset]
