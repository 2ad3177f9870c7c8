"""Fingerprints of logical content: columns, dtypes and canonical JSON, never paths, times or file encodings.

The same content gives the same fingerprint on any machine and with any version of Parquet, numpy or Python. Checksums
of files as stored are another thing and live beside the files.
"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

_LENGTH = 32  # hex digits kept of SHA-256: 128 bits, collisions are out of reach


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces; the same value always gives the same bytes."""
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS | orjson.OPT_SERIALIZE_NUMPY)


def of_bytes(*parts: bytes) -> str:
    """Fingerprint of a sequence of byte strings (length-prefixed, so their borders count)."""
    return _of_parts(parts)


def _of_parts(parts: Iterable[bytes]) -> str:
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


def _table_parts(table: pa.Table) -> Iterator[bytes]:
    """One column after the other: a table of millions of rows is not held a second time."""
    yield str(table.num_rows).encode()
    for name in sorted(table.column_names):
        column = table.column(name).combine_chunks()
        if isinstance(column, pa.ChunkedArray):
            column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        yield name.encode()
        yield _type_name(column.type).encode()
        yield from _column_bytes(column)


def _type_name(kind: pa.DataType) -> str:
    """The logical type; Arrow and Parquet name the elements of a list differently, which is an encoding."""
    return f"list<{_type_name(kind.value_type)}>" if pa.types.is_list(kind) else str(kind)


def _column_bytes(column: pa.Array) -> list[bytes]:
    nulls = np.packbits(column.is_null().to_numpy(zero_copy_only=False)).tobytes()
    kind = column.type
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind):
        filled = column.fill_null(False if pa.types.is_boolean(kind) else 0)
        return [nulls, np.ascontiguousarray(filled.to_numpy(zero_copy_only=False)).tobytes()]
    if pa.types.is_fixed_size_binary(kind):
        return [nulls, *_distinct_binaries(column)]
    if pa.types.is_string(kind):
        return [nulls, *_distinct_and_numbers(column)]
    return [nulls, canonical_json(column.to_pylist())]


def _distinct_and_numbers(column: pa.Array) -> list[bytes]:
    """The distinct values in sorted order, and for each row the number of its value (0 where null): fast where values repeat."""
    encoded = column.dictionary_encode()
    texts = encoded.dictionary.to_pylist()
    order = sorted(range(len(texts)), key=texts.__getitem__)
    return [canonical_json([texts[index] for index in order]), _numbers(encoded, np.array(order, np.int64))]


def _distinct_binaries(column: pa.Array) -> list[bytes]:
    """The same for values of one length, written as the JSON list of their hexadecimal digits."""
    encoded = column.dictionary_encode()
    width, values = column.type.byte_width, encoded.dictionary
    raw = np.frombuffer(values.buffers()[1] or b"", dtype=f"S{width}", count=len(values), offset=values.offset * width)
    order = np.argsort(raw, kind="stable")  # of equal length, so that numpy's blindness to trailing zeros does not show
    quoted = np.full((len(values), 2 * width + 3), ord(","), np.uint8)
    quoted[:, 0] = quoted[:, -2] = ord('"')
    quoted[:, 1:-2] = np.frombuffer(raw[order].tobytes().hex().encode(), np.uint8).reshape(len(values), 2 * width)
    return [b"[" + quoted.tobytes()[:-1] + b"]", _numbers(encoded, order)]


def _numbers(encoded: pa.DictionaryArray, order: np.ndarray) -> bytes:
    """For each row the place of its value in `order` as little-endian uint32, 0 where null."""
    rank = np.zeros(max(len(order), 1), dtype="<u4")
    rank[order] = np.arange(len(order), dtype=np.uint32)
    return rank[encoded.indices.fill_null(0).to_numpy()].tobytes()
