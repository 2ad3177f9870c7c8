"""How many instances each source gives, which of them are the pool, and how the index space of training is laid out."""

from dataclasses import dataclass

import numpy as np

from megatron_exp.errors import UserError
from megatron_exp.shards.corpus import Corpus


@dataclass(frozen=True, eq=False, kw_only=True)
class Source:
    """One source in the index space.

    shards: indices into the corpus, in order. shard_starts: int64 [num_shards + 1], first instance of each shard. num_pool:
    instances set aside. num_epochs: whole and fractional passes over the rest. base, pool_base: first index of this source in the
    index space of training and of the pool.
    """

    name: str
    shards: tuple[int, ...]
    shard_starts: np.ndarray
    num_pool: int
    num_epochs: float
    base: int
    pool_base: int

    @property
    def num_instances(self) -> int:
        return int(self.shard_starts[-1])

    @property
    def num_rest(self) -> int:
        """Distinct instances that training may see."""
        return self.num_instances - self.num_pool

    @property
    def num_indices(self) -> int:
        """Places in the index space: every epoch of every instance; a fraction takes the first of the keyed order."""
        return _indices(self.num_rest, self.num_epochs)


def lay_out(corpus: Corpus, epochs: dict[str, float], sequence_length: int, pool_slots: int) -> tuple[Source, ...]:
    """The sources in name order, with the pool cut off in proportion to what each contributes to training.

    Raises UserError for sources that the corpus lacks, that the config does not list, or that are too small.
    """
    names = sorted({shard.source for shard in corpus.shards})
    wanted = {name: epochs.get(name, 0.0) for name in names} if epochs else dict.fromkeys(names, 1.0)
    _check_names(corpus, names, epochs)
    members = {name: tuple(i for i, shard in enumerate(corpus.shards) if shard.source == name) for name in names if wanted[name] > 0}
    starts = {
        name: np.concatenate([[0], np.cumsum([corpus.shards[i].num_tokens // sequence_length for i in shards])]).astype(np.int64)
        for name, shards in members.items()
    }
    weights = {name: int(starts[name][-1]) * wanted[name] for name in members}
    num_pool = _proportional(pool_slots, weights, {name: int(starts[name][-1]) for name in members})
    sources: list[Source] = []
    base = pool_base = 0
    for name, shards in members.items():
        source = Source(
            name=name,
            shards=shards,
            shard_starts=starts[name],
            num_pool=num_pool[name],
            num_epochs=wanted[name],
            base=base,
            pool_base=pool_base,
        )
        sources.append(source)
        base += source.num_indices
        pool_base += source.num_pool
    return tuple(sources)


def _check_names(corpus: Corpus, names: list[str], epochs: dict[str, float]) -> None:
    unknown, unlisted = sorted(set(epochs) - set(names)), sorted(set(names) - set(epochs))
    if unknown:
        raise UserError(f"corpus.sources names {', '.join(unknown)}, which {corpus.path} does not hold. It holds: {', '.join(names)}.")
    if epochs and unlisted:
        raise UserError(
            f"corpus.sources does not list {', '.join(unlisted)} of {corpus.path}. List every source with its epochs (0 leaves it out), or none."
        )


def _proportional(total: int, weights: dict[str, float], limits: dict[str, int]) -> dict[str, int]:
    """`total` split in proportion to `weights` by largest remainders (ties by name)."""
    available = sum(limits.values())
    if total >= available:
        raise UserError(
            f"pool.slots is {total}, but the corpus has only {available} instances at this sequence length. Use a smaller pool or a larger corpus."
        )
    scale = total / sum(weights.values()) if weights else 0.0
    exact = {name: weight * scale for name, weight in weights.items()}
    shares = {name: min(int(value), limits[name]) for name, value in exact.items()}
    for name in sorted(exact, key=lambda name: (shares[name] - exact[name], name)):
        if sum(shares.values()) == total:
            break
        shares[name] += 1 if shares[name] < limits[name] else 0
    if sum(shares.values()) != total:
        raise UserError(
            f"pool.slots = {total} cannot be drawn in proportion from the sources: one of them is too small for its share. Use a smaller pool."
        )
    return shares


def _indices(num_rest: int, num_epochs: float) -> int:
    whole = int(num_epochs)
    return whole * num_rest + round((num_epochs - whole) * num_rest)
