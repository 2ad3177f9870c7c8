"""What preprocessing and importing share: a folder for finished work, records of finished shards, and the files that make a corpus of them."""

import contextlib
import fcntl
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow.parquet as pq

from megatron_exp import __version__
from megatron_exp.errors import UserError
from megatron_exp.files import write_file
from megatron_exp.preparation.preprocess_ledger import inputs_table, totals
from megatron_exp.shards.checksums import FileSum, SummedWriter, write_array
from megatron_exp.shards.corpus import INPUTS_NAME, RECORD_NAME, SCHEMA_VERSION, TOKENIZER_FOLDER, logical_fingerprint, write_record
from megatron_exp.shards.tokenizer import Tokenizer
from megatron_exp.shards.verify import SUMMED_SUFFIXES

_LOCK_NAME = "lock"


@dataclass(frozen=True)
class WorkFolder:
    """CORPUS/units: what is finished of a corpus that is being made. It is removed when the corpus is complete."""

    corpus: Path

    @property
    def path(self) -> Path:
        return self.corpus / "units"

    @property
    def begun(self) -> bool:
        """Whether a job has been at work on this corpus."""
        return self.path.exists() or (self.corpus / RECORD_NAME).exists()

    @contextlib.contextmanager
    def locked(self, kind: int) -> Iterator[None]:
        """Keep others off the corpus: one whole job, or any number of parts. The system frees the lock of a killed job."""
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / _LOCK_NAME, "wb") as file:
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"Another job is at work in {self.corpus}. Wait for it to end, or choose another output.") from error
            yield

    def remove_leftovers(self, shard_names: Iterable[str] | None = None) -> None:
        """Remove what a killed job left half written and, given the shards to be, those it wrote from other input.

        Only safe while no other job works here.
        """
        for directory in (self.corpus, self.path, self.corpus / TOKENIZER_FOLDER):
            for path in directory.glob("*.partial"):
                path.unlink()
        if shard_names is not None:
            wanted = set(shard_names)
            for path in self.corpus.glob("shard-*"):
                if path.name.split(".")[0] not in wanted:
                    path.unlink()

    def _shard_record(self, name: str) -> Path:
        return self.path / f"{name}.shard.json"

    def keep_shard(self, record: dict[str, Any], sums: Mapping[str, FileSum]) -> None:
        """Note that a shard is complete. record: name, key, source and counts. sums: of its bin, idx and docs.parquet, already in place."""
        write_array(self.corpus / f"{record['name']}.sums.npy", np.concatenate([sums[suffix].sums for suffix in SUMMED_SUFFIXES]))
        files = {suffix: sums[suffix].as_record() for suffix in SUMMED_SUFFIXES}
        write_file(self._shard_record(record["name"]), orjson.dumps(record | {"files": files}))

    def kept_shard(self, name: str, key: str) -> dict[str, Any] | None:
        """The record of a shard that an earlier job completed from the same input (`key`), if its files are there."""
        try:
            record = orjson.loads(self._shard_record(name).read_bytes())
        except (FileNotFoundError, orjson.JSONDecodeError):
            return None
        lengths = {suffix: record["files"][suffix]["bytes"] for suffix in SUMMED_SUFFIXES}
        paths = {suffix: self.corpus / f"{name}.{suffix}" for suffix in SUMMED_SUFFIXES}
        whole = all(path.is_file() and path.stat().st_size == lengths[suffix] for suffix, path in paths.items())
        return record if whole and record["key"] == key else None


def write_corpus(
    path: Path,
    tokenizer: Tokenizer,
    dtype: np.dtype,
    shards: Sequence[Mapping[str, Any]],
    ledgers: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
) -> None:
    """Write ledger, tokenizer and, last, corpus.json. options: what the corpus was made with; they become part of corpus.json."""
    sink = SummedWriter(path / INPUTS_NAME)
    pq.write_table(inputs_table(ledgers), sink, compression="zstd")
    ledger = {**totals(ledgers), "file": sink.finish().as_record()}
    assert ledger["docs_out"] == sum(shard["num_documents"] for shard in shards), "documents were lost between input and shards"
    tokenizer.save_copy(path / TOKENIZER_FOLDER)
    about = {"fingerprint": tokenizer.fingerprint, "vocabulary_size": tokenizer.vocabulary_size, "eos_id": tokenizer.eos_id}
    listed = [{name: value for name, value in shard.items() if name not in ("key", "ledger")} for shard in shards]
    record = {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": logical_fingerprint(about, listed),
        "tokenizer": about,
        "dtype": dtype.name,
        **options,
        "package_version": __version__,
        "ledger": ledger,
        "shards": listed,
    }
    write_record(path, record)
