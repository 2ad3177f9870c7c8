"""Tokens that exist already become a corpus: their bytes are reused, and everything an index claims about them is checked.

    pairs of tokens and index -> shards (hard links or copies, read once: checksums, ids, EOS) -> corpus.json

Each pair is an independent task and becomes one shard, so a killed job continues with the pairs that have no record yet.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_exp import fingerprint
from megatron_exp.errors import UserError
from megatron_exp.files import link_file, refuse_existing
from megatron_exp.preparation.corpus_job import WorkFolder, write_corpus
from megatron_exp.preparation.import_indexes import read_index
from megatron_exp.preparation.import_inputs import TokenFile, find_token_files
from megatron_exp.preparation.import_tokens import TokenCheck
from megatron_exp.preparation.preprocess_bytes import InputReader
from megatron_exp.preparation.preprocess_inputs import split_source
from megatron_exp.preparation.preprocess_ledger import FileLedger
from megatron_exp.preparation.preprocess_progress import Counters, ProgressCallback, Reporter
from megatron_exp.preparation.preprocess_unit import is_unchanged
from megatron_exp.preparation.preprocess_workers import explained_disk_errors, num_cores, run_tasks
from megatron_exp.shards.checksums import BlockSums, FileSum, SummedWriter
from megatron_exp.shards.corpus import RECORD_NAME, Corpus
from megatron_exp.shards.documents import DocumentMapWriter
from megatron_exp.shards.indexed import write_index
from megatron_exp.shards.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_BYTES_PER_WORKER = 1 << 30  # below this much reading, starting a process costs more than it saves
_UNKNOWN = ("text_bytes", "blank_lines", "nonstandard_lines", "checked_documents")
"""Columns of the ledger that speak of the texts, which are not here."""


def import_shards(
    inputs: Sequence[str], tokenizer: Path, output: Path, *, workers: int | None = None, progress: ProgressCallback | None = None
) -> Corpus:
    """Adopt tokenised files as a new corpus; called again after an interruption, it continues, and after success it does nothing.

    Args:
        inputs: pairs of tokens and index, each with an optional `NAME=` that names its source (`import_inputs`). Shards keep their order.
        tokenizer: the one the tokens were made with; a copy goes into the corpus.
        output: the corpus directory. On the same disk as the inputs no token is copied: the shards are hard links.
        workers: most cores to use; default: all this process may use.
        progress: called about twice a second.

    Raises:
        UserError: An index does not describe its tokens, an id is not of this tokenizer, or a document does not end with EOS.
    """
    job = _Job.prepare(inputs, Path(tokenizer), Path(output))
    if (job.folder.corpus / RECORD_NAME).exists():
        return job.existing()
    with explained_disk_errors(job.folder.corpus):
        job.folder.begin()
        job.folder.claim_shards(job.recipe, [shard.name for shard in job.shards])
    job.adopt(workers or num_cores(), progress)
    job.finish()
    job.folder.remove()
    return Corpus.open(job.folder.corpus)


class _Adoption(NamedTuple):
    """One pair and the shard it becomes. key: of everything the shard follows from."""

    name: str
    key: str
    tokens: TokenFile


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One call: what is to be made, and from what."""

    folder: WorkFolder
    tokenizer: Tokenizer
    dtype: np.dtype
    shards: list[_Adoption]

    @classmethod
    def prepare(cls, inputs: Sequence[str], tokenizer: Path, output: Path) -> "_Job":
        """Check everything that can be checked before anything is written."""
        folder = WorkFolder(output)
        if not folder.begun:
            refuse_existing(output)
        found = find_token_files(inputs)
        folder.refuse_as_input([split_source(item)[1] for item in inputs], [tokens.data for tokens in found])
        loaded = Tokenizer.load(tokenizer)
        shards = [_Adoption(f"shard-{number:05d}", _key(tokens, loaded), tokens) for number, tokens in enumerate(found)]
        return cls(folder=folder, tokenizer=loaded, dtype=_common_dtype(found), shards=shards)

    @property
    def recipe(self) -> str:
        """What the corpus is made of: the pairs in order, and the tokenizer."""
        pairs = [[tokens.source, tokens.layout, tokens.path, tokens.num_bytes, tokens.index_bytes] for _, _, tokens in self.shards]
        return fingerprint.of_json([self.tokenizer.fingerprint, pairs])

    def existing(self) -> Corpus:
        """The finished corpus, if it is the one this call would make; its ledger must show the tokens as they are now."""
        corpus = Corpus.open(self.folder.corpus)
        ledgers = corpus.inputs().to_pylist()
        same = corpus.record["recipe"] == self.recipe and len(ledgers) == len(self.shards)
        if not same or not all(is_unchanged(shard.tokens, ledger) for shard, ledger in zip(self.shards, ledgers, strict=True)):
            raise UserError(f"{corpus.path} already holds a corpus made from other input. Choose another name, or remove it first.")
        self.folder.remove()  # a job killed after its last step leaves it
        return corpus

    def adopt(self, workers: int, progress: ProgressCallback | None) -> None:
        """Do the shards that have no record, the largest first."""
        todo = [shard for shard in self.shards if self.folder.kept_shard(shard.name, shard.key) is None]
        todo.sort(key=lambda shard: -shard.tokens.num_bytes)
        total, left = (sum(shard.tokens.num_bytes for shard in shards) for shards in (self.shards, todo))
        logger.info("importing %d of %d shards, %d of %d bytes", len(todo), len(self.shards), left, total)
        work = ImportWork(self.folder, self.dtype, self.tokenizer.vocabulary_size, self.tokenizer.eos_id)
        run_tasks(work, todo, max(min(workers, left // _BYTES_PER_WORKER), 1), Reporter(progress, "import", total, total - left))

    def finish(self) -> None:
        """Write ledger, tokenizer and, last, corpus.json."""
        records = [record for shard in self.shards if (record := self.folder.kept_shard(shard.name, shard.key)) is not None]
        assert len(records) == len(self.shards), "a shard has no record although every task ended well"
        ledgers = [record["ledger"] for record in records]
        for ledger in ledgers:
            if ledger["special_strings"]:
                message = "%s: %d documents hold the EOS inside, %d times; they are kept as they are"
                logger.info(message, ledger["file"], ledger["special_documents"], ledger["special_strings"])
        options = {"special_in_text": None, "max_reject_rate": None, "shard_size": None, "recipe": self.recipe}
        with explained_disk_errors(self.folder.corpus):
            write_corpus(self.folder.corpus, self.tokenizer, self.dtype, records, ledgers, options)


def _key(tokens: TokenFile, tokenizer: Tokenizer) -> str:
    found = [tokens.num_bytes, tokens.modified_ns, tokens.index_bytes, tokens.index_modified_ns]
    return fingerprint.of_json([tokenizer.fingerprint, tokens.source, tokens.layout, tokens.path, *found])


def _common_dtype(found: Sequence[TokenFile]) -> np.dtype:
    first = found[0].dtype()
    for tokens in found:
        if tokens.dtype() != first:
            raise UserError(
                f"{tokens.path} stores {tokens.dtype().name} tokens, {found[0].path} {first.name}. A corpus has one type: import them apart, or make one of "
                "them again."
            )
    return first


@dataclass(frozen=True)
class ImportWork:
    """Making shards of pairs (`preprocess_workers.Work`)."""

    folder: WorkFolder
    dtype: np.dtype
    vocabulary_size: int
    eos_id: int

    @property
    def directory(self) -> Path:
        return self.folder.path

    def open(self, counters: Counters) -> Callable[[_Adoption], None]:
        return lambda shard: self._adopt(shard, counters)

    def _adopt(self, shard: _Adoption, counters: Counters) -> None:
        tokens, prefix = shard.tokens, self.folder.corpus / shard.name
        rows = DocumentMapWriter(Path(f"{prefix}.docs.parquet"))
        try:
            ends = read_index(tokens, rows, self.eos_id)
            docs_sum = rows.close()
        except BaseException:
            rows.abandon()
            raise
        check = TokenCheck(tokens, ends, self.vocabulary_size, self.eos_id)

        def look(block: bytes) -> None:
            ids = check.add(block, self.dtype)
            counters.add(read_bytes=len(block), tokens=ids)

        reader = InputReader(tokens.data)
        bin_sum = _reuse(reader, Path(f"{prefix}.bin"), look)
        check.close()
        if tokens.layout == "megatron":
            idx_sum = _reuse(InputReader(tokens.index), Path(f"{prefix}.idx"), lambda _: None)
        else:
            idx_sum = write_index(Path(f"{prefix}.idx"), np.diff(ends, prepend=0), self.dtype)
        record = {"key": shard.key, "name": shard.name, "source": tokens.source, "num_tokens": int(ends[-1]), "num_documents": len(ends)}
        record["ledger"] = _ledger(tokens, reader.hash, check)
        self.folder.keep_shard(record, {"bin": bin_sum, "idx": idx_sum, "docs.parquet": docs_sum})


def _reuse(reader: InputReader, target: Path, look: Callable[[bytes], None]) -> FileSum:
    """Give a file a second name, or copy it where the disk is another one; `look` sees every block of it on the way."""
    copy = None if link_file(reader.path, target) else SummedWriter(target)
    sums = BlockSums()
    try:
        for block in reader.blocks():
            look(block)
            if copy:
                copy.write(block)
            else:
                sums.update(block)
        return copy.finish() if copy else FileSum(reader.num_bytes, sums.finish())
    except BaseException:
        if copy:
            copy.abandon()
        else:
            target.unlink()
        raise


def _ledger(tokens: TokenFile, hash_: str, check: TokenCheck) -> dict[str, Any]:
    ledger = FileLedger(tokens.path, tokens.source, tokens.layout, "plain", tokens.num_bytes, tokens.modified_ns, hash_)
    ledger.lines_in = ledger.docs_out = len(check.ends)
    ledger.tokens = int(check.ends[-1])
    ledger.special_documents, ledger.special_strings = check.documents_with_inner_eos, check.num_inner_eos
    return ledger.as_record() | dict.fromkeys(_UNKNOWN)
