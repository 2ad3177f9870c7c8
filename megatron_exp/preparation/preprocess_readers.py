"""Documents out of input files: (line, id, text), with every line that is not a document entered in the ledger."""

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_exp.errors import UserError
from megatron_exp.preparation import preprocess_bytes
from megatron_exp.preparation.preprocess_bytes import InputReader, decompressed, lines, whole
from megatron_exp.preparation.preprocess_inputs import InputFile
from megatron_exp.preparation.preprocess_ledger import FileLedger

_BOM = b"\xef\xbb\xbf"
_MISSING = object()
_TOO_LONG = object()
_PARQUET_ROWS = 1024
_PARQUET_BYTES = 16 << 20
_ARROW_DAMAGE = (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError)


class Document(NamedTuple):
    """line counts from 1. id: that of the input, else the line number; a text file's is its name. Ids need not be unique."""

    line: int
    id: str
    text: str


def read_documents(file: InputFile, ledger: FileLedger, on_bytes: Callable[[int], None]) -> Iterator[Document]:
    """The documents of a file in order. `on_bytes` is told how many stored bytes were read.

    When it ends, the ledger holds lines_in, the rejects and the hash of the file.
    """
    read = {"jsonl": _json_lines, "parquet": _parquet, "text": _text}[file.format]
    yield from read(file, ledger, on_bytes)


def _json_lines(file: InputFile, ledger: FileLedger, on_bytes: Callable[[int], None]) -> Iterator[Document]:
    reader = InputReader(file.path, on_bytes)
    number = 0
    for block in lines(decompressed(reader, file.codec)):
        for line in block:
            number += 1
            if number == 1 and line is not None:
                line = line.removeprefix(_BOM)
            if line is not None and (not line or line.isspace()):
                ledger.blank_lines += 1
                continue
            ledger.lines_in += 1
            parsed = "too_long" if line is None else _parse_line(line, number, ledger)
            if len(block) == 1:  # perhaps a long line: nothing keeps it, nor its document, longer than needed
                line = block[0] = None
            if isinstance(parsed, str):
                ledger.reject(number, parsed)
            else:
                yield parsed
                parsed = ""
    _close(reader, file, ledger)


def _close(reader: InputReader, file: InputFile, ledger: FileLedger) -> None:
    """Enter the hash; UserError where the file is not the one that was listed."""
    ledger.hash = reader.hash
    if reader.num_bytes != file.num_bytes:
        raise UserError(
            f"{file.path} had {file.num_bytes} bytes when the job began and {reader.num_bytes} when it was read. "
            "Something is still writing it: wait, then run again."
        )


def _parse_line(line: bytes, number: int, ledger: FileLedger) -> Document | str:
    """The document of a line, or the reason why there is none."""
    try:
        return _document_of(orjson.loads(line), number)
    except orjson.JSONDecodeError:
        parsed = _parse_nonstandard(line, number)
        ledger.nonstandard_lines += not isinstance(parsed, str)
        return parsed


def _parse_nonstandard(line: bytes, number: int) -> Document | str:
    """Second reading, by Python's json, of a line that strict JSON refuses.

    Python writes NaN and lone surrogates without a word, so such lines exist in metadata around sound texts; those are kept.
    """
    try:
        document = _document_of(json.loads(line.decode("utf-8")), number)
    except UnicodeDecodeError:
        return "invalid_utf8"
    except (ValueError, RecursionError):
        return "invalid_json"
    if isinstance(document, str):
        return document
    if not _is_unicode(document.text):
        return "lone_surrogate"
    return document if _is_unicode(document.id) else "bad_id"


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _document_of(value: Any, number: int) -> Document | str:
    if not isinstance(value, dict):
        return "not_an_object"
    return _checked(value.get("text", _MISSING), value.get("id"), number)


def _checked(text: Any, identity: Any, number: int) -> Document | str:
    if text is _MISSING:
        return "missing_text"
    if text is None:
        return "null_text"
    if not isinstance(text, str):
        return "text_not_a_string"
    if not text:
        return "empty_text"
    if identity is None:
        return Document(number, str(number), text)
    if isinstance(identity, bool) or not isinstance(identity, (str, int)):
        return "bad_id"
    return Document(number, str(identity), text)


def _text(file: InputFile, ledger: FileLedger, on_bytes: Callable[[int], None]) -> Iterator[Document]:
    """A text file is one document; a file of no bytes is none."""
    reader = InputReader(file.path, on_bytes)
    content = whole(decompressed(reader, file.codec))
    _close(reader, file, ledger)
    if content == b"":
        return
    ledger.lines_in += 1
    if content is None:
        ledger.reject(1, "too_long")
        return
    try:
        text = content.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError:
        ledger.reject(1, "invalid_utf8")
        return
    parsed = _checked(text, file.path.rsplit("/", 1)[-1], 1)
    if isinstance(parsed, str):
        ledger.reject(1, parsed)
    else:
        yield parsed


def _parquet(file: InputFile, ledger: FileLedger, on_bytes: Callable[[int], None]) -> Iterator[Document]:
    reader = InputReader(file.path)
    for _ in reader.blocks():  # hashed in a pass of its own: columns are read in another order than the file's
        pass
    _close(reader, file, ledger)
    try:
        table = pq.ParquetFile(file.path, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True)
        columns = _columns(file, table.schema_arrow)
        number = 0
        for batch in _small_batches(table, columns):
            on_bytes(file.num_bytes * batch.num_rows // max(table.metadata.num_rows, 1))
            texts, ids = (_values(batch, name) for name in ("text", "id"))
            for text, identity in zip(texts, ids, strict=True):
                number += 1
                ledger.lines_in += 1
                parsed = _checked(text, identity, number) if isinstance(text, str) else _checked_value(text, identity, number)
                if isinstance(parsed, str):
                    ledger.reject(number, parsed)
                else:
                    yield parsed
    except _ARROW_DAMAGE as error:
        raise UserError(
            f"{file.path} cannot be read as Parquet ({error}). It is damaged or cut short, so nothing of it is used. Fetch or make it again."
        ) from error
    if number != table.metadata.num_rows:
        raise UserError(
            f"{file.path} says it has {table.metadata.num_rows} rows but {number} could be read. It is damaged: fetch or make it again."
        )


def _small_batches(table: pq.ParquetFile, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """The rows in batches of about _PARQUET_BYTES, as the sizes of row groups tell; where rows differ much, such a batch is cut once more."""
    groups = itertools.groupby(range(table.num_row_groups), key=lambda group: _batch_rows(table.metadata.row_group(group), columns))
    for num_rows, alike in groups:
        for batch in table.iter_batches(batch_size=num_rows, row_groups=list(alike), columns=columns, use_threads=False):
            step = max(batch.num_rows * _PARQUET_BYTES // max(batch.nbytes, 1), 1)
            yield from (batch.slice(start, step) for start in range(0, batch.num_rows, step))


def _batch_rows(group: pq.RowGroupMetaData, columns: list[str]) -> int:
    """A power of two, so that row groups of much the same size are read in one go."""
    stored = (group.column(number) for number in range(group.num_columns))
    num_bytes = sum(column.total_uncompressed_size for column in stored if column.path_in_schema in columns)
    wanted = group.num_rows * _PARQUET_BYTES // max(num_bytes, 1)
    return min(1 << max(wanted.bit_length() - 1, 0), _PARQUET_ROWS)


def _columns(file: InputFile, schema: pa.Schema) -> list[str]:
    if "text" not in schema.names:
        raise UserError(
            f"{file.path} has no column `text`; its columns are {', '.join(schema.names)}. Rename the column that holds the text."
        )
    repeated = [name for name in ("text", "id") if schema.names.count(name) > 1]
    if repeated:
        raise UserError(f"{file.path} has several columns `{repeated[0]}`, so which one is meant is not known. Rename all but one.")
    kind = schema.field("text").type
    if not _is_text(kind):
        raise UserError(f"{file.path}: the column `text` has type {kind}, not string. Convert it to UTF-8 strings.")
    return ["text", "id"] if "id" in schema.names else ["text"]


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _checked_value(text: Any, identity: Any, number: int) -> Document | str:
    """What becomes of a text that is no string."""
    if text is _TOO_LONG:
        return "too_long"
    return "invalid_utf8" if isinstance(text, bytes) else _checked(text, identity, number)


def _values(batch: pa.RecordBatch, name: str) -> list[Any]:
    """Python values of a column; a string that is not UTF-8 comes as bytes, one above the limit as _TOO_LONG, a column that is not there as nulls."""
    if name not in batch.schema.names:
        return [None] * batch.num_rows
    column = batch.column(name)
    if column.nbytes > preprocess_bytes.MAX_RECORD_BYTES and _is_text(column.type):
        return [_bounded(value) for value in column]
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_decoded(value) for value in column.cast(pa.large_binary()).to_pylist()]


def _bounded(scalar: Any) -> object:
    """The value of one string; its length is looked at before there is a second copy of it."""
    scalar = scalar.value if isinstance(scalar, pa.DictionaryScalar) else scalar
    if scalar is None or not scalar.is_valid:
        return None
    data = scalar.as_buffer()
    return _TOO_LONG if data.size > preprocess_bytes.MAX_RECORD_BYTES else _decoded(data.to_pybytes())


def _decoded(value: bytes | None) -> str | bytes | None:
    try:
        return None if value is None else value.decode("utf-8")
    except UnicodeDecodeError:
        return value
