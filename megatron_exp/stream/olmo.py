"""The base stream in AI2's order: the samples of OLMo 2's first epoch, in the order in which OLMo's trainer consumed them.

Every shard, one of AI2's files, is cut into whole instances and its tail dropped; the instances of all shards, in corpus order, are shuffled as
allenai/OLMo does (olmo/data/iterable_dataset.py). The result is kept in a file, headless little-endian uint32, which is the layout and, for the same
files, the content of OLMo's own `global_indices.npy`. The file with its checksum is the truth, not the generator that made it. The
slots of the run are its first entries; the pool are the entries right after them: later batches of the same shuffled stream.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from megatron_exp import fingerprint
from megatron_exp.config.schema import Config
from megatron_exp.errors import UserError
from megatron_exp.files import require_file
from megatron_exp.shards.checksums import root_of, sums_of_file
from megatron_exp.shards.corpus import Corpus
from megatron_exp.shards.indexed import plain_map
from megatron_exp.stream.base import Instance, Stream
from megatron_exp.stream.layout import Source, lay_out
from megatron_exp.stream.repetition import is_repetitive
from megatron_exp.stream.slot import POOL, Geometry, Slot, is_pool

ORDER_NAME = "order.u32"
_DTYPE = np.dtype("<u4")
_PIECE = 1 << 24


class OrderFile(NamedTuple):
    """The stored order. root: over the sums of its blocks (`shards.checksums`), as the manifest records it."""

    path: Path
    root: str


@dataclass(frozen=True, eq=False)
class OlmoStream(Stream):
    """Slots in AI2's order. order: uint32 [num_instances], memory-mapped: number of the instance in corpus order.

    first_slot: its entry that is slot 0 of the run.
    """

    num_pool: int
    order: np.ndarray
    order_root: str
    first_slot: int = 0
    look_ahead: ClassVar[int] = 0  # AI2 cuts instances of S tokens: the last one has no label

    @classmethod
    def open(cls, config: Config, corpus: Corpus, order_file: OrderFile | None) -> "OlmoStream":
        """The stream of a config over its corpus and a stored order; UserError where the file is missing, damaged or of another corpus."""
        if order_file is None:
            raise UserError(
                "corpus.order is olmo, but the manifest holds no stored order: it was planned with another one. Plan the manifest again."
            )
        sources = _sources(config, corpus)
        num_instances = sum(source.num_instances for source in sources)
        order = _open_order(order_file, num_instances)
        geometry = Geometry(**config.geometry.model_dump())
        return cls(corpus, geometry, sources, config.pool.slots, order, order_file.root, config.corpus.first_slot)

    @property
    def pool_slots(self) -> int:
        return self.num_pool

    @property
    def fingerprint(self) -> str:
        """Of everything that decides which tokens are at slot k; with a pool also of the number of slots before it."""
        begins = {"first_slot": self.first_slot} if self.first_slot else {}
        return fingerprint.of_json(
            {
                "order": "olmo",
                "corpus": self.corpus.fingerprint,
                "order_file": self.order_root,
                "sequence_length": self.geometry.sequence_length,
                "sources": [source.name for source in self.sources],
                "pool": [self.num_slots, self.num_pool] if self.num_pool else None,
                **begins,
            }
        )

    def instance(self, slot: int) -> Instance:
        """(source, epoch 0, index, shard, offset) of a train or pool slot."""
        self.check_slot(slot)
        number = int(self.order[self.first_slot + (self.num_slots + slot - POOL if is_pool(slot) else slot)])
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        source, position = self._place_of[shard]
        within = number - int(self._starts[shard])
        return Instance(source.name, 0, int(source.shard_starts[position]) + within, shard, within * self.geometry.sequence_length)

    def slots(self, source: str, index: int) -> list[int]:
        """The one slot of the run or of the pool that holds this instance, or none. Reads the order of run and pool once."""
        place = next(candidate for candidate in self.sources if candidate.name == source)
        position = int(np.searchsorted(place.shard_starts, index, side="right")) - 1
        number = int(self._starts[place.shards[position]]) + index - int(place.shard_starts[position])
        here = slice(self.first_slot, self.first_slot + self.num_slots + self.num_pool)
        found = np.flatnonzero(self.order[here] == number)
        return [int(slot) if slot < self.num_slots else POOL + int(slot) - self.num_slots for slot in found]

    def read(self, slot: int) -> Slot:
        """The slot's tokens and loss mask; all of it is masked out where AI2's filter finds a repetition."""
        content = super().read(slot)
        if is_repetitive(content.tokens[:-1]):
            content.loss_mask[:] = 0
        return content

    def is_permutation(self) -> bool:
        """Whether the order lists every instance once (reads all of it)."""
        seen = np.zeros(len(self.order), dtype=bool)
        for start in range(0, len(self.order), _PIECE):
            piece = self.order[start : start + _PIECE]
            if int(piece.max()) >= len(seen):
                return False
            seen[piece] = True
        return bool(seen.all())

    @cached_property
    def _starts(self) -> np.ndarray:
        """int64 [num_shards + 1]: the first instance of each shard in corpus order; a shard of a source left out has none."""
        counts = np.zeros(len(self.corpus.shards), dtype=np.int64)
        for source in self.sources:
            counts[list(source.shards)] = np.diff(source.shard_starts)
        return np.concatenate([[0], np.cumsum(counts)])

    @cached_property
    def _place_of(self) -> dict[int, tuple[Source, int]]:
        """Shard to (its source, its position there)."""
        return {shard: (source, position) for source in self.sources for position, shard in enumerate(source.shards)}


def write_order(config: Config, corpus: Corpus, directory: Path) -> OrderFile:
    """Shuffle all instances as AI2 does in epoch 0 and write them to `directory` (which is under construction).

    Memory: the file is shuffled where it lies, 4 bytes for each instance.

    Raises:
        UserError: Run and pool need more instances than there are, or a source is wanted for anything but one whole epoch.
    """
    num_instances = sum(source.num_instances for source in _sources(config, corpus))
    _check_size(config, num_instances)
    path = Path(directory) / ORDER_NAME
    order = np.memmap(path, dtype=_DTYPE, mode="w+", shape=(num_instances,))
    for start in range(0, num_instances, _PIECE):
        order[start : start + _PIECE] = np.arange(start, min(start + _PIECE, num_instances), dtype=_DTYPE)
    # numpy's own generator, because it is AI2's: seed + epoch, epoch 0. An array proper, because subclasses are shuffled on a slower path.
    np.random.Generator(np.random.PCG64(config.seeds.order)).shuffle(np.asarray(order))  # noqa: TID251 - the file is the truth, not the method
    order.flush()
    return OrderFile(path, root_of(sums_of_file(path)))


def _sources(config: Config, corpus: Corpus) -> tuple[Source, ...]:
    partial = {name: epochs for name, epochs in config.corpus.sources.items() if epochs not in (0, 1)}
    if partial:
        name, epochs = next(iter(partial.items()))
        raise UserError(
            f"corpus.sources asks for {epochs:g} epochs of {name}, but corpus.order olmo replays AI2's first epoch, in which every instance stands once. "
            "Give 1 (or 0 to leave the source out), or use corpus.order keyed."
        )
    return lay_out(corpus, config.corpus.sources, config.geometry.sequence_length, 0)


def _check_size(config: Config, num_instances: int) -> None:
    geometry = Geometry(**config.geometry.model_dump())
    rest = max(num_instances - config.corpus.first_slot, 0)
    if geometry.num_slots + config.pool.slots > rest:
        most = max(rest - config.pool.slots, 0) // geometry.global_batch_size
        skipped = f" {rest} of the {num_instances}" if config.corpus.first_slot else f" {num_instances}"
        raise UserError(
            f"The run needs {geometry.num_slots} slots ({geometry.steps} steps of {geometry.global_batch_size}) and a pool of {config.pool.slots} after "
            f"them, but one epoch of the corpus has only{skipped} instances. Train at most {most} steps, shrink the pool, or add text."
        )
    if num_instances >= np.iinfo(_DTYPE).max:
        raise UserError(
            f"corpus.order olmo numbers instances in 32 bits, as AI2 does; {num_instances} are too many. Use corpus.order keyed."
        )


def _open_order(order_file: OrderFile, num_instances: int) -> np.ndarray:
    """Map a stored order after comparing its length and checksum with what was recorded."""
    path = require_file(order_file.path, "the stored order of a manifest with corpus.order olmo")
    expected, actual = num_instances * _DTYPE.itemsize, path.stat().st_size
    if actual != expected:
        raise UserError(
            f"{path} has {actual} bytes, but this corpus has {num_instances} instances, which take {expected}. It is cut short or was made for another "
            "corpus: restore it, or plan the manifest again."
        )
    if root_of(sums_of_file(path)) != order_file.root:
        raise UserError(
            f"{path} is not the order that was planned: its checksum differs. It is damaged: restore it, or plan the manifest again."
        )
    return plain_map(np.memmap(path, dtype=_DTYPE, mode="r"))
