"""The data feed: the rows of a step for this process, read one step ahead by a thread."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from megatron_exp.errors import UserError
from megatron_exp.model.step import MicroBatch
from megatron_exp.stream.base import Instance, NoiseSpec
from megatron_exp.stream.slot import Geometry, Slot, slot_name


class Stream(Protocol):
    """What the feed needs of a stream or an overlay."""

    @property
    def geometry(self) -> Geometry: ...

    def read(self, slot: int) -> Slot: ...

    def noise(self, slot: int) -> list[NoiseSpec]: ...

    def instance(self, slot: int) -> Instance: ...


@dataclass(frozen=True, eq=False)
class Batch:
    """This process's part of a step, in the order it goes through the model.

    slots: their ids [n]. tokens: int64 [n, S + 1] and loss_mask: uint8 [n, S] are the very memory that `micro_batches` show the model; they
    have no rows on a process that reads no data.
    """

    step: int
    slots: list[int]
    tokens: np.ndarray
    loss_mask: np.ndarray
    micro_batches: list[MicroBatch]


class Feed:
    """Hands out the batches of consecutive steps; while one is trained on, a thread reads the next.

    Args:
        stream: the overlay, or the bare stream for a baseline.
        rows: for each micro-batch the rows of the global batch that this process reads.
        vocabulary_size: ids from here on have no embedding.
        shard_names: what the corpus calls its shards, for messages.
        reads: False on a process that needs to know which slots a step has, and not what is in them (`Layout.reads_data`).
        frontier: the step up to which may be read ahead, where that is not the end; it moves while training.
    """

    def __init__(
        self,
        stream: Stream,
        rows: Sequence[range],
        vocabulary_size: int,
        shard_names: Sequence[str],
        reads: bool = True,
        frontier: Callable[[], int] | None = None,
    ):
        self._stream = stream
        self._rows = rows
        self._vocabulary_size = vocabulary_size
        self._shard_names = shard_names
        self._reads = reads
        self._frontier = frontier or (lambda: stream.geometry.steps)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="feed")
        self._ahead: tuple[int, Future[Batch]] | None = None
        self.wait_seconds = 0.0
        """How long the last `batch` call waited for data."""

    def batch(self, step: int) -> Batch:
        """The batch of STEP; reading of the next one begins."""
        begin = time.perf_counter()
        asked = self._ahead[1] if self._ahead and self._ahead[0] == step else self._reader.submit(self._read, step)
        batch = asked.result()
        following = step + 1
        self._ahead = (following, self._reader.submit(self._read, following)) if following < self._frontier() else None
        self.wait_seconds = time.perf_counter() - begin
        return batch

    def close(self) -> None:
        """Stop the thread."""
        self._reader.shutdown(wait=True, cancel_futures=True)

    def _read(self, step: int) -> Batch:
        first = self._stream.geometry.slots_of_step(step)[0]
        slots = [first + row for rows in self._rows for row in rows]
        if not self._reads:
            return self._without_content(step, slots)
        contents = [self._stream.read(slot) for slot in slots]
        tokens = np.stack([content.tokens for content in contents]).astype(np.int64)
        loss_mask = np.stack([content.loss_mask for content in contents])
        refuse_unknown_ids(self._stream, slots, tokens, self._vocabulary_size, self._shard_names)
        return Batch(step, slots, tokens, loss_mask, self._micro_batches(slots, tokens, loss_mask))

    def _without_content(self, step: int, slots: list[int]) -> Batch:
        length = self._stream.geometry.sequence_length
        shapes = [MicroBatch(torch.empty((len(rows), length + 1), device="meta"), torch.empty((len(rows), length), device="meta")) for rows in self._rows]
        return Batch(step, slots, np.empty((0, length + 1), np.int64), np.empty((0, length), np.uint8), shapes)

    def _micro_batches(self, slots: list[int], tokens: np.ndarray, loss_mask: np.ndarray) -> list[MicroBatch]:
        result, begin = [], 0
        for rows in self._rows:
            part = slice(begin, begin + len(rows))
            noise = [self._stream.noise(slot) for slot in slots[part]]
            result.append(MicroBatch(torch.from_numpy(tokens[part]), torch.from_numpy(loss_mask[part]), noise))
            begin += len(rows)
        return result


def refuse_unknown_ids(stream: Stream, slots: Sequence[int], tokens: np.ndarray, vocabulary_size: int, shard_names: Sequence[str]) -> None:
    """UserError with slot, shard and offset where tokens [len(slots), S + 1] hold an id that has no embedding.

    On a GPU such an id ends in an assertion that names nothing and poisons the device.
    """
    wrong = np.argwhere((tokens < 0) | (tokens >= vocabulary_size))
    if not len(wrong):
        return
    row, position = (int(index) for index in wrong[0])
    slot = slots[row]
    place = stream.instance(slot)
    raise UserError(
        f"Slot {slot_name(slot)} holds the token id {tokens[row, position]} at position {position}, but the model has {vocabulary_size} ids. Its base content "
        f"begins at token {place.offset} of shard {shard_names[place.shard]}. The shard is damaged, or what an experiment puts into the slot is: run "
        "`megatron-exp verify` on corpus and manifest."
    )
