"""An experiment or an item: its rows in every table, and its payload as text."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megatron_exp.control.segments import segment_rows
from megatron_exp.errors import UserError
from megatron_exp.inspection.summary import ConditionSummary, ManifestSummary, summarise
from megatron_exp.inspection.targets import Target, open_target

MAX_ROWS = 1000
_LARGEST_ITEM = 2**64 - 1


@dataclass(frozen=True)
class ExperimentView:
    """One experiment of a manifest. first_items: at most 20 rows of the items table. results: rows of the newest evaluation (runs only).

    controller: its closed loop as planned, if it has one. decisions: what that decided in a run, with the tokens it handed out each time.
    """

    experiment: str
    title: str
    question: str
    citation: str
    outcomes: list[dict[str, Any]]
    conditions: tuple[ConditionSummary, ...]
    first_items: list[dict[str, Any]]
    results: list[dict[str, Any]]
    controller: dict[str, Any] | None = None
    decisions: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class ItemView:
    """Everything recorded about one item (all arms; at most 1000 rows per table). texts: the payload of each arm that has one."""

    experiment: str
    item: int
    arms: list[dict[str, Any]]
    texts: dict[str, str]
    insertions: list[dict[str, Any]]
    responses: list[dict[str, Any]]


def view_experiment(target: Target, experiment: str) -> ExperimentView:
    """UserError where the manifest has no such experiment."""
    manifest = target.manifest
    _require(experiment, manifest.experiments)
    analysis = manifest.analyses[experiment]
    summary = summarise(open_target(manifest.path))
    assert isinstance(summary, ManifestSummary)
    results = newest_evaluation_table(target, "results")
    return ExperimentView(
        experiment=experiment,
        title=analysis["title"],
        question=analysis["question"],
        citation=analysis["citation"],
        outcomes=analysis["outcomes"],
        conditions=tuple(row for row in summary.conditions if row.experiment == experiment),
        first_items=_rows(manifest.path / "items.parquet", experiment)[:20],
        results=[] if results is None else _rows(results, experiment),
        controller=manifest.controllers.get(experiment),
        decisions=tuple(_decisions(target, experiment)),
    )


def _decisions(target: Target, experiment: str) -> Iterator[dict[str, Any]]:
    for segment in target.segments:
        if experiment in segment.decisions:
            mine = pc.equal(segment.rows["experiment"].cast(pa.string()), experiment)
            tokens = pc.sum(segment.rows.filter(mine)["length"]).as_py() or 0
            yield segment.decisions[experiment].record() | {"tokens": tokens}


def view_item(target: Target, item: int, experiment: str | None = None) -> ItemView:
    """Item numbers are unique within an experiment only; UserError where `experiment` is needed to tell, or nothing is found."""
    manifest = target.manifest
    if not 0 <= item <= _LARGEST_ITEM:
        raise UserError(f"{item} is no number of an item: those are 0 to {_LARGEST_ITEM}. `--experiment` lists the first items of each.")
    arms = _rows(manifest.path / "items.parquet", experiment, item)
    owners = sorted({row["experiment"] for row in arms})
    if not owners:
        raise UserError(
            f"{manifest.path} has no item {item}{f' in experiment {experiment}' if experiment else ''}. `--experiment` lists the first items of each."
        )
    if len(owners) > 1:
        raise UserError(f"Item {item} exists in the experiments {', '.join(owners)}. Say which one with --experiment.")
    tokenizer = target.tokenizer
    responses = newest_evaluation_table(target, "responses")
    return ItemView(
        experiment=owners[0],
        item=item,
        arms=arms,
        texts={row["arm"]: tokenizer.decode(manifest.payload(row["payload"])) for row in arms if row["payload"] is not None},
        insertions=(_rows(manifest.path / "insertions.parquet", owners[0], item) + _handed_out(target, owners[0], item))[:MAX_ROWS],
        responses=[] if responses is None else _rows(responses, owners[0], item),
    )


def _handed_out(target: Target, experiment: str, item: int) -> list[dict[str, Any]]:
    """Rows of all segments with this item."""
    rows = segment_rows(target.segments)
    mine = pc.and_(pc.equal(rows["experiment"].cast(pa.string()), experiment), pc.equal(rows["item"], pa.scalar(item, pa.uint64())))
    return rows.filter(mine).to_pylist()


def newest_evaluation_table(target: Target, name: str) -> Path | None:
    """RUN/evals/step-*/NAME.parquet of the latest state, if there is one."""
    found = sorted((target.path / "evals").glob(f"step-*/{name}.parquet")) if target.kind == "run" else []
    return found[-1] if found else None


def _rows(path: Path, experiment: str | None, item: int | None = None) -> list[dict[str, Any]]:
    """At most MAX_ROWS rows of a table that match."""
    conditions = []
    if experiment is not None:
        conditions.append(pc.field("experiment").cast(pa.string()) == experiment)
    if item is not None:
        conditions.append(pc.field("item") == pa.scalar(item, pa.uint64()))
    both = conditions[0] if len(conditions) == 1 else conditions[0] & conditions[1]
    return pq.read_table(path, filters=both).slice(0, MAX_ROWS).to_pylist()


def _require(experiment: str, known: list[str]) -> None:
    if experiment not in known:
        raise UserError(f"There is no experiment {experiment!r}. The manifest has: {', '.join(known) or 'none'}.")
