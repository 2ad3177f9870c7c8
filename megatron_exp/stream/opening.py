"""The one place that knows which orders there are."""

from pathlib import Path

from megatron_exp.config.schema import Config
from megatron_exp.shards.corpus import Corpus
from megatron_exp.stream.base import Stream
from megatron_exp.stream.keyed import KeyedStream
from megatron_exp.stream.olmo import OlmoStream, OrderFile, write_order


def make_order(config: Config, corpus: Corpus, directory: Path) -> OrderFile | None:
    """Compute and write what the configured order keeps on disk, into a manifest under construction; None for arithmetic orders."""
    return write_order(config, corpus, directory) if config.corpus.order == "olmo" else None


def open_stream(config: Config, corpus: Corpus, order_file: OrderFile | None = None) -> Stream:
    """The base stream of a configuration over its corpus.

    Args:
        config: says the order.
        corpus: the text.
        order_file: what `make_order` wrote; only `olmo` needs it.

    Raises:
        UserError: The corpus is too small for run and pool, or the order file is missing or damaged.
    """
    if config.corpus.order == "olmo":
        return OlmoStream.open(config, corpus, order_file)
    return KeyedStream.open(config, corpus)
