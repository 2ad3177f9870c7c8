"""A tokenised corpus on disk: `corpus.json` is read at once, shards and maps when they are first needed."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import orjson
import pyarrow as pa

from megatron_exp import fingerprint
from megatron_exp.errors import UserError
from megatron_exp.files import require_file, safe_join, write_file
from megatron_exp.shards import documents
from megatron_exp.shards.indexed import IndexedReader, open_tokens

if TYPE_CHECKING:
    from megatron_exp.shards.tokenizer import Tokenizer

SCHEMA_VERSION = 1
RECORD_NAME = "corpus.json"
INPUTS_NAME = "inputs.parquet"
TOKENIZER_FOLDER = "tokenizer"


class Shard(NamedTuple):
    """One shard: an indexed dataset of one source. Its files are `NAME.bin`, `.idx`, `.docs.parquet`, `.sums.npy`."""

    name: str
    source: str
    num_tokens: int
    num_documents: int
    dtype: np.dtype


@dataclass(frozen=True, eq=False)
class Corpus:
    """An ordered list of shards with their tokenizer. record: the content of corpus.json.

    cache: where tokens are read instead of in `path` (`megatron_exp.shards.cache`).
    """

    path: Path
    record: dict[str, Any]
    shards: tuple[Shard, ...]
    cache: Path | None = None
    _tokens: dict[int, np.ndarray] = field(default_factory=dict, repr=False)
    _starts: dict[int, np.ndarray] = field(default_factory=dict, repr=False)
    _indexes: dict[int, IndexedReader] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, path: Path) -> "Corpus":
        """Read corpus.json and nothing else; UserError where it is missing, damaged or of another version."""
        path = Path(path)
        file = require_file(path / RECORD_NAME, "the record of a corpus made by `preprocess`")
        try:
            record = orjson.loads(file.read_bytes())
            checksum = record.pop("checksum")
        except (orjson.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
            raise UserError(
                f"{file} is not the record of a corpus ({error!r}). It is damaged: restore it, or make the corpus again."
            ) from error
        if record.get("schema_version") != SCHEMA_VERSION:
            raise UserError(
                f"{file} has schema version {record.get('schema_version')}, this program reads {SCHEMA_VERSION}. Make the corpus again."
            )
        if checksum != fingerprint.of_json(record):
            raise UserError(
                f"{file} was changed after it was written: it does not agree with its own checksum. Restore it, or make the corpus again."
            )
        shards = tuple(
            Shard(shard["name"], shard["source"], shard["num_tokens"], shard["num_documents"], np.dtype(record["dtype"]).newbyteorder("<"))
            for shard in record["shards"]
        )
        return cls(path, record, shards)

    @property
    def fingerprint(self) -> str:
        """Of tokens, document borders, sources, shard order and tokenizer; not of paths, names or file encodings."""
        return self.record["fingerprint"]

    @property
    def vocabulary_size(self) -> int:
        return self.record["tokenizer"]["vocabulary_size"]

    @property
    def eos_id(self) -> int:
        return self.record["tokenizer"]["eos_id"]

    @property
    def tokenizer_fingerprint(self) -> str:
        return self.record["tokenizer"]["fingerprint"]

    @property
    def num_tokens(self) -> int:
        return sum(shard.num_tokens for shard in self.shards)

    @property
    def num_documents(self) -> int:
        return sum(shard.num_documents for shard in self.shards)

    def file(self, shard: int, suffix: str) -> Path:
        """Path of one of a shard's files, e.g. suffix `bin` or `docs.parquet`."""
        return safe_join(self.path, f"{self.shards[shard].name}.{suffix}")

    def tokens(self, shard: int) -> np.ndarray:
        """All token ids of a shard, memory-mapped and read-only; UserError naming the file where its length is wrong."""
        if shard not in self._tokens:
            entry = self.shards[shard]
            path = self.file(shard, "bin") if self.cache is None else safe_join(self.cache, f"{entry.name}.bin")
            self._tokens[shard] = open_tokens(path, entry.dtype, entry.num_tokens)
        return self._tokens[shard]

    def document_starts(self, shard: int) -> np.ndarray:
        """int64 [num_documents + 1]: first token of each document, and the number of tokens."""
        if shard not in self._starts:
            self._starts[shard] = self._index(shard).starts
        return self._starts[shard]

    def _index(self, shard: int) -> IndexedReader:
        if shard not in self._indexes:
            self._indexes[shard] = IndexedReader(safe_join(self.path, self.shards[shard].name))
        return self._indexes[shard]

    def documents(self, shard: int) -> pa.Table:
        """The document map of a shard (file, line, id); row i is document i."""
        return documents.read_documents(self.file(shard, "docs.parquet"))

    def locate(self, shard: int, token_offset: int, *, from_index: bool = False) -> dict[str, Any]:
        """Where the token at this offset of a shard came from: {file, line, id, document, offset in the document}.

        from_index: without file, line and id, whose map takes some milliseconds to read.
        """
        index = self._index(shard)
        if not 0 <= token_offset < index.num_tokens:
            raise UserError(f"Shard {self.shards[shard].name} has {index.num_tokens} tokens; there is no token {token_offset}.")
        document, start = index.document_of(token_offset)
        source = {} if from_index else documents.read_document(self.file(shard, "docs.parquet"), document)
        return {**source, "document": document, "offset": token_offset - start}

    def inputs(self) -> pa.Table:
        """The ledger: one row per input file (`preparation.preprocess_ledger.INPUTS_SCHEMA`)."""
        return documents.read_table(safe_join(self.path, INPUTS_NAME), "the ledger of a corpus")

    def tokenizer(self) -> "Tokenizer":
        """The tokenizer from the copy inside the corpus; UserError where it is not the one the shards were made with."""
        from megatron_exp.shards.tokenizer import Tokenizer  # loads two tokenizer libraries, which most readers do not need

        tokenizer = Tokenizer.load(self.path / TOKENIZER_FOLDER)
        if tokenizer.fingerprint != self.tokenizer_fingerprint:
            raise UserError(
                f"{self.path / TOKENIZER_FOLDER} holds another tokenizer than the one this corpus was made with. "
                "Put the original file back, or make the corpus again."
            )
        return tokenizer

    def check_sizes(self) -> None:
        """UserError naming the first shard whose token file is missing or has another length; no byte is read."""
        for shard, entry in enumerate(self.record["shards"]):
            path, wanted = self.file(shard, "bin"), entry["files"]["bin"]["bytes"]
            found = require_file(path, "the tokens of a shard").stat().st_size
            if found != wanted:
                raise UserError(
                    f"{path} has {found} bytes, but {wanted} were written. The shard is damaged: restore it, or make the corpus again."
                )

    def verify(self) -> Iterator[str]:
        """Read every byte and compare it with what was recorded; yields one sentence per finding, none for a sound corpus."""
        from megatron_exp.shards.verify import findings

        return findings(self)


def logical_fingerprint(tokenizer: dict[str, Any], shards: list[dict[str, Any]]) -> str:
    """Fingerprint of a corpus from the records of its tokenizer and shards."""
    columns = ("source", "num_tokens", "num_documents")
    content = [[*(shard[name] for name in columns), shard["files"]["bin"]["root"], shard["files"]["idx"]["root"]] for shard in shards]
    return fingerprint.of_json({"tokenizer": tokenizer["fingerprint"], "eos_id": tokenizer["eos_id"], "shards": content})


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write corpus.json, the last file of a corpus, with a checksum over its content."""
    content = {**record, "checksum": fingerprint.of_json(record)}
    write_file(Path(path) / RECORD_NAME, orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
