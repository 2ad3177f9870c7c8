"""matrix.parquet and matrix.json, from the cells there are."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_exp.dependence.cells import read_cell
from megatron_exp.dependence.matrix import MATRIX, matrix_record
from megatron_exp.dependence.rows import leave_one_out_rows
from megatron_exp.dependence.what import Tested
from megatron_exp.errors import UserError
from megatron_exp.files import write_file

MATRIX_NAME, VALUES_NAME = "matrix.json", "matrix.parquet"


def write_matrix(directory: Path, plan: dict[str, Any], what: Tested) -> dict[str, Any]:
    """Write matrix.parquet and matrix.json of the cells there are."""
    rows = [*plan["rows"], *leave_one_out_rows(what.rows)]
    seeds = list(range(plan["num_seeds"]))
    found = {(row, seed): cell for seed in seeds for row in rows if (cell := read_cell(directory, row, seed, plan["fingerprint"]))}
    tables = [table for table, _ in found.values()]
    table = pa.concat_tables(tables).unify_dictionaries() if tables else None
    if table is None:
        raise UserError(f"{directory} holds no cell of this test yet. Run the command without --collect.")
    record = {
        "schema_version": 1,
        "plan": plan["fingerprint"],
        **{
            name: plan[name]
            for name in (
                "manifest",
                "checkpoint",
                "learning_rate",
                "steps",
                "fractions",
                "notes",
                "not_inserted",
                "not_measured",
                "command",
            )
        },
        **matrix_record(table, what.rows, what.columns, seeds),
        "cost": _cost([facts for _, facts in found.values()], plan),
    }
    buffer = pa.BufferOutputStream()
    pq.write_table(table.select(MATRIX.names).cast(MATRIX), buffer, compression="zstd")
    write_file(directory / VALUES_NAME, buffer.getvalue())
    write_file(directory / MATRIX_NAME, orjson.dumps(record, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE))
    return record


def _cost(facts: Sequence[dict[str, Any]], plan: dict[str, Any]) -> dict[str, Any]:
    """What the cells took; `overhead` is all their time but scoring over the time of their steps."""
    total = {
        name: sum(one[name] for one in facts)
        for name in ("steps", "step_seconds", "train_seconds", "score_seconds", "block_seconds", "other_seconds", "num_probes")
    }
    outside = total["train_seconds"] + total["block_seconds"] + total["other_seconds"]
    return {
        "num_cells": len(facts),
        "cells_planned": len(plan["rows"]) * plan["num_seeds"],
        **total,
        "overhead": outside / total["step_seconds"] if total["step_seconds"] else None,
    }
