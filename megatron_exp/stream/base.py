"""What every order of the base stream has in common: where a slot's content lies, and how it is read."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from megatron_exp.errors import UserError
from megatron_exp.shards.corpus import Corpus
from megatron_exp.stream.layout import Source
from megatron_exp.stream.slot import POOL, Geometry, Slot, is_pool, slot_name


class Instance(NamedTuple):
    """Where a slot's content lies: `index` counts the source's instances, `offset` the shard's tokens."""

    source: str
    epoch: int
    index: int  # type: ignore[assignment]  # shadows tuple.index, which nobody needs here
    shard: int
    offset: int


class NoiseSpec(NamedTuple):
    """Noise to add to the embeddings of a slot: words keyed by (key, slot, position, channel), times `scale`."""

    key: int
    slot: int
    scale: float


@dataclass(frozen=True, eq=False)
class Stream(ABC):
    """What the model would see without any experiment. `read` gives a fresh copy; the shards are never written.

    look_ahead: 1 where the token after an instance in its shard is the label of the last position, 0 where that label is masked out.
    """

    corpus: Corpus
    geometry: Geometry
    sources: tuple[Source, ...]
    look_ahead: ClassVar[int] = 1

    @property
    def num_slots(self) -> int:
        return self.geometry.num_slots

    @property
    @abstractmethod
    def pool_slots(self) -> int:
        """Instances set aside."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Of everything that decides which tokens are at slot k."""

    @abstractmethod
    def instance(self, slot: int) -> Instance:
        """(source, epoch, index, shard, offset) of a train or pool slot."""

    @abstractmethod
    def slots(self, source: str, index: int) -> list[int]:
        """All slots of the run (in epoch order) that hold this instance, or its one pool slot."""

    def noise(self, slot: int) -> list[NoiseSpec]:
        """No noise: that is an overlay's business."""
        del slot
        return []

    def read(self, slot: int) -> Slot:
        """The slot's tokens and loss mask; without a look-ahead token there is EOS in its place, masked out."""
        _, _, _, shard, offset = self.instance(slot)
        length = self.geometry.sequence_length
        tokens = np.empty(length + 1, dtype=np.int32)
        mask = np.ones(length, dtype=np.uint8)
        piece = self.corpus.tokens(shard)[offset : offset + length + self.look_ahead]
        tokens[: len(piece)] = piece
        if len(piece) == length:
            tokens[length] = self.corpus.eos_id
            mask[length - 1] = 0
        return Slot(tokens, mask)

    def check_slot(self, slot: int) -> None:
        """UserError for a slot that neither the run nor the pool has."""
        if is_pool(slot):
            if slot - POOL >= self.pool_slots:
                raise UserError(f"{slot_name(slot)} is outside the pool, which has {self.pool_slots} slots. Use a smaller number.")
        elif not 0 <= slot < self.num_slots:
            raise UserError(
                f"Slot {slot} is outside this run, which has {self.num_slots} slots ({self.geometry.steps} steps). Use a smaller number."
            )
