"""The base stream in keyed order: arithmetic instead of an index file."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_exp import fingerprint, seeding
from megatron_exp.config.schema import Config
from megatron_exp.errors import UserError
from megatron_exp.shards.corpus import Corpus
from megatron_exp.stream.base import Instance, Stream
from megatron_exp.stream.layout import Source, lay_out
from megatron_exp.stream.permutation import Permutation
from megatron_exp.stream.slot import POOL, Geometry, is_pool


@dataclass(frozen=True, eq=False)
class KeyedStream(Stream):
    """Slots in keyed order, over several epochs of every source. first_slot: place of the order that is slot 0 of the run."""

    order_seed: int
    first_slot: int = 0

    @classmethod
    def open(cls, config: Config, corpus: Corpus) -> "KeyedStream":
        """The stream of a config over its corpus; UserError where the corpus is too small for the run."""
        geometry = Geometry(**config.geometry.model_dump())
        sources = lay_out(corpus, config.corpus.sources, geometry.sequence_length, config.pool.slots)
        stream = cls(corpus, geometry, sources, config.seeds.order, config.corpus.first_slot)
        rest = max(stream.num_indices - stream.first_slot, 0)
        if rest < geometry.num_slots:
            beginning = f" and the first {stream.first_slot} of its order" if stream.first_slot else ""
            raise UserError(
                f"The run needs {geometry.num_slots} slots ({geometry.steps} steps of {geometry.global_batch_size}), but the corpus gives only "
                f"{rest} after a pool of {stream.pool_slots}{beginning}. Train at most {rest // geometry.global_batch_size} steps, "
                "shrink the pool, raise the epochs in corpus.sources, or add text."
            )
        return stream

    @property
    def num_indices(self) -> int:
        """Size of the index space; the run uses the first `num_slots` of its order."""
        return sum(source.num_indices for source in self.sources)

    @property
    def pool_slots(self) -> int:
        return sum(source.num_pool for source in self.sources)

    @property
    def fingerprint(self) -> str:
        """Of everything that decides which tokens are at slot k (not of how many steps the run has)."""
        begins = {"first_slot": self.first_slot} if self.first_slot else {}
        return fingerprint.of_json(
            {
                "order": "keyed",
                "corpus": self.corpus.fingerprint,
                "seed": self.order_seed,
                "sequence_length": self.geometry.sequence_length,
                "sources": [[source.name, source.num_epochs, source.num_pool] for source in self.sources],
                **begins,
            }
        )

    def instance(self, slot: int) -> Instance:
        """(source, epoch, index, shard, offset) of a train or pool slot."""
        self.check_slot(slot)
        source, epoch, rank = self._pool_place(slot - POOL) if is_pool(slot) else self._train_place(slot)
        index = int(self._permutation(source).forward(rank))
        shard = int(np.searchsorted(source.shard_starts, index, side="right")) - 1
        offset = (index - int(source.shard_starts[shard])) * self.geometry.sequence_length
        return Instance(source.name, epoch, index, source.shards[shard], offset)

    def slots(self, source: str, index: int) -> list[int]:
        """All slots of the run (in epoch order) that hold this instance, or its one pool slot."""
        place = next(candidate for candidate in self.sources if candidate.name == source)
        rank = int(self._permutation(place).inverse(index))
        if rank < place.num_pool:
            return [POOL + int(self._pool_order.inverse(place.pool_base + rank))]
        first = rank - place.num_pool
        indices = np.arange(first, place.num_indices, place.num_rest, dtype=np.uint64) + np.uint64(place.base)
        places = (int(place) - self.first_slot for place in self._order.inverse(indices))
        return [slot for slot in places if 0 <= slot < self.num_slots]

    def _train_place(self, slot: int) -> tuple[Source, int, int]:
        index = int(self._order.forward(self.first_slot + slot))
        source = next(s for s in reversed(self.sources) if s.base <= index and s.num_indices)
        epoch, rank = divmod(index - source.base, source.num_rest)
        return source, epoch, source.num_pool + rank

    def _pool_place(self, place: int) -> tuple[Source, int, int]:
        index = int(self._pool_order.forward(place))
        source = next(s for s in reversed(self.sources) if s.pool_base <= index and s.num_pool)
        return source, 0, index - source.pool_base

    @cached_property
    def _order(self) -> Permutation:
        return Permutation(self.num_indices, seeding.key(self.order_seed, "order"))

    @cached_property
    def _pool_order(self) -> Permutation:
        return Permutation(self.pool_slots, seeding.key(self.order_seed, "pool"))

    def _permutation(self, source: Source) -> Permutation:
        return self._permutations[source.name]

    @cached_property
    def _permutations(self) -> dict[str, Permutation]:
        return {s.name: Permutation(s.num_instances, seeding.key(self.order_seed, "source", s.name)) for s in self.sources}
