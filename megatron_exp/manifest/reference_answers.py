"""What a reference model answered while a manifest was planned: kept with the manifest, so that planning again needs no model.

A question is named by a hash of everything that it consists of. Answers are written in parts as they come (a killed plan goes on where it
was) and gathered into one file of the manifest, sorted, so that the same questions give the same file whatever happened on the way.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from megatron_exp import fingerprint
from megatron_exp.errors import UserError
from megatron_exp.files import write_file
from megatron_exp.manifest.schema import DICT
from megatron_exp.manifest.stored_table import read_stored

ANSWERS_NAME = "reference.parquet"
SCHEMA = pa.schema(
    [
        ("question", pa.binary(16)),
        ("ask", DICT),
        ("value", pa.float64()),
        ("tokens", pa.list_(pa.int32())),
    ]
)
"""One row per distinct question. `value`: nats of a log-likelihood. `tokens`: what was generated. One of them is null."""

_JOB_NAME = "job.json"
_IDENTITY = b"reference"

Answer = float | np.ndarray
"""Nats (<= 0), or int32 token ids."""


def question(ask: str, numbers: tuple[int, ...], tokens: np.ndarray) -> bytes:
    """16 bytes: the name of a question. numbers: start and end of a log-likelihood, or how many tokens are generated."""
    digest = xxhash.xxh3_128(f"{ask}{list(numbers)}".encode())
    digest.update(np.ascontiguousarray(tokens, dtype="<i4").data)
    return digest.digest()


class AnswerParts:
    """Answers on their way: a folder of parts, each durable, all of one reference. Parts that were there before are read first."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]):
        """`identity` must be JSON-able; UserError where the folder belongs to another reference."""
        self._folder, self._identity = Path(folder), dict(identity)
        self._known: dict[bytes, tuple[str, Answer]] = {}
        job = self._folder / _JOB_NAME
        if not job.exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            write_file(job, fingerprint.canonical_json(self._identity))
        elif orjson.loads(job.read_bytes()) != self._identity:
            raise UserError(
                f"{self._folder} holds answers of another reference, or to texts of another tokenizer. Give the reference it was begun with, "
                "choose another --out, or remove the folder."
            )
        for part in sorted(self._folder.glob("answers-*.parquet")):
            self._known |= _answers(_read(part))

    def get(self, name: bytes) -> Answer | None:
        """The answer to a question, None where it was never asked."""
        return self._known[name][1] if name in self._known else None

    def add(self, answers: Mapping[bytes, tuple[str, Answer]]) -> None:
        """Keep answers (question: ask and answer) durably."""
        number = len(list(self._folder.glob("answers-*.parquet")))
        write_file(self._folder / f"answers-{number:06d}.parquet", _encoded(_table(answers)))
        self._known |= answers

    def remove(self) -> None:
        """The plan is written and holds what it needs."""
        shutil.rmtree(self._folder)


def write_answers(directory: Path, answers: Mapping[bytes, tuple[str, Answer]], identity: Mapping[str, Any]) -> str:
    """Write all answers a plan used into a manifest under construction; returns the fingerprint of their content."""
    table = _table(answers)
    described = table.replace_schema_metadata({_IDENTITY: fingerprint.canonical_json(dict(identity))})
    (directory / ANSWERS_NAME).write_bytes(_encoded(described))
    return fingerprint.of_table(table)


def read_answers(path: Path) -> tuple[dict[bytes, tuple[str, Answer]], dict[str, Any], str]:
    """(answers by question, identity of the reference, fingerprint) of a file of recorded answers; UserError where it is none or damaged."""
    table = _read(path)
    told = (table.schema.metadata or {}).get(_IDENTITY)
    if told is None:
        raise UserError(f"{path} does not say which reference gave its answers. It is not a {ANSWERS_NAME} that `plan --reference` wrote.")
    return _answers(table), orjson.loads(told), fingerprint.of_table(table.replace_schema_metadata(None))


def _read(path: Path) -> pa.Table:
    return read_stored(
        path,
        SCHEMA,
        "recorded answers of a reference model",
        if_damaged="It is damaged: remove it and plan again with the reference itself",
        if_other="It holds no answers of a reference model",
    )


def _table(answers: Mapping[bytes, tuple[str, Answer]]) -> pa.Table:
    names = sorted(answers)
    values = [answers[name] for name in names]
    return pa.table(
        {
            "question": pa.array(names, pa.binary(16)),
            "ask": pa.array([ask for ask, _ in values], pa.string()).dictionary_encode().cast(DICT),
            "value": pa.array([answer if isinstance(answer, float) else None for _, answer in values], pa.float64()),
            "tokens": pa.array([None if isinstance(answer, float) else answer.tolist() for _, answer in values], pa.list_(pa.int32())),
        },
        schema=SCHEMA,
    )


def _answers(table: pa.Table) -> dict[bytes, tuple[str, Answer]]:
    columns = (table[name].to_pylist() for name in SCHEMA.names)
    return {
        name: (ask, value if tokens is None else np.array(tokens, np.int32)) for name, ask, value, tokens in zip(*columns, strict=True)
    }


def _encoded(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return memoryview(sink.getvalue()).tobytes()
