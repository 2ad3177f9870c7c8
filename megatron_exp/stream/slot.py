"""What a training sample is, and how samples are counted."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

POOL = 1 << 63
"""Bit that marks a slot id as a place in the pool: `POOL + q` is pool slot q. Independent of the geometry."""


class Slot(NamedTuple):
    """One training sample.

    tokens: int32 [S + 1], S inputs and one look-ahead token that is only ever a label; the label of position i is
    tokens[i + 1]. loss_mask: uint8 [S], 1 where the loss of position i counts.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray


@dataclass(frozen=True)
class Geometry:
    """Sequence length S, global batch size and number of steps of a run. Steps and rows count from 0.

    A model state is named by the number of updates done: state t has seen the slots of steps 0 .. t-1, so the batch of
    step s is first visible in state s + 1.
    """

    sequence_length: int
    global_batch_size: int
    steps: int

    @property
    def num_slots(self) -> int:
        return self.global_batch_size * self.steps

    @property
    def num_tokens(self) -> int:
        return self.num_slots * self.sequence_length

    def step(self, slot: int) -> int:
        return slot // self.global_batch_size

    def row(self, slot: int) -> int:
        return slot % self.global_batch_size

    def slots_of_step(self, step: int) -> range:
        return range(step * self.global_batch_size, (step + 1) * self.global_batch_size)


def pool_slot(index: int) -> int:
    """The slot id of the pool's place `index`."""
    return POOL + index


def is_pool(slot: int) -> bool:
    """Whether a slot id names a place in the pool."""
    return slot >= POOL


def slot_name(slot: int) -> str:
    """How people read a slot id: `1234`, or `pool:17`."""
    return f"pool:{slot - POOL}" if is_pool(slot) else str(slot)
