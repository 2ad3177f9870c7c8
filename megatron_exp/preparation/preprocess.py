"""Text to a corpus of Megatron shards, with an account of every document.

    inputs -> units (one input file each) -> done-records -> shards -> corpus.json

Units and shards are independent tasks, so the result does not depend on the number of workers, and a job that was killed
continues with the tasks that have no record yet. `corpus.json`, written last, makes a corpus of the directory.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from megatron_exp import fingerprint
from megatron_exp.errors import UserError
from megatron_exp.files import refuse_existing, sync_directory
from megatron_exp.preparation.corpus_job import WorkFolder, write_corpus
from megatron_exp.preparation.preprocess_encode import Backend, Encoders, SpecialPolicy
from megatron_exp.preparation.preprocess_inputs import Unit, find_inputs, make_units, split_source
from megatron_exp.preparation.preprocess_ledger import check_rejects, ledgers_of, refuse_no_document
from megatron_exp.preparation.preprocess_merge import MergeWork, plan_shards
from megatron_exp.preparation.preprocess_progress import ProgressCallback, Reporter
from megatron_exp.preparation.preprocess_unit import UnitWork, done_record, is_unchanged
from megatron_exp.preparation.preprocess_workers import explained_disk_errors, num_cores, run_tasks
from megatron_exp.shards.corpus import RECORD_NAME, Corpus
from megatron_exp.shards.indexed import token_dtype
from megatron_exp.shards.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

DEFAULT_SHARD_SIZE = 8 << 30
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

    def work() -> None:
        job.tokenise(job.units)
        job.finish()
        job.folder.remove()

    job.run(work)
    return Corpus.open(job.output)


def preprocess_part(
    inputs: Sequence[str],
    tokenizer: Path,
    output: Path,
    task: int,
    num_tasks: int,
    *,
    workers: int | None = None,
    special_in_text: SpecialPolicy = "plain",
    max_reject_rate: float = 0.0,
    backend: Backend = "auto",
    progress: ProgressCallback | None = None,
) -> None:
    """Tokenise every `num_tasks`-th unit, for array jobs on a shared file system.

    When all tasks are done, `preprocess` with the same arguments finds every unit finished and only writes the shards; it does what is missing. A
    task that runs twice, at once or again, changes nothing.
    """
    if not 0 <= task < num_tasks:
        raise UserError(f"Task {task} of {num_tasks} does not exist: tasks count from 0 to {num_tasks - 1}.")
    options = Options(workers or num_cores(), DEFAULT_SHARD_SIZE, special_in_text, max_reject_rate, backend)
    job = _Job.prepare(inputs, Path(tokenizer), Path(output), options, progress)
    if (job.output / RECORD_NAME).exists():
        job.existing()
        return
    job.run(lambda: job.tokenise(job.units[task::num_tasks]))


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
        folder = WorkFolder(output)
        if not folder.begun:
            refuse_existing(output)
        files = find_inputs(inputs)
        folder.refuse_as_input([split_source(item)[1] for item in inputs], [file.path for file in files])
        encoders = Encoders(tokenizer, options.backend, options.special_in_text, parallel=options.workers > 1)
        if options.backend != "auto":
            logger.info("encoding with %s", encoders.bulk.name)  # loaded now: what cannot serve is refused before any work
        units = make_units(files, encoders.tokenizer.fingerprint, options.special_in_text)
        return cls(encoders=encoders, output=output, units=units, options=options, progress=progress)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.encoders.tokenizer

    @property
    def folder(self) -> WorkFolder:
        return WorkFolder(self.output)

    @property
    def directory(self) -> Path:
        return self.folder.path

    @property
    def recipe(self) -> str:
        """What the corpus is made of: the units in order, and how they are cut into shards."""
        return fingerprint.of_json([[unit.key for unit in self.units], self.options.shard_size])

    def existing(self) -> Corpus:
        """The finished corpus, if it is the one this call would make; its ledger must show the input files as they are now."""
        corpus = Corpus.open(self.output)
        ledgers = ledgers_of(corpus.inputs())
        files = [file for unit in self.units for file in unit.files]
        same = corpus.record["recipe"] == self.recipe and len(ledgers) == len(files)
        if not same or not all(is_unchanged(file, ledger) for file, ledger in zip(files, ledgers, strict=True)):
            raise UserError(
                f"{self.output} already holds a corpus made from other input or with other options. Choose another name, or remove it first."
            )
        check_rejects(ledgers, self.options.max_reject_rate)  # it may have been made with another rate
        self.folder.remove()  # a job killed after its last step leaves it
        return corpus

    def run(self, work: Callable[[], None]) -> None:
        """Do the work. Another job may do the same at the same time: where it is first to finish, it takes the units away, and its corpus is the result."""
        try:
            self.folder.begin()
            work()
        except (OSError, RuntimeError, AssertionError, UserError):
            if not (self.output / RECORD_NAME).exists():
                raise
            sync_directory(self.output)  # the failure may have been that of this very step
            self.existing()

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
            refuse_no_document([ledger for record in records for ledger in record["ledgers"]])
        work = MergeWork(self.output, self.directory, dtype)
        with explained_disk_errors(self.output):
            self.folder.claim_shards(fingerprint.of_json([plan.key for plan in plans]), [plan.name for plan in plans])
        todo = [plan for plan in plans if self.folder.kept_shard(plan.name, plan.key) is None]
        total, left = sum(plan.num_bytes for plan in plans), sum(plan.num_bytes for plan in todo)
        run_tasks(work, todo, self._num_processes(left // _SHARD_BYTES_PER_WORKER), Reporter(self.progress, "merge", total, total - left))
        shards = [record for plan in plans if (record := self.folder.kept_shard(plan.name, plan.key)) is not None]
        assert len(shards) == len(plans)
        options = {
            "special_in_text": self.options.special_in_text,
            "max_reject_rate": self.options.max_reject_rate,
            "shard_size": self.options.shard_size,
            "recipe": self.recipe,
        }
        ledgers = [ledger for record in records for ledger in record["ledgers"]]
        with explained_disk_errors(self.output):
            write_corpus(self.output, self.tokenizer, dtype, shards, ledgers, options)
