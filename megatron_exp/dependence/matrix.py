"""From cells to the matrix: values as measured, every comparison with interval, corrected p, margin and verdict."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.special import stdtrit

from megatron_exp.dependence.rows import ALL, NONE, SHAM, held, leave_one_out_rows, left_out, standard_rows
from megatron_exp.experiments.dependence import Dependence
from megatron_exp.statistics import dependence as statistics
from megatron_exp.statistics.dependence import ALPHA, Column, Comparison, Design

MATRIX = pa.schema(
    [("row", pa.string()), ("column", pa.string()), ("seed", pa.uint32()), ("value", pa.float64()), ("num_items", pa.uint32())]
)
INCOMPLETE = "incomplete"


class Values:
    """Values [seeds, rows, columns] of the cells there are, NaN where one is missing or could not be scored."""

    def __init__(self, table: pa.Table, rows: Sequence[str], columns: Sequence[str], seeds: Sequence[int]):
        self.rows, self.columns, self.seeds = list(rows), list(columns), list(seeds)
        self.array = np.full((len(seeds), len(rows), len(columns)), np.nan)
        places = [{name: place for place, name in enumerate(names)} for names in (self.seeds, self.rows, self.columns)]
        for one in table.to_pylist():
            key = (one["seed"], one["row"], one["column"])
            if all(part in index for part, index in zip(key, places, strict=True)) and one["value"] is not None:
                self.array[tuple(index[part] for part, index in zip(key, places, strict=True))] = one["value"]

    def complete(self, column: int, rows: Sequence[str]) -> np.ndarray:
        """float64 [replicates, rows]: the replicates of which no value of the column is missing in these rows."""
        chosen = self.array[:, [self.rows.index(row) for row in rows], column]
        return chosen[np.isfinite(chosen).all(axis=1)]


def matrix_record(table: pa.Table, experiments: Sequence[str], outcomes: Mapping[str, Dependence], seeds: Sequence[int]) -> dict[str, Any]:
    """The statistical part of matrix.json.

    Args:
        table: CELL rows of all cells there are.
        experiments: rows of the test.
        outcomes: column to what was declared of it.
        seeds: replicates planned.
    """
    columns = list(outcomes)
    rows = standard_rows(experiments)
    values = Values(table, [*rows, *leave_one_out_rows(experiments)], columns, seeds)
    present = {(one["row"], one["seed"]) for one in table.select(["row", "seed"]).to_pylist()}
    missing = [{"row": row, "seed": seed} for seed in seeds for row in rows if (row, seed) not in present]
    found = [_column(values, rows, experiments, index, outcomes[name], len(seeds)) for index, name in enumerate(columns)]
    cells = [cell for one in found for cell in one["cells"]]
    unscored = [one["column"] for one in found if one["num_replicates"] < len(seeds)]
    is_complete = not missing and not unscored
    return {
        "complete": is_complete,
        "missing": missing,
        "unscored_columns": [name for name in unscored if not missing],
        "seeds": list(seeds),
        "alpha": ALPHA,
        "family_size": 2 * len(columns),
        "rows": rows,
        "columns": {
            one["column"]: {name: value for name, value in one.items() if name not in ("column", "cells", "leave_one_out")} for one in found
        },
        "cells": cells,
        "leave_one_out": [row for one in found for row in one["leave_one_out"]],
        "effects": [row for index, name in enumerate(columns) for row in _effects(values, rows, index, name)],
        "verdict": _overall([cell["verdict"] for cell in cells if cell["comparison"] in ("primary", "spill-over")], is_complete),
    }


def _overall(verdicts: Sequence[str], is_complete: bool) -> str:
    """One word for the test: a dependence outweighs everything, what is open outweighs what is settled."""
    if not is_complete:
        return INCOMPLETE
    for kind in (statistics.DEPENDENT, statistics.UNDECIDED, statistics.INDEPENDENT):
        if kind in verdicts:
            return kind
    return statistics.NOT_TESTABLE


def design_of(rows: Sequence[str], columns: Sequence[str], experiments: Sequence[str]) -> Design:
    """Which row holds which column."""
    holds = np.array([[column in held(row, experiments) for column in columns] for row in rows])
    alone = np.array([list(rows).index(column) for column in columns])
    return Design(holds=holds, alone=alone, all_row=list(rows).index(ALL), none_row=list(rows).index(NONE))


def _column(values: Values, rows: list[str], experiments: Sequence[str], index: int, outcome: Dependence, num_seeds: int) -> dict[str, Any]:
    name = values.columns[index]
    mine = values.complete(index, rows)
    record = {"column": name, "unit": outcome.unit, "smallest_effect": outcome.smallest_effect, "num_replicates": len(mine)}
    if len(mine) < 2:
        empty = [_empty(row, name, reference) for row, reference in _comparisons(name, rows, experiments)]
        return record | {"testable": None, "margin": None, "mean_of_none": None, "cells": empty, "leave_one_out": []}
    design = design_of(rows, values.columns, experiments)
    found = statistics.analyse_column(mine, design, index, outcome.smallest_effect)
    cells = _cells(found, design, rows, name, index, mine, num_seeds)
    record |= {"testable": bool(found.is_testable), "margin": float(found.margin), "mean_of_none": float(mine[:, design.none_row].mean())}
    return record | {"cells": cells, "leave_one_out": _leave_one_out(values, rows, experiments, index, float(found.margin))}


def _comparisons(column: str, rows: Sequence[str], experiments: Sequence[str]) -> list[tuple[str, str]]:
    """(row, reference) of every comparison of a column."""
    others = [row for row in rows if row not in (column, ALL, NONE)]
    return [(column, NONE), (ALL, column), *((row, NONE) for row in others)]


def _kind(row: str, reference: str) -> str:
    if reference != NONE:
        return "primary"
    return "sham" if row == SHAM else "spill-over"


def _empty(row: str, column: str, reference: str) -> dict[str, Any]:
    names = ("estimate", "standard_error", "low", "high", "p", "p_corrected", "df", "margin", "relative", "seeds_needed", "minus_sham")
    kind = "diagonal" if row == column else _kind(row, reference)
    return {"row": row, "column": column, "reference": reference, "comparison": kind, "verdict": INCOMPLETE, **dict.fromkeys(names)}


def _cells(found: Column, design: Design, rows: list[str], name: str, index: int, mine: np.ndarray, num_seeds: int) -> list[dict[str, Any]]:
    """The comparisons of a column, in the order of `_comparisons`."""
    is_whole, margin, diagonal = len(mine) == num_seeds, float(found.margin), float(found.diagonal.estimate)
    verdict = "above zero" if found.is_testable else statistics.NOT_TESTABLE
    parts = [("diagonal", name, NONE, found.diagonal, verdict), ("primary", ALL, name, found.primary, str(found.primary_verdict))]
    for place, row in enumerate(design.compared(index).tolist()):
        single = Comparison(*(np.asarray(part[place]) for part in found.spill_over))
        parts.append((_kind(rows[row], NONE), rows[row], NONE, single, str(found.spill_over_verdict[place])))
    cells = []
    for kind, row, reference, one, said in parts:
        needed = None
        if said == statistics.UNDECIDED:
            compared = 1 if kind == "primary" else len(design.compared(index))
            needed = statistics.seeds_needed(
                float(one.estimate), float(one.standard_error), int(one.df), margin, len(mine), design.family_size * compared
            )
        cells.append(
            {
                "row": row,
                "column": name,
                "reference": reference,
                "comparison": kind,
                **_numbers(one),
                "margin": None if kind == "diagonal" else margin,
                "relative": _json(float(one.estimate) / diagonal) if diagonal else None,
                "verdict": said if is_whole else INCOMPLETE,
                "seeds_needed": needed,
                "minus_sham": _pairs(mine[:, rows.index(row)] - mine[:, rows.index(SHAM)]) if kind == "spill-over" else None,
            }
        )
    return cells


def _pairs(differences: np.ndarray) -> dict[str, Any]:
    """Mean of pairs within replicates with Student's 95% interval, not corrected for anything."""
    known = differences[np.isfinite(differences)]
    mean = float(known.mean()) if len(known) else math.nan
    half = float(stdtrit(len(known) - 1, 0.975) * known.std(ddof=1) / np.sqrt(len(known))) if len(known) > 1 else math.nan
    return {"estimate": _json(mean), "low": _json(mean - half), "high": _json(mean + half), "n": len(known)}


def _numbers(one: Comparison) -> dict[str, Any]:
    estimate, half = float(one.estimate), float(one.half_width)
    return {
        "estimate": _json(estimate),
        "standard_error": _json(float(one.standard_error)),
        "low": _json(estimate - half),
        "high": _json(estimate + half),
        "p": _json(float(one.p)),
        "p_corrected": _json(float(one.p_corrected)),
        "df": int(one.df),
    }


def _leave_one_out(values: Values, rows: Sequence[str], experiments: Sequence[str], index: int, margin: float) -> list[dict[str, Any]]:
    """Every experiment whose absence was tried in this column, against ALL; `culprit` where the column changes back without it."""
    name = values.columns[index]
    extra = [row for row in leave_one_out_rows(experiments) if left_out(row) != name]
    mine = values.complete(index, [*rows, *extra])
    if len(mine) < 2:
        return []
    design = design_of([*rows, *extra], values.columns, experiments)
    found = statistics.against_all(mine, design, index, np.arange(len(rows), len(rows) + len(extra)))
    result = []
    for place, row in enumerate(extra):
        single = Comparison(*(np.asarray(part[place]) for part in found))
        culprit = bool(single.p_corrected < ALPHA and abs(float(single.estimate)) > margin)
        result.append({"column": name, "left_out": left_out(row), **_numbers(single), "culprit": culprit})
    return result


def _effects(values: Values, rows: Sequence[str], index: int, column: str) -> list[dict[str, Any]]:
    """The matrix people draw: every row minus `none`, with Student's 95% interval of the pairs within replicates. Descriptive, not corrected."""
    place = {row: number for number, row in enumerate(values.rows)}
    result = []
    for row in rows:
        if row == NONE:
            continue
        result.append({"row": row, "column": column, **_pairs(values.array[:, place[row], index] - values.array[:, place[NONE], index])})
    return result


def _json(value: float) -> float | None:
    return value if math.isfinite(value) else None
