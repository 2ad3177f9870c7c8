"""Text to a corpus of Megatron shards, with an account of every document.

    inputs -> units (one input file each) -> done-records -> shards -> corpus.json

Units and shards are independent tasks, so the result does not depend on the number of workers, and a job that was killed
continues with the tasks that have no record yet. `corpus.json`, written last, makes a corpus of the directory.
"""

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pyarrow.parquet as pq

from megatron_exp import __version__, fingerprint
from megatron_exp.errors import UserError
from megatron_exp.files import refuse_existing
from megatron_exp.preparation.preprocess_encode import Backend, Encoders, SpecialPolicy
from megatron_exp.preparation.preprocess_inputs import Unit, find_inputs, make_units
from megatron_exp.preparation.preprocess_ledger import check_rejects, inputs_table, totals
from megatron_exp.preparation.preprocess_merge import MergeWork, plan_shards
from megatron_exp.preparation.preprocess_progress import ProgressCallback, Reporter
from megatron_exp.preparation.preprocess_unit import UnitWork, done_record, is_unchanged
from megatron_exp.preparation.preprocess_workers import explained_disk_errors, run_tasks
from megatron_exp.shards.checksums import SummedWriter
from megatron_exp.shards.corpus import INPUTS_NAME, RECORD_NAME, SCHEMA_VERSION, TOKENIZER_FOLDER, Corpus, logical_fingerprint, write_record
from megatron_exp.shards.indexed import token_dtype
from megatron_exp.shards.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

DEFAULT_SHARD_SIZE = 8 << 30
_UNITS_FOLDER = "units"
_LOCK_NAME = "lock"
# A process takes two seconds to start and to load a tokenizer; below this much work for it, it is not started.
_INPUT_BYTES_PER_WORKER = 64 << 20
_SHARD_BYTES_PER_WORKER = 1 << 30


def preprocess(
    inputs: Sequence[str],
    tokenizer: Path,
    output: Path,
    *,
    workers: int | None = None,
    shard_size: int = DEFAULT_SHARD_SIZE,
    special_in_text: SpecialPolicy = "plain",
    max_reject_rate: float = 0.0,
    backend: Backend = "auto",
    progress: ProgressCallback | None = None,
) -> Corpus:
    """Tokenise inputs into a new corpus; called again after an interruption, it continues, and after success it does nothing.

    Args:
        inputs: files, directories or globs, each with an optional `NAME=` that names its source (`preprocess_inputs`).
        tokenizer: tokenizer.json, SentencePiece .model, or a directory with one; a copy goes into the corpus.
        output: the corpus directory.
        workers: most cores to use; default: all this process may use. The bytes written do not depend on it.
        shard_size: bytes of tokens per shard.
        special_in_text: strings of special tokens in a text stay text (`plain`), become the token (`special`), or make the
            document a reject (`reject`). Either way they are counted.
        max_reject_rate: share of all lines that may be rejected.
        backend: `auto`, `gigatoken` or `reference` (`preprocess_encode`); a choice of speed.
        progress: called about twice a second while units are tokenised and shards are written.

    Raises:
        UserError: Unusable input, more rejects than allowed, or an output directory that holds something else.
    """
    options = Options(workers or num_cores(), shard_size, special_in_text, max_reject_rate, backend)
    job = _Job.prepare(inputs, Path(tokenizer), Path(output), options, progress)
    if (job.output / RECORD_NAME).exists():
        return job.existing()
    with job.locked(fcntl.LOCK_EX):
        job.remove_partial_files()
        job.tokenise(job.units)
        job.finish()
        shutil.rmtree(job.directory)
    return Corpus.open(job.output)


def preprocess_part(
    inputs: Sequence[str],
    tokenizer: Path,
    output: Path,
    part: int,
    num_parts: int,
    *,
    workers: int | None = None,
    special_in_text: SpecialPolicy = "plain",
    max_reject_rate: float = 0.0,
    backend: Backend = "auto",
    progress: ProgressCallback | None = None,
) -> None:
    """Tokenise every `num_parts`-th unit, for array jobs on a shared file system.

    When all parts are done, `preprocess` with the same arguments finds every unit finished and only writes the shards.
    """
    if not 0 <= part < num_parts:
        raise UserError(f"Part {part} of {num_parts} does not exist: parts count from 0 to {num_parts - 1}.")
    options = Options(workers or num_cores(), DEFAULT_SHARD_SIZE, special_in_text, max_reject_rate, backend)
    job = _Job.prepare(inputs, Path(tokenizer), Path(output), options, progress)
    if (job.output / RECORD_NAME).exists():
        job.existing()
        return
    with job.locked(fcntl.LOCK_SH):
        job.tokenise(job.units[part::num_parts])


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Options:
    """How to preprocess; checks itself. The fields are those of `preprocess`."""

    workers: int
    shard_size: int
    special_in_text: SpecialPolicy
    max_reject_rate: float
    backend: Backend

    def __post_init__(self) -> None:
        if self.special_in_text not in get_args(SpecialPolicy):
            raise UserError(f"special_in_text is {self.special_in_text!r}; it must be one of {', '.join(get_args(SpecialPolicy))}.")
        if self.backend not in get_args(Backend):
            raise UserError(f"The backend is {self.backend!r}; it must be one of {', '.join(get_args(Backend))}.")
        if not 0 <= self.max_reject_rate <= 1:
            raise UserError(f"max_reject_rate is {self.max_reject_rate}; it is a share of all lines, from 0 to 1.")
        if self.shard_size < 1 or self.workers < 1:
            raise UserError(f"shard_size is {self.shard_size} and workers {self.workers}; both must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One call: what is to be made, and from what."""

    encoders: Encoders
    output: Path
    units: list[Unit]
    options: Options
    progress: ProgressCallback | None

    @classmethod
    def prepare(cls, inputs: Sequence[str], tokenizer: Path, output: Path, options: Options, progress: ProgressCallback | None) -> "_Job":
        """Check everything that can be checked before anything is written."""
        begun = any((output / name).exists() for name in (_UNITS_FOLDER, RECORD_NAME))
        if not begun:
            refuse_existing(output)
        files = find_inputs(inputs)
        encoders = Encoders(tokenizer, options.backend, options.special_in_text, parallel=options.workers > 1)
        units = make_units(files, encoders.tokenizer.fingerprint, options.special_in_text)
        return cls(encoders=encoders, output=output, units=units, options=options, progress=progress)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.encoders.tokenizer

    @property
    def directory(self) -> Path:
        return self.output / _UNITS_FOLDER

    @property
    def recipe(self) -> str:
        """What the corpus is made of: the units in order, and how they are cut into shards."""
        return fingerprint.of_json([[unit.key for unit in self.units], self.options.shard_size])

    def existing(self) -> Corpus:
        """The finished corpus, if it is the one this call would make; its ledger must show the input files as they are now."""
        corpus = Corpus.open(self.output)
        ledgers = corpus.inputs().to_pylist()
        files = [file for unit in self.units for file in unit.files]
        same = corpus.record["recipe"] == self.recipe and len(ledgers) == len(files)
        if not same or not all(is_unchanged(file, ledger) for file, ledger in zip(files, ledgers, strict=True)):
            raise UserError(
                f"{self.output} already holds a corpus made from other input or with other options. Choose another name, or remove it first."
            )
        shutil.rmtree(self.directory, ignore_errors=True)  # a job killed after its last step leaves them
        return corpus

    @contextlib.contextmanager
    def locked(self, kind: int) -> Iterator[None]:
        """Keep others off the directory: one whole job, or any number of parts. The system frees the lock of a killed job."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with open(self.directory / _LOCK_NAME, "wb") as file:
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"Another preprocess is at work in {self.output}. Wait for it to end, or choose another output.") from error
            yield

    def remove_partial_files(self) -> None:
        """What a killed job left behind; only safe while no other job works here."""
        for directory in (self.output, self.directory, self.output / TOKENIZER_FOLDER):
            for path in directory.glob("*.partial"):
                path.unlink()

    def tokenise(self, units: Sequence[Unit]) -> None:
        """Do the units that have no done-record, the largest first, so that no worker is left alone with a large one at the end."""
        todo = [unit for unit in units if done_record(unit, self.directory) is None]
        todo.sort(key=lambda unit: -unit.num_bytes)
        total, left = sum(unit.num_bytes for unit in units), sum(unit.num_bytes for unit in todo)
        logger.info("tokenising %d of %d units, %d of %d bytes", len(todo), len(units), left, total)
        work = UnitWork(self.encoders, self.directory, stop_at_reject=self.options.max_reject_rate == 0)
        run_tasks(
            work, todo, self._num_processes(left // _INPUT_BYTES_PER_WORKER), Reporter(self.progress, "tokenise", total, total - left)
        )
        check_rejects([ledger for record in self._records(units) for ledger in record["ledgers"]], self.options.max_reject_rate)

    def _num_processes(self, worth: int) -> int:
        return max(min(self.options.workers, worth), 1)

    def _records(self, units: Sequence[Unit]) -> list[dict[str, Any]]:
        records = [done_record(unit, self.directory) for unit in units]
        assert None not in records, "a unit has no done-record although every task ended well"
        return [record for record in records if record is not None]

    def finish(self) -> None:
        """Write shards, ledger, tokenizer and, last, corpus.json."""
        records = self._records(self.units)
        dtype = token_dtype(self.tokenizer.vocabulary_size)
        plans = plan_shards(records, self.directory, dtype.itemsize, self.options.shard_size)
        if not plans:
            raise UserError(f"The input holds no document: {len(records)} files were read and all are empty. Check the inputs.")
        work = MergeWork(self.output, self.directory, dtype)
        self._remove_other_shards({plan.name for plan in plans})
        todo = [plan for plan in plans if work.finished(plan) is None]
        total, left = sum(plan.num_bytes for plan in plans), sum(plan.num_bytes for plan in todo)
        run_tasks(work, todo, self._num_processes(left // _SHARD_BYTES_PER_WORKER), Reporter(self.progress, "merge", total, total - left))
        shards = [record for plan in plans if (record := work.finished(plan)) is not None]
        assert len(shards) == len(plans)
        with explained_disk_errors(self.output):
            self._write_corpus([{name: value for name, value in shard.items() if name != "key"} for shard in shards], records, dtype.name)

    def _remove_other_shards(self, names: set[str]) -> None:
        """Shards that an interrupted job wrote from other input; they would look like part of this corpus."""
        for path in self.output.glob("shard-*"):
            if path.name.split(".")[0] not in names:
                path.unlink()

    def _write_corpus(self, shards: list[dict[str, Any]], records: list[dict[str, Any]], dtype: str) -> None:
        ledgers = [ledger for record in records for ledger in record["ledgers"]]
        sink = SummedWriter(self.output / INPUTS_NAME)
        pq.write_table(inputs_table(ledgers), sink, compression="zstd")
        ledger = {**totals(ledgers), "file": sink.finish().as_record()}
        self.tokenizer.save_copy(self.output / TOKENIZER_FOLDER)
        tokenizer = {
            "fingerprint": self.tokenizer.fingerprint,
            "vocabulary_size": self.tokenizer.vocabulary_size,
            "eos_id": self.tokenizer.eos_id,
        }
        record = {
            "schema_version": SCHEMA_VERSION,
            "fingerprint": logical_fingerprint(tokenizer, shards),
            "tokenizer": tokenizer,
            "dtype": dtype,
            "special_in_text": self.options.special_in_text,
            "max_reject_rate": self.options.max_reject_rate,
            "shard_size": self.options.shard_size,
            "recipe": self.recipe,
            "package_version": __version__,
            "ledger": ledger,
            "shards": shards,
        }
        assert ledger["docs_out"] == sum(shard["num_documents"] for shard in shards), "documents were lost between units and shards"
        write_record(self.output, record)
