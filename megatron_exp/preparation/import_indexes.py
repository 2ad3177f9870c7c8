"""Where documents end, as the index of imported tokens says, and where they came from."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from megatron_exp.errors import UserError
from megatron_exp.preparation.import_inputs import TokenFile
from megatron_exp.preparation.preprocess_bytes import InputReader, codec_of, decompressed
from megatron_exp.shards.documents import ROW_GROUP, DocumentMapWriter
from megatron_exp.shards.indexed import IndexedReader

_COLUMNS = {"start": pa.int64(), "end": pa.int64(), "id": pa.string(), "src": pa.string(), "loc": pa.int64()}
_CSV_BLOCK_BYTES = 8 << 20
_NPY_MAGIC = b"\x93NUMPY"
_TOKEN_BYTES = 4  # of a dolma array
_PROBED_DOCUMENTS = 1000


def read_index(tokens: TokenFile, rows: DocumentMapWriter, eos_id: int) -> np.ndarray:
    """Ends of the documents, int64 [num_documents], in tokens and strictly increasing; their origins go into the document map.

    A Megatron index does not know where documents came from: they are mapped to their number, from 1, in the .bin file.

    Raises:
        UserError: The index is damaged, or does not describe exactly the bytes beside it.
    """
    ends = _read_megatron(tokens, rows) if tokens.layout == "megatron" else _read_dolma(tokens, rows, eos_id)
    if not len(ends):
        raise UserError(f"{tokens.index} lists no document. Leave this pair out.")
    empty = np.flatnonzero(np.diff(ends, prepend=0) <= 0)
    if len(empty):
        raise UserError(
            f"Document {int(empty[0])} (from 0) of {tokens.index} has no token, so it does not end with EOS. Documents must end with EOS: make the shard "
            "again with it (in Megatron's preprocess_data.py, --append-eod)."
        )
    return ends


def _read_megatron(tokens: TokenFile, rows: DocumentMapWriter) -> np.ndarray:
    ends = IndexedReader(tokens.prefix).starts[1:]
    for start in range(0, len(ends), ROW_GROUP):
        stop = min(start + ROW_GROUP, len(ends))
        numbers = pa.array(np.arange(start + 1, stop + 1, dtype=np.uint64))
        rows.add(pa.table({"file": pa.repeat(tokens.path, stop - start), "line": numbers, "id": pa.nulls(stop - start, pa.string())}))
    return ends


def _read_dolma(tokens: TokenFile, rows: DocumentMapWriter, eos_id: int) -> np.ndarray:
    _check_headerless(tokens.data)
    parts: list[np.ndarray] = []
    last, number = 0, 0
    for batch in _csv_batches(tokens.index):
        _check_numbers(tokens.index, batch, number)
        starts, ends = (batch.column(name).to_numpy(zero_copy_only=False) for name in ("start", "end"))
        broken = np.flatnonzero((starts != np.concatenate([[last], ends[:-1]])) | (ends <= starts))
        if len(broken):
            row = int(broken[0])
            raise UserError(
                f"{tokens.index}, row {number + row + 1}: a document from token {int(starts[row])} to {int(ends[row])} does not follow the one before it, "
                f"which ended at {int(ends[row - 1]) if row else last}. The file is damaged or rows are missing: fetch it again."
            )
        rows.add(pa.table({"file": batch.column("src"), "line": batch.column("loc"), "id": batch.column("id")}))
        parts.append(ends)
        last, number = int(ends[-1]), number + len(ends)
    found = np.concatenate([np.empty(0, np.int64), *parts])
    _check_length(tokens, found, eos_id)
    return found


def _check_numbers(path: Path, batch: pa.RecordBatch, first: int) -> None:
    """UserError for a row without `start` or `end`, or with a negative `loc`. first: rows before this batch."""
    lines = batch.column("loc")
    faults = (
        ("an empty `start`", batch.column("start").is_null()),
        ("an empty `end`", batch.column("end").is_null()),
        ("a negative `loc`", pc.fill_null(pc.less(lines, 0), False)),
    )
    for what, rows in faults:
        if (row := rows.index(True).as_py()) >= 0:
            raise UserError(f"{path}, row {first + row + 1}, has {what}. The file is damaged: fetch it again.")


def _check_headerless(path: Path) -> None:
    with open(path, "rb") as file:
        head = file.read(len(_NPY_MAGIC))
    if head == _NPY_MAGIC:
        raise UserError(
            f"{path} is a real NumPy file, with a header. AI2's pre-tokenised arrays are plain little-endian uint32 in spite of their name; the header would "
            "become tokens. Write it without: numpy.load(path).astype('<u4').tofile(new_path)."
        )


def _csv_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """The rows of the index in batches that are never empty."""
    pieces = decompressed(InputReader(path), codec_of(path)[0])
    stream = _PieceStream(pieces)
    options = {
        "read_options": pa.csv.ReadOptions(column_names=list(_COLUMNS), block_size=_CSV_BLOCK_BYTES, use_threads=False),
        "parse_options": pa.csv.ParseOptions(newlines_in_values=True),
        "convert_options": pa.csv.ConvertOptions(column_types=_COLUMNS),
    }
    try:
        for batch in pa.csv.open_csv(pa.PythonFile(stream, mode="r"), **options):
            if batch.num_rows:
                yield batch
    except pa.ArrowInvalid as error:
        raise UserError(
            f"{path} is not the index of a pre-tokenised array, a table start,end,id,src,loc without a header ({error}). It is damaged or another file."
        ) from error


class _PieceStream(io.RawIOBase):
    """Pieces of bytes as a file to read from."""

    def __init__(self, pieces: Iterator[bytes]):
        self._pieces = pieces
        self._piece = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]  # the type of a writable buffer has no public name in 3.11
        while not self._piece:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._piece = memoryview(piece)
        num = min(len(buffer), len(self._piece))
        buffer[:num] = self._piece[:num]
        self._piece = self._piece[num:]
        return num


def _check_length(tokens: TokenFile, ends: np.ndarray, eos_id: int) -> None:
    declared = int(ends[-1]) * _TOKEN_BYTES if len(ends) else 0
    if tokens.num_bytes == declared:
        return
    lengths = f"{tokens.data} has {tokens.num_bytes} bytes, {tokens.index} describes {declared} (its last `end` times {_TOKEN_BYTES})"
    if not _first_documents_fit(tokens, ends, eos_id):
        raise UserError(
            f"{lengths}, and its first documents do not end with EOS there: the index is that of another array. Put the right pair together."
        )
    if tokens.num_bytes < declared:
        raise UserError(f"{lengths}: the array is cut short. Fetch it again.")
    raise UserError(f"{lengths}: the index is cut short, or the array was appended to. Fetch both again.")


def _first_documents_fit(tokens: TokenFile, ends: np.ndarray, eos_id: int) -> bool:
    """Whether nothing speaks against the index: the first documents that lie in the file end with EOS."""
    num_tokens = tokens.num_bytes // _TOKEN_BYTES
    first = ends[:_PROBED_DOCUMENTS]
    lasts = first[first <= num_tokens] - 1
    return not len(lasts) or bool((np.memmap(tokens.data, dtype="<u4", mode="r", shape=(num_tokens,))[lasts] == eos_id).all())
