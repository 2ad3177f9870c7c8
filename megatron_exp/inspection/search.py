"""`search`: how often each string occurs, and where."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_exp.errors import UserError
from megatron_exp.files import durable_directory
from megatron_exp.inspection.targets import Target, open_target
from megatron_exp.search.strings import SearchString, read_strings


@dataclass(frozen=True)
class StringCount:
    """One string. corpus: occurrences in the shards. training, steps: within slots of the run, and in how many steps; None for a corpus."""

    id: str
    num_tokens: int
    corpus: int
    training: int | None
    steps: int | None
    payloads: int | None


@dataclass(frozen=True)
class SearchResult:
    """Counts for all strings, in the order of the file."""

    path: str
    num_tokens: int
    strings: list[StringCount]


def search(target: Target, strings: Path, out: Path | None = None) -> SearchResult:
    """Search a corpus, and for a manifest or run also the stream as trained and the payloads.

    Where `out` is given, every occurrence is written there (corpus.parquet, training.parquet, payloads.parquet). Raises UserError for
    strings that cannot be read and for an output that exists.
    """
    from megatron_exp.search.patterns import Patterns  # a compiler comes with it, which `inspect` must not wait for
    from megatron_exp.search.places import in_corpus, in_payloads, in_training

    wanted = read_strings(strings, target.corpus.tokenizer())
    patterns = Patterns.of([string.tokens for string in wanted])
    threads = len(os.sched_getaffinity(0))
    tables = {"corpus": in_corpus(target.corpus, patterns, threads=threads)}
    if target.kind != "corpus":
        tables["training"] = in_training(target.stream, patterns, threads=threads)
        tables["payloads"] = in_payloads(target.manifest, patterns, threads=threads)
    if out is not None:
        with durable_directory(out) as directory:
            for name, table in tables.items():
                pq.write_table(_with_ids(table, wanted), directory / f"{name}.parquet", compression="zstd")
    return SearchResult(str(target.path), target.corpus.num_tokens, _counts(wanted, tables))


def search_payloads(
    corpus: Path, manifest: Path, out: Path, ngram: int, per_payload: int | None, progress: Callable[[str], None]
) -> tuple[int, int]:
    """Count the n-grams of a manifest's payloads in a corpus and write them to `out`; (items found, items)."""
    from megatron_exp.search.base_rates import search_base_rates

    target, planned = open_target(corpus), open_target(manifest)
    if target.kind != "corpus":
        raise UserError(f"{corpus} is a {target.kind}. Give the CORPUS in which the payloads of --payloads are to be counted.")
    table = search_base_rates(
        target.corpus,
        planned.manifest,
        out,
        ngram=ngram,
        per_payload=per_payload,
        threads=len(os.sched_getaffinity(0)),
        progress=lambda done: progress(f"{done:,} tokens read; the corpus has {target.corpus.num_tokens:,}"),
    )
    return int(np.count_nonzero(table["occurrences"].to_numpy())), len(table)


def _with_ids(table: pa.Table, wanted: list[SearchString]) -> pa.Table:
    return table.append_column("id", pa.array([string.id for string in wanted]).take(table["string"].combine_chunks()))


def _counts(wanted: list[SearchString], tables: dict[str, pa.Table]) -> list[StringCount]:
    num = len(wanted)
    counts = {name: np.bincount(table["string"].to_numpy(), minlength=num) for name, table in tables.items()}
    steps = [0] * num
    if "training" in tables:
        seen = set(zip(tables["training"]["string"].to_pylist(), tables["training"]["step"].to_pylist(), strict=True))
        steps = np.bincount([string for string, _ in seen], minlength=num).tolist()
    trained = "training" in tables
    return [
        StringCount(
            id=string.id,
            num_tokens=len(string.tokens),
            corpus=int(counts["corpus"][number]),
            training=int(counts["training"][number]) if trained else None,
            steps=steps[number] if trained else None,
            payloads=int(counts["payloads"][number]) if trained else None,
        )
        for number, string in enumerate(wanted)
    ]
