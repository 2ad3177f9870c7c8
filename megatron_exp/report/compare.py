"""`compare`: several runs side by side, seeds of one configuration or models of several sizes.

Within a run the unit is an item, and a claim is about this run. Across runs of one configuration that differ in seeds alone the unit is the run: the mean of
their estimates, with Student's interval over runs, is a claim about runs. Runs that differ in anything else are shown beside each other and never averaged.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_exp.errors import UserError
from megatron_exp.fingerprint import of_json
from megatron_exp.report.effects import natural
from megatron_exp.report.gather import Inputs, gather
from megatron_exp.report.overview import primary_rows
from megatron_exp.statistics.normal import mean_interval

_OF_ROW = ("estimate", "low", "high", "p_corrected")

COMPARISON = pa.schema(
    [
        *((name, pa.string()) for name in ("experiment", "outcome", "condition", "run", "group", "scope")),
        ("runs", pa.uint32()),
        ("n", pa.uint32()),
        *((name, pa.float64()) for name in _OF_ROW),
        ("verdict", pa.string()),
    ]
)
"""One row for each primary outcome and run, then one for each group of runs that differ in seeds alone."""


@dataclass(frozen=True)
class Compared:
    """One run. group: runs of one group differ in seeds alone. note: what distinguishes it, in words."""

    label: str
    group: str
    note: str
    inputs: Inputs


def compare(run_dirs: Sequence[Path]) -> tuple[list[Compared], pa.Table]:
    """The runs with what distinguishes them, and COMPARISON.

    Raises UserError where fewer than two runs are given, one twice, or one has not been evaluated.
    """
    paths = [Path(path).resolve() for path in run_dirs]
    if len(paths) < 2 or len(set(paths)) < len(paths):
        raise UserError("compare needs at least two different runs, and each once. Give several RUN directories.")
    runs = _labelled([gather(path, None) for path in run_dirs])
    missing = [one.label for one in runs if one.inputs.results.file is None]
    if missing:
        raise UserError(
            f"{', '.join(missing)} has not been evaluated, so there is nothing to compare. Run `megatron-exp eval` on it first."
        )
    rows = [row for one in runs for row in _rows(one)]
    rows += _means(rows)
    rows.sort(key=lambda row: (row["experiment"], natural(row["outcome"]), natural(row["condition"]), row["runs"]))
    return runs, pa.Table.from_pylist(rows, schema=COMPARISON)


def _labelled(found: Sequence[Inputs]) -> list[Compared]:
    """Names as short as tells them apart: that of the run, else its path."""
    names = [inputs.run.name for inputs in found]
    labels = names if len(set(names)) == len(names) else [str(inputs.run.path) for inputs in found]
    groups: dict[str, str] = {}
    result = []
    for label, inputs in zip(labels, found, strict=True):
        identity = of_json(_without_seeds(inputs))
        group = groups.setdefault(identity, chr(ord("A") + len(groups)) if len(groups) < 26 else str(len(groups)))
        result.append(Compared(label, group, _note(inputs), inputs))
    return result


def _without_seeds(inputs: Inputs) -> Any:
    """What runs that differ in seeds alone have in common; neither names nor paths are part of it."""
    config = {name: value for name, value in inputs.run.record["config"].items() if name not in ("name", "seeds")}
    config["corpus"] = {name: value for name, value in config["corpus"].items() if name != "path"}
    return [config, inputs.run.record["corpus"]["fingerprint"], inputs.run.record["model"], inputs.run.baseline, sorted(inputs.run.masked)]


def _note(inputs: Inputs) -> str:
    config = inputs.run.record["config"]
    seeds = ", ".join(f"{name} {value}" for name, value in config["seeds"].items())
    return f"{config['model']['preset']}, {inputs.last_step} of {inputs.run.num_steps} steps, seeds {seeds}"


def _rows(one: Compared) -> Iterable[dict[str, Any]]:
    for name in one.inputs.manifest.experiments:
        for row in primary_rows(one.inputs.results.of(name)):
            yield {
                **{key: row[key] for key in ("experiment", "outcome", "condition", "scope", "n", "verdict", *_OF_ROW)},
                "run": one.label,
                "group": one.group,
                "runs": 1,
            }


def _means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean over the runs of a group with Student's interval; none for a group of one run."""
    cells: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["experiment"], row["outcome"], row["condition"], row["group"]), []).append(row)
    means = []
    for (experiment, outcome, condition, group), members in cells.items():
        estimates = np.array([row["estimate"] for row in members if row["estimate"] is not None and np.isfinite(row["estimate"])])
        if len(estimates) < 2:
            continue
        low, high = mean_interval(estimates)
        detected = sum((row["verdict"] or "").startswith("detected") for row in members)
        means.append(
            {
                "experiment": experiment,
                "outcome": outcome,
                "condition": condition,
                "run": f"mean of group {group}",
                "group": group,
                "scope": "runs",
                "runs": len(estimates),
                "n": None,
                "estimate": float(estimates.mean()),
                "low": low,
                "high": high,
                "p_corrected": None,
                "verdict": f"detected in {detected} of {len(members)}",
            }
        )
    return means
