"""Proving that a corpus on disk is what was written: every byte against its checksum, records against each other."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_exp.errors import UserError
from megatron_exp.shards import documents
from megatron_exp.shards.checksums import ARRAY_ERRORS, BLOCK_BYTES, root_of, sums_of_file
from megatron_exp.shards.corpus import INPUTS_NAME, Corpus, logical_fingerprint
from megatron_exp.shards.indexed import IndexedReader

SUMMED_SUFFIXES = ("bin", "idx", "docs.parquet")
"""The files of a shard whose block sums are kept, in this order, in its .sums.npy."""


_MOST_THREADS = 8  # more gain nothing: memory is then the limit


def findings(corpus: Corpus) -> Iterator[str]:
    """One sentence per fault, each naming its file and, for damaged content, the place."""
    yield from _tokenizer_findings(corpus)
    yield from _file_findings(corpus.path / INPUTS_NAME, corpus.record["ledger"]["file"], None)
    yield from _ledger_findings(corpus)
    if logical_fingerprint(corpus.record["tokenizer"], corpus.record["shards"]) != corpus.fingerprint:
        yield f"{corpus.path / 'corpus.json'}: the fingerprint does not follow from the shards it lists"
    for shard in range(len(corpus.shards)):
        faults = list(_shard_byte_findings(corpus, shard))
        yield from faults
        if not faults:  # structure is only worth reading where the bytes are the ones written
            yield from _structure_findings(corpus, shard)


def _tokenizer_findings(corpus: Corpus) -> Iterator[str]:
    try:
        corpus.tokenizer()
    except UserError as error:
        yield str(error)


def _ledger_findings(corpus: Corpus) -> Iterator[str]:
    ledger = corpus.record["ledger"]
    if ledger["lines_in"] != ledger["docs_out"] + sum(ledger["rejected"].values()):
        yield f"{corpus.path / 'corpus.json'}: the ledger does not add up (lines in = documents out + rejected)"
    if ledger["docs_out"] != corpus.num_documents:
        yield f"{corpus.path / 'corpus.json'}: the ledger counts {ledger['docs_out']} documents, the shards hold {corpus.num_documents}"


def _shard_byte_findings(corpus: Corpus, shard: int) -> Iterator[str]:
    files = corpus.record["shards"][shard]["files"]
    kept = _kept_sums(corpus.file(shard, "sums.npy"), files)
    if kept is None:
        yield f"{corpus.file(shard, 'sums.npy')}: missing, damaged or of another shard; places inside this shard's files cannot be told"
    for suffix in SUMMED_SUFFIXES:
        yield from _file_findings(corpus.file(shard, suffix), files[suffix], kept[suffix] if kept else None)


def _kept_sums(path: Path, files: dict[str, Any]) -> dict[str, np.ndarray] | None:
    """The block sums of a shard's files, or None where the file that keeps them does not agree with the record."""
    try:
        sums = np.load(path, allow_pickle=False)
    except ARRAY_ERRORS:
        return None
    if sums.dtype != np.uint64 or sums.ndim != 1:
        return None
    counts = [-(-files[suffix]["bytes"] // BLOCK_BYTES) for suffix in SUMMED_SUFFIXES]
    parts = dict(zip(SUMMED_SUFFIXES, np.split(sums, np.cumsum(counts)[:-1]), strict=True))
    return parts if all(root_of(parts[suffix]) == files[suffix]["root"] for suffix in SUMMED_SUFFIXES) else None


def _file_findings(path: Path, recorded: dict[str, Any], kept: np.ndarray | None) -> Iterator[str]:
    if not path.is_file():
        yield f"{path}: missing"
        return
    actual = path.stat().st_size
    if actual != recorded["bytes"]:
        yield f"{path}: {actual} bytes, {recorded['bytes']} were written"
        return
    sums = sums_of_file(path, threads=min(len(os.sched_getaffinity(0)), _MOST_THREADS))
    if root_of(sums) == recorded["root"]:
        return
    if kept is None:
        yield f"{path}: its content was changed"
        return
    bad = np.flatnonzero(sums != kept)
    first = int(bad[0]) * BLOCK_BYTES
    yield f"{path}: its content was changed in {len(bad)} of {len(sums)} blocks, the first at bytes {first} to {min(first + BLOCK_BYTES, actual)}"


def _structure_findings(corpus: Corpus, shard: int) -> Iterator[str]:
    entry = corpus.shards[shard]
    try:
        reader = IndexedReader(corpus.path / entry.name)
        borders = len(reader.starts) - 1
    except UserError as error:
        yield str(error)
        return
    if (reader.dtype, reader.num_tokens, borders) != (entry.dtype, entry.num_tokens, entry.num_documents):
        found = f"{reader.num_tokens} tokens in {borders} documents as {reader.dtype}"
        yield f"{reader.idx_path}: {found}, recorded are {entry.num_tokens} in {entry.num_documents} as {entry.dtype}"
    mapped = documents.num_documents(corpus.file(shard, "docs.parquet"))
    if mapped != entry.num_documents:
        yield f"{corpus.file(shard, 'docs.parquet')}: {mapped} documents, the shard has {entry.num_documents}"
