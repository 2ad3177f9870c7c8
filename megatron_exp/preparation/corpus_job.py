"""What preprocessing and importing share: a folder for finished work, records of finished shards, and the files that make a corpus of them."""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow.parquet as pq

from megatron_exp import __version__
from megatron_exp.errors import UserError
from megatron_exp.files import create_file, remove_partials, write_file
from megatron_exp.preparation.input_paths import refuse_output_among
from megatron_exp.preparation.preprocess_ledger import inputs_table, totals
from megatron_exp.shards.checksums import FileSum, SummedWriter, write_array
from megatron_exp.shards.corpus import INPUTS_NAME, RECORD_NAME, SCHEMA_VERSION, TOKENIZER_FOLDER, logical_fingerprint, write_record
from megatron_exp.shards.tokenizer import Tokenizer
from megatron_exp.shards.verify import SUMMED_SUFFIXES

_CLAIM_NAME = "shards-of.json"
_UNIT = "units/0123456789abcdef0123456789abcdef"
_WRITTEN = (
    RECORD_NAME,
    INPUTS_NAME,
    f"{TOKENIZER_FOLDER}/tokenizer.model",
    *(f"shard-00000.{suffix}" for suffix in (*SUMMED_SUFFIXES, "sums.npy", "bin.0-0-0.partial")),
    *(f"{_UNIT}.{suffix}" for suffix in ("bin", "docs.parquet", "sums.npy", "json", "bin.0-0-0.partial")),
)
"""Such names as a job gives to files in a corpus."""


@dataclass(frozen=True)
class WorkFolder:
    """CORPUS/units: what is finished of a corpus that is being made. It is removed when the corpus is complete.

    Any number of jobs may work in it at once, on any machines, without locks: each file has a temporary name of its own until it is whole, and whoever writes
    a file of one name writes the same bytes, because names of units follow from their input and shards belong to the job that claimed them.
    """

    corpus: Path

    @property
    def path(self) -> Path:
        return self.corpus / "units"

    @property
    def begun(self) -> bool:
        """Whether a job has been at work on this corpus."""
        return self.path.exists() or (self.corpus / RECORD_NAME).exists()

    def begin(self) -> None:
        """Make the folder, and remove what killed processes of this machine left half written."""
        self.path.mkdir(parents=True, exist_ok=True)
        for directory in self._directories:
            remove_partials(directory)

    def refuse_as_input(self, inputs: Iterable[str], files: Iterable[str | Path]) -> None:
        """UserError where the inputs take in this corpus. inputs: paths and globs; files: what they match now."""
        refuse_output_among(inputs, files, self.corpus, _WRITTEN)

    @property
    def _directories(self) -> tuple[Path, ...]:
        return self.corpus, self.path, self.corpus / TOKENIZER_FOLDER

    def claim_shards(self, key: str, names: Iterable[str]) -> None:
        """Settle what the shards are made of (`key`), for all jobs here; shards of other names, of an earlier attempt, are removed.

        UserError where another job has settled something else.
        """
        claim = self.path / _CLAIM_NAME
        if not create_file(claim, orjson.dumps({"key": key})) and _claimed(claim) != key:
            raise UserError(
                f"A job with other input or other options has begun to write the shards of {self.corpus}. Use its options, or choose another output. "
                f"If it was stopped for good, remove {claim} and run this command again."
            )
        wanted = set(names)
        for path in self.corpus.glob("shard-*"):
            if path.name.split(".")[0] not in wanted:
                path.unlink(missing_ok=True)

    def remove(self) -> None:
        """The corpus is complete. A job that is still at work here fails, and finds the corpus (`preprocess.preprocess`)."""
        shutil.rmtree(self.path, ignore_errors=True)  # what such a job writes meanwhile goes with the next call
        for directory in self._directories:
            remove_partials(directory, all_writers=True)

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


def _claimed(path: Path) -> str | None:
    try:
        return orjson.loads(path.read_bytes())["key"]
    except (FileNotFoundError, orjson.JSONDecodeError):
        return None


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
