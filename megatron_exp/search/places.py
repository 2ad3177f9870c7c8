"""Where strings occur: in the shards, in what a run is trained on, and in the payloads of a manifest."""

import itertools
from collections.abc import Callable, Iterable, Iterator

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
IN_BASE = pa.schema([("string", pa.int64()), ("slot", pa.uint64()), ("offset", pa.int64())])
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


def in_base(base: Stream, patterns: Patterns, *, label: bool = False, threads: int = 1) -> pa.Table:
    """Every occurrence within the base content of one slot, train or pool (IN_BASE), sorted by slot, offset and string.

    The shards are searched once and each match is followed to the slots that hold its instance. A string that straddles two slots is never seen in one
    piece and does not count. label: the token after an instance, which is the label of its last position, belongs to it.
    """
    found = in_corpus(base.corpus, patterns, threads=threads)
    length = base.geometry.sequence_length
    lengths = np.array([len(string) for string in patterns.strings], dtype=np.int64)
    strings, shards, offsets = (found[name].to_numpy().astype(np.int64) for name in ("string", "shard", "offset"))
    whole = offsets % length + lengths[strings] <= length + (base.look_ahead if label else 0)
    strings, shards, offsets = strings[whole], shards[whole], offsets[whole]
    places, which = np.unique(np.stack([shards, offsets // length]), axis=1, return_inverse=True)
    slots = [_slots_of(base, *place) for place in places.T.tolist()]
    copies = np.array([len(one) for one in slots], dtype=np.int64)[which.reshape(-1)]
    rows = np.repeat(np.arange(len(strings)), copies)
    held = np.concatenate([np.empty(0, np.uint64), *(np.array(slots[place], np.uint64) for place in which.reshape(-1).tolist())])
    columns = strings[rows], held, (offsets % length)[rows]
    order = np.lexsort((columns[0], columns[2], columns[1]))
    return pa.table([column[order] for column in columns], schema=IN_BASE)


def _slots_of(base: Stream, shard: int, instance: int) -> list[int]:
    """The slots that hold an instance of a shard; none for a shard left out or for its tail."""
    for source in base.sources:
        if shard in source.shards:
            position = source.shards.index(shard)
            index = int(source.shard_starts[position]) + instance
            return base.slots(source.name, index) if index < source.shard_starts[position + 1] else []
    return []


def in_training(stream: Stream | Overlay, patterns: Patterns, *, threads: int = 1) -> pa.Table:
    """Every occurrence within one slot of a run's inputs (IN_TRAINING), sorted by slot and offset.

    A string that straddles two slots was never seen in one piece and does not count. Slots an overlay touches are read through it;
    for all others the shards are searched once (`in_base`).
    """
    touched = np.asarray(stream.manifest.index.slots["slot"]) if isinstance(stream, Overlay) else np.empty(0, np.uint64)
    base = stream.stream if isinstance(stream, Overlay) else stream
    length, batch = base.geometry.sequence_length, base.geometry.global_batch_size
    untouched = in_base(base, patterns, threads=threads)
    slots = untouched["slot"].to_numpy()
    untouched = untouched.filter(pa.array((slots < np.uint64(base.num_slots)) & ~np.isin(slots, touched)))
    rows = [(*row, False) for row in zip(*(untouched[name].to_pylist() for name in ("string", "slot", "offset")), strict=True)]
    for slot in map(int, touched):
        found = scan(stream.read(slot).tokens[:length], patterns)
        rows += [(string, slot, offset, True) for string, offset in zip(found.patterns.tolist(), found.positions.tolist(), strict=True)]
    rows.sort(key=lambda row: (row[1], row[2], row[0]))
    columns = [list(column) for column in zip(*rows, strict=True)] or [[], [], [], []]
    strings, places, offsets, rewritten = columns
    return pa.table([strings, places, [slot // batch for slot in places], offsets, rewritten], schema=IN_TRAINING)


def in_payloads(manifest: Manifest, patterns: Patterns, *, threads: int = 1) -> pa.Table:
    """Every occurrence within one payload of a manifest (IN_PAYLOADS), probes' texts included."""
    kept, payload, offsets = _within(*manifest.payload_tokens(), patterns, threads)
    return pa.table([kept, payload.astype(np.uint64), offsets.astype(np.uint32)], schema=IN_PAYLOADS)


def in_texts(texts: Iterable[np.ndarray], patterns: Patterns, *, threads: int = 1) -> Iterator[tuple[int, int]]:
    """(string, number of the text) of every occurrence within one of many token sequences, which are looked at in blocks."""
    first, block, num_tokens = 0, list[np.ndarray](), 0
    for text in itertools.chain(texts, [None]):
        if text is not None:
            block.append(text)
            num_tokens += len(text)
        if block and (text is None or num_tokens >= _BLOCK_TOKENS):
            starts = np.concatenate([[0], np.cumsum([len(one) for one in block])]).astype(np.int64)
            strings, numbers, _ = _within(np.concatenate(block), starts, patterns, threads)
            yield from zip(strings.tolist(), (first + numbers).tolist(), strict=True)
            first, block, num_tokens = first + len(block), [], 0


def _within(tokens: np.ndarray, starts: np.ndarray, patterns: Patterns, threads: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """int64 (strings, sequences, offsets) of the matches that lie within one of several sequences: sequence i begins at starts[i]."""
    found = scan(tokens, patterns, threads=threads)
    lengths = np.array([len(string) for string in patterns.strings], dtype=np.int64)
    sequence = np.searchsorted(starts, found.positions, side="right") - 1
    whole = found.positions + lengths[found.patterns] <= starts[sequence + 1] if len(sequence) else np.empty(0, bool)
    return found.patterns[whole], sequence[whole], found.positions[whole] - starts[sequence[whole]]


def _table(schema: pa.Schema, matches: Matches, **columns: np.ndarray) -> pa.Table:
    return pa.table({"string": matches.patterns, **columns}, schema=schema)
