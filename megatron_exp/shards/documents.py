"""The document map: which file, line and id each document of a shard came from, as Parquet beside the shard."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_exp.errors import UserError
from megatron_exp.files import require_file
from megatron_exp.shards.checksums import FileSum, SummedWriter

SCHEMA = pa.schema([("file", pa.string()), ("line", pa.uint64()), ("id", pa.string())])
"""Row i is document i. line counts from 1: a line of JSON lines, a row of a Parquet file, always 1 for a plain text file."""

UNIT_SCHEMA = SCHEMA.append(pa.field("num_tokens", pa.int32()))
"""The map of a unit of work, before merging; num_tokens includes the EOS."""

_BATCH_ROWS = 8192

ROW_GROUP = 65_536
"""Documents per row group: what is read to place one document."""


class DocumentMapWriter:
    """Writes a document map in row groups of fixed size, so that its bytes do not depend on how rows arrive."""

    def __init__(self, path: Path, schema: pa.Schema = SCHEMA):
        self._schema = schema
        self._sink = SummedWriter(path)
        self._parquet = pq.ParquetWriter(self._sink, schema, compression="zstd", use_dictionary=["file"], write_statistics=False)
        self._waiting: list[pa.Table] = []
        self._num_waiting = 0

    def add(self, rows: pa.Table) -> None:
        """Append rows; columns beyond the schema are left out."""
        self._waiting.append(rows.select(self._schema.names).cast(self._schema))
        self._num_waiting += rows.num_rows
        if self._num_waiting >= ROW_GROUP:
            self._write_groups()

    def _write_groups(self, *, last: bool = False) -> None:
        table = pa.concat_tables(self._waiting) if self._waiting else self._schema.empty_table()
        stop = table.num_rows if last else table.num_rows - table.num_rows % ROW_GROUP
        for start in range(0, stop, ROW_GROUP):
            self._parquet.write_table(table.slice(start, min(ROW_GROUP, stop - start)), row_group_size=ROW_GROUP)
        self._waiting, self._num_waiting = [table.slice(stop)], table.num_rows - stop

    def close(self) -> FileSum:
        """Write what is left and make the file durable."""
        self._write_groups(last=True)
        self._parquet.close()
        return self._sink.finish()

    def abandon(self) -> None:
        """Drop what was written."""
        self._sink.abandon()


def _open(path: Path, what: str = "the document map of a shard") -> pq.ParquetFile:
    path = require_file(path, what)
    try:
        return pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file ({error}). It is damaged: restore it, or make the corpus again.") from error


def num_documents(path: Path) -> int:
    """Rows of a document map, from its footer."""
    return _open(path).metadata.num_rows


def read_documents(path: Path, start: int = 0, stop: int | None = None, columns: list[str] | None = None) -> pa.Table:
    """Rows [start, stop) of a document map, all columns or some; only the row groups that hold them are read."""
    file = _open(path)
    stop = file.metadata.num_rows if stop is None else stop
    first = start // ROW_GROUP
    groups = range(first, min(-(-stop // ROW_GROUP), file.num_row_groups))
    return file.read_row_groups(list(groups), columns=columns).slice(start - first * ROW_GROUP, stop - start)


@lru_cache(maxsize=256)
def _opened(path: Path, modified_ns: int) -> pq.ParquetFile:
    return _open(path)


def read_document(path: Path, number: int) -> dict[str, Any]:
    """One row of a document map. Files stay open, and of a row group only what precedes the row is decoded."""
    file = _opened(path, require_file(path, "the document map of a shard").stat().st_mtime_ns)
    group, row = divmod(number, ROW_GROUP)
    for batch in file.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group], use_threads=False):
        if row < batch.num_rows:
            return batch.slice(row, 1).to_pylist()[0]
        row -= batch.num_rows
    raise IndexError(f"document {number} of {path}")


def read_table(path: Path, what: str) -> pa.Table:
    """A whole Parquet file; UserError naming it, and what was expected there, where it is missing or damaged."""
    return _open(path, what).read()
