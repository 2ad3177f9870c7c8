"""One unit of work: its input files become a token file, a document map and, last of all, a done-record."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from megatron_exp.errors import UserError
from megatron_exp.files import write_file
from megatron_exp.preparation.preprocess_bytes import InputReader
from megatron_exp.preparation.preprocess_encode import Encoded, Encoders, SpecialStrings
from megatron_exp.preparation.preprocess_inputs import InputFile, StoredFile, Unit
from megatron_exp.preparation.preprocess_ledger import FileLedger, check_rejects
from megatron_exp.preparation.preprocess_progress import Counters
from megatron_exp.preparation.preprocess_readers import Document, read_documents
from megatron_exp.shards.checksums import ARRAY_ERRORS, FileSum, SummedWriter, root_of, write_array
from megatron_exp.shards.documents import UNIT_SCHEMA, DocumentMapWriter
from megatron_exp.shards.indexed import token_dtype

_BATCH_CHARACTERS = 4 << 20
_BATCH_DOCUMENTS = 20_000
_ALONE_CHARACTERS = 32 << 20
_CHECK_EVERY = 1000
# The reference library keeps about 90 bytes per byte of text, so of a longer document this much is encoded by both.
_CHECK_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class UnitFiles:
    """Where a unit's results lie."""

    directory: Path
    key: str

    @property
    def tokens(self) -> Path:
        return self.directory / f"{self.key}.bin"

    @property
    def sums(self) -> Path:
        return self.directory / f"{self.key}.sums.npy"

    @property
    def documents(self) -> Path:
        return self.directory / f"{self.key}.docs.parquet"

    @property
    def record(self) -> Path:
        return self.directory / f"{self.key}.json"


@dataclass(frozen=True)
class UnitWork:
    """Tokenising units (`preprocess_workers.Work`). directory: where their results go."""

    encoders: Encoders
    directory: Path
    stop_at_reject: bool

    def open(self, counters: Counters) -> Callable[[Unit], None]:
        return lambda unit: self._do(unit, counters)

    def _do(self, unit: Unit, counters: Counters) -> None:
        ledgers = tokenise_unit(unit, self.encoders, self.directory, counters)
        if self.stop_at_reject:
            check_rejects([ledger.as_record() for ledger in ledgers], max_reject_rate=0.0)


def done_record(unit: Unit, directory: Path) -> dict[str, Any] | None:
    """The done-record of a unit, if it is finished and its input is still the same.

    A file with the recorded size and modification time is taken to be unchanged; one that was only touched or copied is
    hashed. The unit's results are checked against their sums when they are merged.
    """
    files = UnitFiles(directory, unit.key)
    try:
        record = orjson.loads(files.record.read_bytes())
    except (FileNotFoundError, orjson.JSONDecodeError):
        return None
    present = all(
        path.is_file() and path.stat().st_size == record[name]["bytes"] for name, path in (("bin", files.tokens), ("docs", files.documents))
    )
    if not present or not files.sums.is_file():
        return None
    same = all(is_unchanged(file, ledger) for file, ledger in zip(unit.files, record["ledgers"], strict=True))
    return record if same else None


def is_unchanged(file: StoredFile, ledger: Mapping[str, Any]) -> bool:
    """Whether an input file is the one a ledger was made from."""
    if file.num_bytes != ledger["bytes"]:
        return False
    if file.modified_ns == ledger["modified_ns"]:
        return True
    reader = InputReader(file.path)
    for _ in reader.blocks():
        pass
    return reader.hash == ledger["hash"]


def tokenise_unit(unit: Unit, encoders: Encoders, directory: Path, counters: Counters) -> list[FileLedger]:
    """Do the work of a unit. Nothing counts until the done-record, written last, is durable."""
    files = UnitFiles(directory, unit.key)
    writer = _UnitWriter(files, encoders, counters)
    ledgers = []
    with ExitStack() as stack:
        stack.callback(writer.abandon)
        for file in unit.files:
            ledgers.append(writer.add_file(file))
        bin_sum, docs_sum = writer.close()
    write_array(files.sums, bin_sum.sums)
    record = {
        "key": unit.key,
        "source": unit.source,
        "num_documents": sum(ledger.docs_out for ledger in ledgers),
        "num_tokens": sum(ledger.tokens for ledger in ledgers),
        "bin": bin_sum.as_record(),
        "docs": docs_sum.as_record(),
        "ledgers": [ledger.as_record() for ledger in ledgers],
    }
    write_file(files.record, orjson.dumps(record))
    return ledgers


def unit_sums(files: UnitFiles, record: Mapping[str, Any]) -> np.ndarray:
    """The block sums of a unit's tokens; UserError where they are not the recorded ones."""
    try:
        sums = np.load(files.sums, allow_pickle=False)
    except ARRAY_ERRORS:
        sums = np.empty(0, np.uint64)
    if root_of(sums) != record["bin"]["root"]:
        raise UserError(
            f"{files.sums} was changed or damaged after it was written. Remove {files.record} and run the same command again; only its input is read again."
        )
    return sums


class _UnitWriter:
    """Encodes documents in batches and writes ids and rows of the document map."""

    def __init__(self, files: UnitFiles, encoders: Encoders, counters: Counters):
        self._encoders, self._counters = encoders, counters
        self._dtype = token_dtype(encoders.tokenizer.vocabulary_size)
        self._specials = SpecialStrings(list(encoders.tokenizer.special_strings))
        self._num_documents = 0
        self._tokens = SummedWriter(files.tokens)
        self._map = DocumentMapWriter(files.documents, UNIT_SCHEMA)

    def add_file(self, file: InputFile) -> FileLedger:
        ledger = FileLedger(file.path, file.source, file.format, file.codec, file.num_bytes, file.modified_ns)
        documents = read_documents(file, ledger, lambda num_bytes: self._counters.add(read_bytes=num_bytes))
        for batch, counts in _ahead((batch, [self._specials.count(document.text) for document in batch]) for batch in _batches(documents)):
            self._add_batch(batch, counts, ledger)
            batch.clear()  # its texts may be long, and the next batch is made before these names are used again
        ledger.close()
        return ledger

    def _add_batch(self, batch: list[Document], counts: list[int], ledger: FileLedger) -> None:
        """counts: strings of special tokens in each document."""
        ledger.special_documents += sum(1 for count in counts if count)
        ledger.special_strings += sum(counts)
        if self._encoders.special == "reject":
            for document in (document for document, count in zip(batch, counts, strict=True) if count):
                ledger.reject(document.line, "special_string")
            batch = [document for document, count in zip(batch, counts, strict=True) if not count]
            counts = [0] * len(batch)
        if not batch:
            return
        encoded = self._encoders.bulk.encode([document.text for document in batch])
        self._check_ids(encoded, len(batch), ledger)
        self._check_sample(encoded, batch, counts, ledger)
        self._write(encoded, batch, ledger)

    def _check_ids(self, encoded: Encoded, num_documents: int, ledger: FileLedger) -> None:
        """The encoder returned every document, only ids of the vocabulary, and no EOS inside a text that is plain."""
        assert len(encoded.lengths) == num_documents and int(encoded.lengths.sum()) == len(encoded.ids), (
            "the encoder lost documents or tokens"
        )
        if not len(encoded.ids):
            return
        limit, eos = self._encoders.tokenizer.vocabulary_size, self._encoders.tokenizer.eos_id
        if int(encoded.ids.min()) < 0 or int(encoded.ids.max()) >= limit:
            raise UserError(
                f"{ledger.file}: the tokenizer gave ids up to {int(encoded.ids.max())}, above its vocabulary of {limit}. Its file contradicts itself."
            )
        if self._encoders.special != "special" and bool((encoded.ids == eos).any()):
            raise UserError(
                f"{ledger.file}: the tokenizer turns some text into its EOS (id {eos}), so documents would end in the middle. If this is wanted, use "
                "special_in_text=special; else give the tokenizer an EOS that text cannot become (a special token)."
            )

    def _check_sample(self, encoded: Encoded, batch: list[Document], counts: list[int], ledger: FileLedger) -> None:
        """Re-encode one document in a thousand, and every one that holds a special string, with the reference library."""
        first, self._num_documents = self._num_documents, self._num_documents + len(batch)
        if self._encoders.bulk.is_reference:
            return
        ends = np.cumsum(encoded.lengths)
        for index, document in enumerate(batch):
            if (first + index) % _CHECK_EVERY and not counts[index]:
                continue
            text, ids = document.text, encoded.ids[ends[index] - encoded.lengths[index] : ends[index]]
            if len(text) > _CHECK_CHARACTERS:
                text = text[:_CHECK_CHARACTERS]
                ids = self._encoders.bulk.encode([text]).ids
            if not np.array_equal(ids, self._encoders.reference.encode([text]).ids):
                raise UserError(
                    f"{ledger.file}, line {document.line}: {self._encoders.bulk.name} gives other token ids than the reference library. Nothing after this "
                    "can be trusted, so the run stops. Run again with the backend `reference`, into another directory."
                )
            ledger.checked_documents += 1

    def _write(self, encoded: Encoded, batch: list[Document], ledger: FileLedger) -> None:
        """Ids with an EOS after each document, and the rows of the map."""
        ended = np.empty(len(encoded.ids) + len(batch), self._dtype)
        is_text = np.ones(len(ended), dtype=bool)
        last = np.cumsum(encoded.lengths + 1) - 1
        is_text[last] = False
        ended[is_text] = encoded.ids
        ended[last] = self._encoders.tokenizer.eos_id
        self._tokens.write(ended.data)
        self._map.add(
            pa.table(
                {
                    "file": pa.repeat(ledger.file, len(batch)),
                    "line": [document.line for document in batch],
                    "id": [document.id for document in batch],
                    "num_tokens": encoded.lengths + 1,
                }
            )
        )
        num_tokens = len(ended)
        del ended, is_text  # before long texts are encoded to count their bytes
        text_bytes = sum(len(document.text) if document.text.isascii() else len(document.text.encode()) for document in batch)
        ledger.docs_out += len(batch)
        ledger.tokens += num_tokens
        ledger.text_bytes += text_bytes
        self._counters.add(text_bytes=text_bytes, documents=len(batch), tokens=num_tokens)

    def close(self) -> tuple[FileSum, FileSum]:
        return self._tokens.finish(), self._map.close()

    def abandon(self) -> None:
        """Drop what was written; does nothing after `close`."""
        self._tokens.abandon()
        self._map.abandon()


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Documents in batches whose borders depend on the documents alone. A batch is the caller's: it may be emptied."""
    batch: list[Document] = []
    num_characters = 0
    for document in documents:
        batch.append(document)
        num_characters += len(document.text)
        del document  # where it is long, the next one is read without it
        if num_characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _ahead(batches: Iterator[tuple[list[Document], list[int]]]) -> Iterator[tuple[list[Document], list[int]]]:
    """The same batches, each made by a thread while the one before is encoded, which leaves the interpreter free.

    After a batch of very long documents nothing is read ahead: two of them would not fit into the memory that is promised.
    """
    with ThreadPoolExecutor(1, "read-ahead") as thread:
        coming = thread.submit(next, batches, None)
        while (made := coming.result()) is not None:
            is_long = sum(len(document.text) for document in made[0]) > _ALONE_CHARACTERS
            if not is_long:
                coming = thread.submit(next, batches, None)
            yield made
            if is_long:
                coming = thread.submit(next, batches, None)
