"""`inspect --html`: a manifest or a run to browse in one file: by experiment, condition and step, with slots in which the insertions are marked.

A manifest of five million rows does not fit into a page. So each condition shows its first items, the first slots of its insertions are shown whole, and
the steps are gathered in at most two hundred stretches; every table says how much of the whole it holds, and which command shows the rest.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megatron_exp import __version__
from megatron_exp.display.page import page_environment
from megatron_exp.files import write_file
from megatron_exp.inspection.slots import SlotView, view_slot
from megatron_exp.inspection.targets import Target

_ITEMS_PER_CONDITION = 5
_SLOTS_PER_CONDITION = 2
_MOST_SLOTS = 120
_MOST_STRETCHES = 200


@dataclasses.dataclass(frozen=True)
class ItemRow:
    """An item with its payload as text, None where texts are hidden or there is none."""

    item: int
    arm: str
    role: str
    num_tokens: int
    source: str
    licence: str
    sensitive: bool
    text: str | None


@dataclasses.dataclass(frozen=True)
class ConditionPage:
    """One condition. items: the first ones of num_items. slots: (slot, step) of insertions whose slots are on the page."""

    condition: str
    num_items: int
    insertions: int
    tokens: int
    slots_touched: int
    items: list[ItemRow]
    slots: list[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class ExperimentPage:
    """One experiment with its conditions."""

    name: str
    title: str
    question: str
    conditions: list[ConditionPage]


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Steps [start, end): insertions by experiment, and a slot in it that is on the page, if there is one."""

    start: int
    end: int
    counts: list[int]
    slot: int | None


def write_inspector(target: Target, out: Path, *, show_text: bool = False) -> Path:
    """Write the page and return its path; UserError for a corpus, or where the parts do not belong together."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, render_inspector(target, show_text=show_text).encode())
    return out


def render_inspector(target: Target, *, show_text: bool) -> str:
    """The page as text. Without `show_text` no text of payloads or of the corpus is in it."""
    manifest = target.manifest
    insertions = _applied(target)
    experiments = _experiments(target, insertions, show_text=show_text)
    shown = sorted({slot for one in experiments for condition in one.conditions for slot, _ in condition.slots})
    views = [view_slot(target, slot).slots[0] for slot in shown]
    return (
        page_environment("megatron_exp.inspection")
        .get_template("inspector.html.j2")
        .render(
            page_title=f"{manifest.config.name}: inspector",
            version=__version__,
            target=target,
            manifest=manifest,
            budget=manifest.record["budget"],
            experiments=experiments,
            stretches=_stretches(manifest.geometry.steps, manifest.experiments, insertions, shown, manifest.geometry.global_batch_size),
            slots=[(number, view, _hidden(view)) for number, view in zip(shown, views, strict=True)],
            num_touched=manifest.record["budget"]["touched_slots"],
            show_text=show_text,
        )
    )


def _applied(target: Target) -> pa.Table:
    """The insertions the model sees: none of a baseline run, none of masked experiments."""
    table = target.manifest.insertions()
    if not target.has_overlay:
        return table.slice(0, 0)
    masked = pa.array(sorted(target.overlay.masked), pa.string())
    return table.filter(pc.invert(pc.is_in(table["experiment"].cast(pa.string()), value_set=masked)))


def _experiments(target: Target, insertions: pa.Table, *, show_text: bool) -> list[ExperimentPage]:
    manifest, items = target.manifest, target.manifest.items()
    left = _MOST_SLOTS
    pages = []
    for name in manifest.experiments:
        mine, placed = _of(items, "experiment", name), _of(insertions, "experiment", name)
        conditions = []
        for condition, cell in manifest.counts[name].items():
            slots = _first_slots(_of(placed, "condition", condition), min(left, _SLOTS_PER_CONDITION))
            left -= len(slots)
            rows = _of(mine, "condition", condition).slice(0, _ITEMS_PER_CONDITION).to_pylist()
            conditions.append(
                ConditionPage(
                    condition=condition,
                    num_items=cell["items"] + cell["controls"],
                    insertions=cell["insertions"],
                    tokens=cell["tokens"],
                    slots_touched=cell["slots"],
                    items=[_item(target, row, show_text=show_text) for row in rows],
                    slots=slots,
                )
            )
        analysis = manifest.analyses[name]
        pages.append(ExperimentPage(name, analysis["title"], analysis["question"], conditions))
    return pages


def _of(table: pa.Table, column: str, value: str) -> pa.Table:
    return table.filter(pc.equal(table[column].cast(pa.string()), value)) if table.num_rows else table


def _first_slots(placed: pa.Table, num: int) -> list[tuple[int, int]]:
    """(slot, step) of the first `num` distinct slots."""
    slots = np.unique(placed["slot"].to_numpy()[: 8 * num + 8]) if placed.num_rows else np.empty(0, np.uint64)
    steps = dict(zip(placed["slot"].to_pylist()[: 8 * num + 8], placed["step"].to_pylist()[: 8 * num + 8], strict=True))
    return [(int(slot), int(steps[int(slot)])) for slot in slots[:num]]


def _item(target: Target, row: dict[str, Any], *, show_text: bool) -> ItemRow:
    text = None
    if show_text and row["payload"] is not None:
        text = target.tokenizer.decode(target.manifest.payload(row["payload"]))
    names = ("item", "arm", "role", "num_tokens", "source", "licence", "sensitive")
    return ItemRow(**{name: row[name] for name in names}, text=text)


def _stretches(steps: int, names: Sequence[str], insertions: pa.Table, shown: Sequence[int], rows_per_step: int) -> list[Stretch]:
    """At most two hundred equal stretches of the run with what is inserted in each."""
    edges = np.unique(np.linspace(0, steps, min(_MOST_STRETCHES, steps) + 1).astype(np.int64))
    step, experiment = insertions["step"].to_numpy(), insertions["experiment"].cast(pa.string()).to_numpy(zero_copy_only=False)
    counts = np.array([np.histogram(step[experiment == name], edges)[0] for name in names]).reshape(len(names), len(edges) - 1)
    shown_steps = np.asarray(shown, np.int64) // rows_per_step
    stretches = []
    for place, (start, end) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
        inside = np.flatnonzero((shown_steps >= start) & (shown_steps < end))
        slot = int(shown[inside[0]]) if len(inside) else None
        stretches.append(Stretch(start, end, counts[:, place].tolist(), slot))
    return stretches


def _hidden(view: SlotView) -> list[str]:
    """What stands in the place of each piece's text where texts are hidden."""
    return [f"[{piece.end - piece.start} tokens]" for piece in view.pieces]
