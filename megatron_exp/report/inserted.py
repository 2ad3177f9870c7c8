"""What was inserted: counts per experiment and condition, and placement over time."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.axes import Axes

from megatron_exp.display.numbers import percent
from megatron_exp.manifest.schema import LAYERS
from megatron_exp.report.effects import natural
from megatron_exp.report.figures import PALETTE, Picture, label, picture
from megatron_exp.report.gather import Inputs

_BINS = 120
_KIND_COLUMNS = ["experiment", "condition", "kind"]


@dataclass(frozen=True)
class InsertedRow:
    """One condition of one experiment. fraction: of the run's tokens. kinds: how it was inserted, e.g. `tokens`."""

    experiment: str
    condition: str
    kinds: str
    items: int
    controls: int
    copies: int
    tokens: int
    slots: int
    fraction: float


def inserted_rows(inputs: Inputs) -> list[InsertedRow]:
    """All conditions of the manifest, also those that insert nothing (controls); what controllers have handed out is counted in."""
    tables = [table.select(_KIND_COLUMNS) for table in (inputs.manifest.insertions(), inputs.handed_out)]
    kinds = _kinds(pa.concat_tables(tables).unify_dictionaries())
    handed_out = _handed_out(inputs.handed_out)
    num_tokens = inputs.manifest.geometry.num_tokens
    return [
        InsertedRow(
            experiment=experiment,
            condition=condition,
            kinds=", ".join(kinds.get((experiment, condition), ["none"])),
            items=cell["items"],
            controls=cell["controls"],
            copies=cell["insertions"] + more[0],
            tokens=cell["tokens"] + more[1],
            slots=cell["slots"] + more[2],
            fraction=(cell["tokens"] + more[1]) / num_tokens,
        )
        for experiment in inputs.manifest.experiments
        for condition, cell in sorted(inputs.manifest.counts[experiment].items(), key=lambda pair: natural(pair[0]))
        for more in [handed_out.get((experiment, condition), (0, 0, 0))]
    ]


def _handed_out(rows: pa.Table) -> dict[tuple[str, str], tuple[int, int, int]]:
    """{(experiment, condition): (copies, tokens, slots)} of what controllers inserted. Their places are apart from all others, their slots may not be."""
    grouped = rows.group_by(["experiment", "condition"]).aggregate([("length", "count"), ("length", "sum"), ("slot", "count_distinct")])
    return {
        (row["experiment"], row["condition"]): (row["length_count"], row["length_sum"], row["slot_count_distinct"])
        for row in grouped.to_pylist()
    }


def _kinds(insertions: pa.Table) -> dict[tuple[str, str], list[str]]:
    found: dict[tuple[str, str], list[str]] = {}
    for row in insertions.group_by(["experiment", "condition", "kind"]).aggregate([]).to_pylist():
        found.setdefault((row["experiment"], row["condition"]), []).append(row["kind"])
    return {key: sorted(names) for key, names in found.items()}


def placement_picture(inputs: Inputs) -> Picture | None:
    """Rewritten share of the tokens over the run, one band for each experiment; None where nothing is inserted."""
    table = inputs.insertions
    names = [name for name in inputs.manifest.experiments if name in set(table["experiment"].to_pylist())]
    if not names:
        return None
    shares = {name: _shares(inputs, table, name) for name in names}
    bins = len(next(iter(shares.values())))
    edges = np.linspace(0, inputs.manifest.geometry.steps, bins + 1)

    def draw(axes: Axes) -> None:
        for place, name in enumerate(reversed(names)):
            top = shares[name].max()
            axes.stairs(
                place + 0.8 * shares[name] / top, edges, baseline=place, fill=True, color=PALETTE[(len(names) - 1 - place) % len(PALETTE)]
            )
        axes.set_yticks(
            np.arange(len(names)) + 0.4, [f"{label(name)}\npeak {percent(float(shares[name].max()))}" for name in reversed(names)]
        )
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("training step")
        axes.set_title("Placement over time")
        if not inputs.finished:
            axes.axvline(inputs.last_step, color="black", linestyle=":", linewidth=1.2)

    peaks = "; ".join(f"{name} up to {percent(float(shares[name].max()))} of a bin" for name in names)
    ending = "" if inputs.finished else " The dotted line is how far this run has come."
    return picture(
        draw,
        alt=f"Bands showing when each of {len(names)} experiments rewrites training data: {peaks}.",
        caption=f"Share of the tokens that each experiment rewrites, in {bins} equal parts of the run. "
        f"Every band has its own scale, with its peak beside it.{ending}",
        height_inches=1.2 + 0.5 * len(names),
    )


def _shares(inputs: Inputs, table: pa.Table, experiment: str) -> np.ndarray:
    """float64 [bins]: rewritten tokens of the experiment over all tokens, per bin of steps. A loss mask counts what it masks."""
    geometry = inputs.manifest.geometry
    mine = table.filter(pc.equal(table["experiment"].cast(pa.string()), experiment))
    bins = min(_BINS, geometry.steps)
    edges = np.linspace(0, geometry.steps, bins + 1)
    steps_per_bin = np.histogram(np.arange(geometry.steps), edges)[0]
    tokens = np.histogram(mine["step"].to_numpy(), edges, weights=mine["length"].to_numpy())[0]
    return tokens / (steps_per_bin * geometry.global_batch_size * geometry.sequence_length)


def interventions(inputs: Inputs, experiment: str) -> dict[str, Any]:
    """How one experiment intervenes: copies by kind in order of application, and the exclusive ones among them."""
    columns = ["experiment", "kind", "length", "exclusive"]
    table = pa.concat_tables([table.select(columns) for table in (inputs.manifest.insertions(), inputs.handed_out)]).unify_dictionaries()
    mine = table.filter(pc.equal(table["experiment"].cast(pa.string()), experiment))
    rows = mine.group_by("kind").aggregate([("length", "count"), ("exclusive", "any")]).to_pylist()
    return {
        row["kind"]: {"copies": row["length_count"], "exclusive": row["exclusive_any"]}
        for row in sorted(rows, key=lambda row: LAYERS[row["kind"]])
    }
