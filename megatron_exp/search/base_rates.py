"""How often the n-grams of payloads stand in the base corpus: a resumable pass over the shards, whose result `plan` reads.

Rules follow Hubble's decontamination (arXiv 2510.19811): n-grams at a stride of n / 4, short payloads as a whole.

Memory does not grow with the payloads: they are taken in groups of some two million n-grams, with a pass over the corpus for each. A plan of the reference
size (a million payloads, 700 tokens each) has 230M n-grams, which would be 110 passes; `per_payload` searches for an even sample of each payload's, 16 of
them in 8 passes.
"""

import io
import shutil
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_exp import fingerprint
from megatron_exp.errors import UserError
from megatron_exp.files import write_file
from megatron_exp.manifest.payloads import payload_hash
from megatron_exp.manifest.reader import Manifest
from megatron_exp.manifest.schema import DICT
from megatron_exp.manifest.stored_table import read_stored
from megatron_exp.search.patterns import Patterns
from megatron_exp.search.places import count_in_shard
from megatron_exp.shards.checksums import ARRAY_ERRORS
from megatron_exp.shards.corpus import Corpus

SCHEMA = pa.schema(
    [
        ("experiment", DICT),
        ("item", pa.uint64()),
        ("arm", DICT),
        ("payload_hash", pa.binary(16)),
        ("num_ngrams", pa.uint32()),
        ("occurrences", pa.uint64()),
        ("base_rate", pa.float32()),
    ]
)
_JOB_NAME = "job.json"
_PER = 1_000_000
_STRINGS_AT_ONCE = 1 << 21
"""Of one pass; with what they are found by, about 400 bytes each."""


@dataclass(frozen=True, eq=False)
class BaseRates:
    """What was searched for. rates: occurrences per million tokens by payload hash. ngram: n. fingerprint: of the table's content."""

    rates: dict[bytes, float]
    ngram: int
    fingerprint: str

    @classmethod
    def read(cls, path: Path, corpus: Corpus) -> "BaseRates":
        """UserError where the file is none of ours or was counted in another corpus."""
        other = "It holds no base rates: give the file that `search CORPUS --payloads MANIFEST --out FILE` wrote"
        table = read_stored(path, SCHEMA, "base rates", if_damaged="It is damaged: search again with --payloads", if_other=other)
        told = table.schema.metadata or {}
        if b"corpus" not in told:
            raise UserError(f"{path} says of no corpus that it was counted in. {other}.")
        if told[b"corpus"].decode() != corpus.fingerprint:
            raise UserError(
                f"{path} was counted in a corpus with fingerprint {told[b'corpus'].decode()[:12]}, but {corpus.path} has "
                f"{corpus.fingerprint[:12]}. Search this corpus."
            )
        rates = dict(zip(table["payload_hash"].to_pylist(), table["base_rate"].to_pylist(), strict=True))
        return cls(rates, int(told[b"ngram"]), fingerprint.of_table(table))

    def of(self, payload: np.ndarray) -> float | None:
        """The rate of a payload (int32 ids as inserted), None where it was not searched for."""
        return self.rates.get(payload_hash(payload))


def ngrams(payload: np.ndarray, n: int, eos_id: int, most: int | None = None) -> tuple[list[np.ndarray], float]:
    """The distinct strings of a payload to search for, and how many times more there would be without `most`.

    All n-grams at stride max(1, n // 4), or all of the payload where it is shorter; of more than `most`, that many at even distances. EOS at its ends is left
    out: in the corpus other documents stand around the text. Nothing is left of a payload of EOS alone.
    """
    inside = np.flatnonzero(payload != eos_id)
    if not len(inside):
        return [], 1.0
    text = np.ascontiguousarray(payload[inside[0] : inside[-1] + 1], dtype=np.int32)
    starts = np.arange(0, max(len(text) - n, 0) + 1, max(1, n // 4))
    num_chosen = len(starts) if most is None else min(most, len(starts))
    chosen = starts[np.arange(num_chosen) * (len(starts) - 1) // max(num_chosen - 1, 1)]
    strings = {string.tobytes(): string for string in (text[start : start + n] for start in chosen.tolist())}
    return list(strings.values()), len(starts) / num_chosen


class _Group(NamedTuple):
    """Payloads that are searched for in one pass.

    strings: their distinct n-grams. members: int64, the strings of all payloads one after the other. bounds: int64 [payloads + 1] into `members`. scale:
    float64 [payloads], how many times more n-grams each has.
    """

    strings: list[np.ndarray]
    members: np.ndarray
    bounds: np.ndarray
    scale: np.ndarray

    @classmethod
    def of(cls, payloads: Iterable[np.ndarray], ngram: int, eos_id: int, most: int | None) -> "_Group":
        places: dict[bytes, int] = {}
        strings: list[np.ndarray] = []
        members, bounds, scale = array("q"), array("q", [0]), array("d")
        for payload in payloads:
            own, times = ngrams(payload, ngram, eos_id, most)
            for string in own:
                if (place := places.setdefault(string.tobytes(), len(strings))) == len(strings):
                    strings.append(string)
                members.append(place)
            bounds.append(len(members))
            scale.append(times)
        return cls(strings, np.array(members, np.int64), np.array(bounds), np.array(scale))

    def occurrences(self, counts: np.ndarray) -> np.ndarray:
        """int64 [payloads]: the sum over each payload's strings of their counts."""
        running = np.concatenate([[0], np.cumsum(counts[self.members])])
        return running[self.bounds[1:]] - running[self.bounds[:-1]]


def search_base_rates(
    corpus: Corpus,
    manifest: Manifest,
    out: Path,
    *,
    ngram: int = 13,
    per_payload: int | None = None,
    threads: int = 1,
    progress: Callable[[int], None] = lambda _: None,
) -> pa.Table:
    """Count the n-grams of all items' payloads in `corpus` and write the table (SCHEMA) to `out`.

    What is done is recorded after every shard beside `out` (in OUT.partial/), and a killed job started again goes on with the next. `progress` is told the
    tokens read so far, in all passes. UserError where `out` exists, or where what lies beside it belongs to another search.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} already exists. Results are never overwritten: choose another name, or remove it first.")
    if ngram < 1 or (per_payload is not None and per_payload < 1):
        raise UserError(f"--ngram is {ngram} and --per-payload {per_payload}; give 1 or more.")
    numbers = np.unique(manifest.items()["payload"].drop_null().to_numpy())
    job = {"corpus": corpus.fingerprint, "ngram": ngram, "payloads": manifest.record["fingerprints"]["items"], "per_payload": per_payload}
    folder = _begin(out, job)
    found = []
    for number, part in enumerate(_parts(manifest, numbers, ngram, per_payload)):
        group = _Group.of((manifest.payload(payload) for payload in part.tolist()), ngram, corpus.eos_id, per_payload)
        occurrences = _count(corpus, group, folder / f"{number:05d}.npy", threads, _added(progress, number * corpus.num_tokens))
        found.append((occurrences, np.diff(group.bounds), group.scale))
    occurrences, num_ngrams, scale = (np.concatenate(columns) for columns in zip(*found, strict=True))
    table = _table(manifest, numbers, occurrences, num_ngrams, occurrences * scale * (_PER / corpus.num_tokens))
    table = table.replace_schema_metadata({"corpus": corpus.fingerprint, "ngram": str(ngram), "per_payload": str(per_payload or "all")})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_file(out, memoryview(sink.getvalue()).tobytes())
    shutil.rmtree(folder)
    return table


def _added(progress: Callable[[int], None], before: int) -> Callable[[int], None]:
    return lambda done: progress(before + done)


def _parts(manifest: Manifest, numbers: np.ndarray, ngram: int, most: int | None) -> list[np.ndarray]:
    """The payloads of each pass: neighbours that have at most _STRINGS_AT_ONCE n-grams together, or one that has more alone."""
    starts = np.asarray(manifest.payload_tokens()[1])
    lengths = (starts[1:] - starts[:-1])[numbers.astype(np.int64)]
    num = np.minimum(np.maximum(lengths - ngram, 0) // max(1, ngram // 4) + 1, most or _STRINGS_AT_ONCE)
    return np.split(numbers, np.flatnonzero(np.diff(np.cumsum(num) // _STRINGS_AT_ONCE)) + 1)


def _kept_counts(record: Path) -> np.ndarray:
    try:
        return np.load(record, allow_pickle=False)
    except ARRAY_ERRORS as error:
        raise UserError(f"{record} cannot be read ({error}). It holds the counts so far: remove it, and they are made again.") from error


def _count(corpus: Corpus, group: _Group, record: Path, threads: int, progress: Callable[[int], None]) -> np.ndarray:
    """int64 [payloads]: occurrences in the whole corpus. record: how many shards are done, then the counts so far."""
    counted = _kept_counts(record) if record.exists() else np.zeros(1 + len(group.scale), np.int64)
    patterns = Patterns.of(group.strings) if counted[0] < len(corpus.shards) else None
    done = sum(shard.num_tokens for shard in corpus.shards[: int(counted[0])])
    for shard in range(int(counted[0]), len(corpus.shards)):
        assert patterns is not None
        counted[1:] += group.occurrences(count_in_shard(corpus, shard, patterns, threads=threads))
        counted[0] = shard + 1
        _write_counts(record, counted)
        done += corpus.shards[shard].num_tokens
        progress(done)
    return counted[1:]


def _begin(out: Path, job: dict[str, Any]) -> Path:
    """The folder of done-records, new or of the same job."""
    folder = out.with_name(f"{out.name}.partial")
    if not (folder / _JOB_NAME).exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / _JOB_NAME, orjson.dumps(job))
    elif orjson.loads((folder / _JOB_NAME).read_bytes()) != job:
        raise UserError(
            f"{folder} holds the records of another search (corpus, payloads or --ngram differ). Choose another --out, or remove it."
        )
    return folder


def _write_counts(path: Path, counts: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, counts, allow_pickle=False)
    write_file(path, buffer.getvalue())


def _table(manifest: Manifest, numbers: np.ndarray, occurrences: np.ndarray, num_ngrams: np.ndarray, rates: np.ndarray) -> pa.Table:
    """One row per item that has a payload."""
    items = manifest.items().select(["experiment", "item", "arm", "payload"])
    items = items.filter(items["payload"].is_valid())
    place = np.searchsorted(numbers, items["payload"].to_numpy())
    hashes = [payload_hash(manifest.payload(number)) for number in numbers.tolist()]
    columns = {
        "payload_hash": pa.array([hashes[index] for index in place], pa.binary(16)),
        "num_ngrams": pa.array(num_ngrams[place].astype(np.uint32)),
        "occurrences": pa.array(occurrences[place].astype(np.uint64)),
        "base_rate": pa.array(rates[place].astype(np.float32)),
    }
    return pa.table({"experiment": items["experiment"], "item": items["item"], "arm": items["arm"], **columns}).cast(SCHEMA)
