"""Where strings occur: in the shards, in what a run is trained on, and in the payloads of a manifest."""

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa

from megatron_exp.manifest.reader import Manifest
from megatron_exp.overlay.overlay import Overlay
from megatron_exp.search.patterns import Patterns
from megatron_exp.search.scan import Matches, scan
from megatron_exp.shards.corpus import Corpus
from megatron_exp.stream.base import Stream

IN_CORPUS = pa.schema([("string", pa.int64()), ("shard", pa.int32()), ("offset", pa.int64())])
IN_TRAINING = pa.schema(
    [("string", pa.int64()), ("slot", pa.uint64()), ("step", pa.uint32()), ("offset", pa.uint32()), ("rewritten", pa.bool_())]
)
IN_PAYLOADS = pa.schema([("string", pa.int64()), ("payload", pa.uint64()), ("offset", pa.uint32())])

_BLOCK_TOKENS = 1 << 26


def in_corpus(corpus: Corpus, patterns: Patterns, *, threads: int = 1, progress: Callable[[int], None] = lambda _: None) -> pa.Table:
    """Every occurrence in the shards (IN_CORPUS), in shard order. `progress` is told the tokens read so far."""
    tables, done = [], 0
    for shard in range(len(corpus.shards)):
        for start, matches in _blocks(corpus.tokens(shard), patterns, threads):
            tables.append(_table(IN_CORPUS, matches, shard=np.full(len(matches.positions), shard, np.int32), offset=matches.positions))
            progress(done + start)
        done += corpus.shards[shard].num_tokens
    return pa.concat_tables([*tables, IN_CORPUS.empty_table()])


def count_in_shard(corpus: Corpus, shard: int, patterns: Patterns, *, threads: int = 1) -> np.ndarray:
    """int64 [strings]: how often each stands in one shard; places are not kept."""
    counts = np.zeros(len(patterns.strings), dtype=np.int64)
    for _, matches in _blocks(corpus.tokens(shard), patterns, threads):
        counts += np.bincount(matches.patterns, minlength=len(counts))
    return counts


def _blocks(tokens: np.ndarray, patterns: Patterns, threads: int) -> Iterator[tuple[int, Matches]]:
    """(tokens read, matches with positions in the whole array), block by block; blocks overlap so that no border hides a match."""
    for start in range(0, max(len(tokens), 1), _BLOCK_TOKENS):
        end = min(start + _BLOCK_TOKENS, len(tokens))
        found = scan(tokens[start : end + patterns.longest - 1], patterns, threads=threads)
        inside = found.positions < end - start
        yield end, Matches(found.patterns[inside], found.positions[inside] + start)


def in_training(stream: Stream | Overlay, patterns: Patterns, *, threads: int = 1) -> pa.Table:
    """Every occurrence within one slot of a run's inputs (IN_TRAINING), sorted by slot and offset.

    A string that straddles two slots was never seen in one piece and does not count. Slots an overlay touches are read through it;
    for all others the shards are searched once and each match is followed to the slots that hold its instance.
    """
    touched = np.asarray(stream.manifest.index.slots["slot"]) if isinstance(stream, Overlay) else np.empty(0, np.uint64)
    base = stream.stream if isinstance(stream, Overlay) else stream
    length, batch = base.geometry.sequence_length, base.geometry.global_batch_size
    rows = list(_untouched(base, patterns, set(touched.tolist()), threads))
    for slot in map(int, touched):
        found = scan(stream.read(slot).tokens[:length], patterns)
        rows += [(string, slot, offset, True) for string, offset in zip(found.patterns.tolist(), found.positions.tolist(), strict=True)]
    rows.sort(key=lambda row: (row[1], row[2], row[0]))
    columns = [list(column) for column in zip(*rows, strict=True)] or [[], [], [], []]
    strings, slots, offsets, rewritten = columns
    return pa.table([strings, slots, [slot // batch for slot in slots], offsets, rewritten], schema=IN_TRAINING)


def _untouched(base: Stream, patterns: Patterns, touched: set[int], threads: int) -> Iterator[tuple[int, int, int, bool]]:
    """(string, slot, offset, False) of the occurrences in base content of untouched slots."""
    length = base.geometry.sequence_length
    found = in_corpus(base.corpus, patterns, threads=threads)
    lengths = np.array([len(string) for string in patterns.strings], dtype=np.int64)
    strings, offsets = found["string"].to_numpy(), found["offset"].to_numpy()
    whole = offsets % length + lengths[strings] <= length
    shard_of = {shard: (source, position) for source in base.sources for position, shard in enumerate(source.shards)}
    for string, shard, offset in zip(
        strings[whole].tolist(), found["shard"].to_numpy()[whole].tolist(), offsets[whole].tolist(), strict=True
    ):
        if shard not in shard_of:
            continue
        source, position = shard_of[shard]
        index = int(source.shard_starts[position]) + offset // length
        if index >= source.shard_starts[position + 1]:
            continue  # the shard's tail, which no slot holds
        yield from (
            (string, slot, offset % length, False)
            for slot in base.slots(source.name, index)
            if slot < base.num_slots and slot not in touched
        )


def in_payloads(manifest: Manifest, patterns: Patterns, *, threads: int = 1) -> pa.Table:
    """Every occurrence within one payload of a manifest (IN_PAYLOADS), probes' texts included."""
    tokens, starts = manifest.payload_tokens()
    found = scan(tokens, patterns, threads=threads)
    lengths = np.array([len(string) for string in patterns.strings], dtype=np.int64)
    payload = np.searchsorted(starts, found.positions, side="right") - 1
    whole = found.positions + lengths[found.patterns] <= starts[payload + 1] if len(payload) else np.empty(0, bool)
    kept = Matches(found.patterns[whole], found.positions[whole])
    payload = payload[whole]
    return _table(IN_PAYLOADS, kept, payload=payload.astype(np.uint64), offset=(kept.positions - starts[payload]).astype(np.uint32))


def _table(schema: pa.Schema, matches: Matches, **columns: np.ndarray) -> pa.Table:
    return pa.table({"string": matches.patterns, **columns}, schema=schema)
