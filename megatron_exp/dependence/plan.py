"""plan.json: what the cells of a directory belong to. Cells of different plans are never mixed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from megatron_exp import fingerprint
from megatron_exp.errors import UserError
from megatron_exp.files import write_file

PLAN_NAME = "plan.json"
SCHEMA_VERSION = 1
DECIDES = ("manifest", "checkpoint", "learning_rate", "steps", "intensity", "training")
"""Parts that must be equal for cells to be of one test. The number of replicates is none of them: more can be added."""


def read_plan(directory: Path) -> dict[str, Any] | None:
    """The plan of a directory, None where there is none; UserError where it is damaged or of an unknown version."""
    path = Path(directory) / PLAN_NAME
    if not path.exists():
        return None
    try:
        record = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error}). It is damaged: restore it, or use another --out.") from error
    if record.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema version {record.get('schema_version')}, this program reads {SCHEMA_VERSION}. Use another --out."
        )
    return record


def decided(record: Mapping[str, Any]) -> dict[str, Any]:
    """The parts that decide, without paths."""
    parts = {name: record[name] for name in DECIDES}
    return parts | {"manifest": record["manifest"]["fingerprint"], "checkpoint": record["checkpoint"]["fingerprint"]}


def check_same(directory: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """UserError naming what differs where a directory holds another test."""
    before, now = decided(old), decided(new)
    differing = [name for name in DECIDES if before[name] != now[name]]
    if differing:
        told = "; ".join(f"{name} was {_short(before[name])}, is {_short(now[name])}" for name in differing)
        raise UserError(
            f"{directory} holds cells of another plan: {told}. Cells of different plans are never mixed: use another --out, or the settings it was begun with."
        )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else orjson.dumps(value).decode()
    return text if len(text) <= 60 else f"{text[:57]}..."


def write_plan(directory: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Complete a plan with its fingerprint and write it durably."""
    whole = {"schema_version": SCHEMA_VERSION, **record, "fingerprint": plan_fingerprint(record), "fractions": record["fractions"]}
    Path(directory).mkdir(parents=True, exist_ok=True)
    write_file(
        Path(directory) / PLAN_NAME, orjson.dumps(whole, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE)
    )
    return whole


def plan_fingerprint(record: Mapping[str, Any]) -> str:
    """Of everything that decides what a cell is, the intensities found by the pilot and the blocks' base slots included."""
    return fingerprint.of_json([decided(record), record["fractions"], record["first_slots"][0]])
