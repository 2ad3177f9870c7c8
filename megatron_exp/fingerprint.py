"""Fingerprints of logical content: columns, dtypes and canonical JSON, never paths, times or file encodings.

The same content gives the same fingerprint on any machine and with any version of Parquet, numpy or Python. Checksums
of files as stored are another thing and live beside the files.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

_HEXADECIMAL = np.frombuffer(b"0123456789abcdef", np.uint8)
_LENGTH = 32  # hex digits kept of SHA-256: 128 bits, collisions are out of reach


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces; the same value always gives the same bytes.

    Raises ValueError for infinity and NaN. orjson writes both as null, so that three different values would have one fingerprint.
    """
    written = _written(value)
    if b"null" in written and not _is_finite(value):  # most values hold no null and are not looked through
        raise ValueError("a value that is fingerprinted holds infinity or NaN, which JSON cannot tell from null; write None where a number is missing")
    return written


def _written(value: Any) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS | orjson.OPT_SERIALIZE_NUMPY)


def _is_finite(value: Any) -> bool:
    """Whether no number in nested data is infinite or NaN."""
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    if isinstance(value, np.ndarray):
        return not np.issubdtype(value.dtype, np.floating) or bool(np.isfinite(value).all())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return all(_is_finite(getattr(value, field.name)) for field in dataclasses.fields(value))
    return not isinstance(value, float | np.floating) or bool(np.isfinite(value))


def of_parsed(value: Any) -> str:
    """Fingerprint of a value that was parsed from JSON, which has no infinity and no NaN to look for; that of `of_json`."""
    return of_bytes(_written(value))


def of_bytes(*parts: bytes) -> str:
    """Fingerprint of a sequence of byte strings (length-prefixed, so their borders count)."""
    return _of_parts(parts)


def _of_parts(parts: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:_LENGTH]


def of_json(value: Any) -> str:
    """Fingerprint of a JSON-able value."""
    return of_bytes(canonical_json(value))


def of_array(array: np.ndarray) -> str:
    """Fingerprint of an array's dtype, shape and values (little-endian)."""
    little = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
    return of_bytes(f"{little.dtype.str}{little.shape}".encode(), little.tobytes())


def of_table(table: pa.Table) -> str:
    """Fingerprint of a table: for each column in name order its name, logical type, nulls and values.

    Dictionary encoding and chunking are encodings and do not count.
    """
    return _of_parts(_table_parts(table))


def _table_parts(table: pa.Table) -> Iterator[bytes | memoryview]:
    """One column after the other: a table of millions of rows is not held a second time."""
    yield str(table.num_rows).encode()
    for name in sorted(table.column_names):
        column = table.column(name).combine_chunks()
        if isinstance(column, pa.ChunkedArray):
            column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
        yield name.encode()
        if pa.types.is_dictionary(column.type) and not pa.types.is_string(column.type.value_type):
            column = column.dictionary_decode()
        yield _type_name(column.type.value_type if pa.types.is_dictionary(column.type) else column.type).encode()
        yield from _column_bytes(column)


def _type_name(kind: pa.DataType) -> str:
    """The logical type; Arrow and Parquet name the elements of a list differently, which is an encoding."""
    return f"list<{_type_name(kind.value_type)}>" if pa.types.is_list(kind) else str(kind)


def _column_bytes(column: pa.Array) -> list[bytes | memoryview]:
    nulls = np.packbits(column.is_null().to_numpy(zero_copy_only=False)).tobytes()
    kind = column.type
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind):
        filled = column.fill_null(False if pa.types.is_boolean(kind) else 0) if column.null_count else column
        return [nulls, np.ascontiguousarray(filled.to_numpy(zero_copy_only=False)).view(np.uint8).data]  # no copy of a long column
    if pa.types.is_fixed_size_binary(kind):
        return [nulls, *_distinct_binaries(column)]
    if pa.types.is_string(kind):
        return [nulls, *_distinct_and_numbers(column.dictionary_encode())]
    if pa.types.is_dictionary(kind):
        return [nulls, *_distinct_and_numbers(column)]
    return [nulls, canonical_json(column.to_pylist())]


def _distinct_and_numbers(encoded: pa.DictionaryArray) -> list[bytes]:
    """The distinct texts in sorted order, and for each row the number of its text (where null, that of the first row that has one).

    A dictionary may hold texts that no row has; they do not count.
    """
    values = encoded.dictionary.to_pylist()
    codes = encoded.indices.drop_null().to_numpy()
    present = np.unique(codes).tolist()
    texts = sorted({values[code] for code in present})
    place = {text: number for number, text in enumerate(texts)}
    rank = np.zeros(max(len(values), 1), dtype="<u4")
    rank[present] = [place[values[code]] for code in present]
    first = int(codes[0]) if len(codes) else 0
    return [_written(texts), rank[encoded.indices.fill_null(first).to_numpy()].tobytes()]


def _sorted_order(raw: np.ndarray) -> np.ndarray:
    """The order that sorts distinct byte strings of one length. Of hashes, the first eight bytes decide, and numbers sort much faster."""
    if raw.itemsize >= 8:
        heads = np.ascontiguousarray(raw.view(np.uint8).reshape(len(raw), raw.itemsize)[:, :8]).view(">u8").ravel().astype(np.uint64)
        order = np.argsort(heads)
        if not np.any(heads[order][1:] == heads[order][:-1]):
            return order
    return np.argsort(raw, kind="stable")  # of equal length, so that numpy's blindness to trailing zeros does not show


def _distinct_binaries(column: pa.Array) -> list[bytes | memoryview]:
    """The same for values of one length, written as the JSON list of their hexadecimal digits."""
    encoded = column.dictionary_encode()
    width, values = column.type.byte_width, encoded.dictionary
    raw = np.frombuffer(values.buffers()[1] or b"", dtype=f"S{width}", count=len(values), offset=values.offset * width)
    order = _sorted_order(raw)
    size = len(values) * (2 * width + 3)
    texts = np.full(1 + max(size, 1), ord(","), np.uint8)
    quoted = texts[1 : 1 + size].reshape(len(values), 2 * width + 3)
    quoted[:, 0] = quoted[:, -2] = ord('"')
    digits = raw[order].view(np.uint8).reshape(len(values), width)
    quoted[:, 1:-2:2], quoted[:, 2:-2:2] = _HEXADECIMAL[digits >> 4], _HEXADECIMAL[digits & 15]
    texts[0], texts[-1] = ord("["), ord("]")
    rank = np.zeros(max(len(order), 1), dtype="<u4")
    rank[order] = np.arange(len(order), dtype=np.uint32)
    return [texts.data, rank[encoded.indices.fill_null(0).to_numpy()].tobytes()]
