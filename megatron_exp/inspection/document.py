"""Answers as versioned JSON: the same fields as the data classes, pure ASCII, so that no text from data can act on a terminal."""

import dataclasses
import json
from typing import Any

import pyarrow as pa

SCHEMA_VERSION = 1


def as_json(kind: str, answer: Any) -> str:
    """{"schema_version": 1, "kind": ..., "answer": ...}. Not-a-number becomes null; bytes become hex digits."""
    return json.dumps({"schema_version": SCHEMA_VERSION, "kind": kind, "answer": _plain(answer)}, indent=2, allow_nan=False)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, pa.Table):
        return [_plain(row) for row in value.to_pylist()]
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, float) and value - value != 0:
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)
