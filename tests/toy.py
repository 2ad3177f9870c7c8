"""Tiny in-memory stand-ins for data: a corpus whose every token tells where it lies."""

from dataclasses import dataclass, field

import numpy as np

from megatron_exp import fingerprint
from megatron_exp.config.schema import Config
from megatron_exp.stream.keyed import KeyedStream


@dataclass(frozen=True)
class ToyShard:
    name: str
    source: str
    num_tokens: int


@dataclass
class ToyCorpus:
    """Shard i holds the tokens 1000 * i, 1000 * i + 1, ...: content shows shard and offset."""

    shards: tuple[ToyShard, ...]
    path: str = "toy"
    eos_id: int = 7
    vocabulary_size: int = 1 << 20
    opened: list[int] = field(default_factory=list)

    @property
    def fingerprint(self) -> str:
        return fingerprint.of_json([[shard.name, shard.source, shard.num_tokens] for shard in self.shards])

    def tokens(self, shard: int) -> np.ndarray:
        self.opened.append(shard)
        return np.arange(self.shards[shard].num_tokens, dtype=np.int32) + 1000 * shard


def toy_corpus(*sizes: tuple[str, int]) -> ToyCorpus:
    """One shard for each (source, number of tokens)."""
    return ToyCorpus(tuple(ToyShard(f"shard-{i:05d}", source, size) for i, (source, size) in enumerate(sizes)))


def toy_config(steps: int = 8, batch: int = 4, length: int = 8, pool: int = 4, **corpus: object) -> Config:
    return Config.model_validate(
        {
            "name": "toy",
            "corpus": {"path": "toy", **corpus},
            "geometry": {"sequence_length": length, "global_batch_size": batch, "steps": steps},
            "pool": {"slots": pool},
        }
    )


def toy_stream(*sizes: tuple[str, int], **options: object) -> KeyedStream:
    return KeyedStream.open(toy_config(**options), toy_corpus(*sizes or [("a", 200), ("b", 203)]))  # type: ignore[arg-type]
