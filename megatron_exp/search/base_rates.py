"""How often the n-grams of payloads stand in the base corpus: a resumable pass over the shards, whose result `plan` reads.

Rules follow Hubble's decontamination (arXiv 2510.19811): n-grams at a stride of n / 4, short payloads as a whole.
"""

import io
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_exp import fingerprint
from megatron_exp.errors import UserError
from megatron_exp.files import require_file, write_file
from megatron_exp.manifest.payloads import payload_hash
from megatron_exp.manifest.reader import Manifest
from megatron_exp.manifest.schema import DICT
from megatron_exp.search.patterns import Patterns
from megatron_exp.search.places import count_in_shard
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


@dataclass(frozen=True, eq=False)
class BaseRates:
    """What was searched for. rates: occurrences per million tokens by payload hash. ngram: n. fingerprint: of the table's content."""

    rates: dict[bytes, float]
    ngram: int
    fingerprint: str

    @classmethod
    def read(cls, path: Path, corpus: Corpus) -> "BaseRates":
        """UserError where the file is none of ours or was counted in another corpus."""
        try:
            table = pq.read_table(require_file(path, "base rates"))
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{path} cannot be read ({error}). It is damaged: search again with --payloads.") from error
        told = table.schema.metadata or {}
        if table.schema.names != SCHEMA.names or b"corpus" not in told:
            raise UserError(f"{path} holds no base rates. Give the file that `search CORPUS --payloads MANIFEST --out FILE` wrote.")
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


def ngrams(payload: np.ndarray, n: int, eos_id: int) -> list[np.ndarray]:
    """The distinct strings of a payload to search for: all n-grams at stride max(1, n // 4), or all of it where it is shorter.

    EOS at its ends is left out: in the corpus other documents stand around the text. Nothing is left of a payload of EOS alone.
    """
    inside = np.flatnonzero(payload != eos_id)
    if not len(inside):
        return []
    text = np.ascontiguousarray(payload[inside[0] : inside[-1] + 1], dtype=np.int32)
    starts = range(0, len(text) - n + 1, max(1, n // 4)) if len(text) > n else [0]
    return list({string.tobytes(): string for string in (text[start : start + n] for start in starts)}.values())


def search_base_rates(
    corpus: Corpus,
    manifest: Manifest,
    out: Path,
    *,
    ngram: int = 13,
    threads: int = 1,
    progress: Callable[[int], None] = lambda _: None,
) -> pa.Table:
    """Count the n-grams of all items' payloads in `corpus` and write the table (SCHEMA) to `out`.

    A shard that is done is recorded beside `out` (in OUT.partial/), and a killed job started again goes on with the next. UserError where `out` exists,
    or where what lies beside it belongs to another search. Memory: all n-grams, some 100 bytes each.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} already exists. Results are never overwritten: choose another name, or remove it first.")
    if ngram < 1:
        raise UserError(f"--ngram {ngram} is no length. Give 1 or more tokens.")
    numbers, strings, owner = _strings(manifest, ngram, corpus.eos_id)
    folder = _begin(out, {"corpus": corpus.fingerprint, "ngram": ngram, "payloads": manifest.record["fingerprints"]["items"]})
    counts, done = np.zeros(len(strings), np.int64), 0
    patterns = Patterns.of(strings)
    for shard, entry in enumerate(corpus.shards):
        record = folder / f"{entry.name}.npy"
        if not record.exists():
            _write_counts(record, count_in_shard(corpus, shard, patterns, threads=threads))
        counts += np.load(record, allow_pickle=False)
        done += entry.num_tokens
        progress(done)
    table = _table(manifest, numbers, owner, counts, corpus.num_tokens)
    table = table.replace_schema_metadata({"corpus": corpus.fingerprint, "ngram": str(ngram)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_file(out, memoryview(sink.getvalue()).tobytes())
    shutil.rmtree(folder)
    return table


def _strings(manifest: Manifest, ngram: int, eos_id: int) -> tuple[np.ndarray, list[np.ndarray], list[list[int]]]:
    """The numbers of the items' payloads, all distinct n-grams, and for each payload which of them are its own."""
    numbers = np.unique(manifest.items()["payload"].drop_null().to_numpy())
    places: dict[bytes, int] = {}
    strings: list[np.ndarray] = []
    owner: list[list[int]] = []
    for number in numbers.tolist():
        own = ngrams(manifest.payload(number), ngram, eos_id)
        for string in own:
            if places.setdefault(string.tobytes(), len(strings)) == len(strings):
                strings.append(string)
        owner.append([places[string.tobytes()] for string in own])
    return numbers, strings, owner


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


def _table(manifest: Manifest, numbers: np.ndarray, owner: list[list[int]], counts: np.ndarray, num_tokens: int) -> pa.Table:
    """One row per item that has a payload."""
    items = manifest.items().select(["experiment", "item", "arm", "payload"])
    items = items.filter(items["payload"].is_valid())
    place = np.searchsorted(numbers, items["payload"].to_numpy())
    occurrences = np.array([counts[own].sum() for own in owner], dtype=np.int64)[place]
    hashes = [payload_hash(manifest.payload(number)) for number in numbers.tolist()]
    columns = {
        "payload_hash": pa.array([hashes[index] for index in place], pa.binary(16)),
        "num_ngrams": pa.array(np.array([len(own) for own in owner], dtype=np.uint32)[place]),
        "occurrences": pa.array(occurrences.astype(np.uint64)),
        "base_rate": pa.array((occurrences * (_PER / num_tokens)).astype(np.float32)),
    }
    return pa.table({"experiment": items["experiment"], "item": items["item"], "arm": items["arm"], **columns}).cast(SCHEMA)
