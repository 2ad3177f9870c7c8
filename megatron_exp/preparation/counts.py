"""What the plan rewrites, counted exactly: per experiment and condition, and over all."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from megatron_exp.config.schema import BudgetConfig
from megatron_exp.errors import UserError
from megatron_exp.manifest.rewritten import rewritten
from megatron_exp.manifest.schema import LAYERS
from megatron_exp.stream.slot import Geometry

_MASK_LAYER = LAYERS["mask"]


def counts_of(items: pa.Table, insertions: pa.Table) -> dict[str, Any]:
    """{experiment: {condition: {items, controls, insertions, tokens, slots}}}; masks rewrite no token."""
    result: dict[str, dict[str, dict[str, int]]] = {}
    grouped_items = items.group_by(["experiment", "condition", "role"]).aggregate([("item", "count")]).to_pylist()
    for row in grouped_items:
        cell = result.setdefault(row["experiment"], {}).setdefault(
            row["condition"], dict.fromkeys(("items", "controls", "insertions", "tokens", "slots"), 0)
        )
        cell["items" if row["role"] == "treated" else "controls"] += row["item_count"]
    tokens = pc.if_else(pc.equal(insertions["layer"], _MASK_LAYER), 0, insertions["length"])
    counted = pa.table(
        {"experiment": insertions["experiment"], "condition": insertions["condition"], "tokens": tokens, "slot": insertions["slot"]}
    )
    for row in (
        counted.group_by(["experiment", "condition"])
        .aggregate([("tokens", "sum"), ("tokens", "count"), ("slot", "count_distinct")])
        .to_pylist()
    ):
        cell = result[row["experiment"]][row["condition"]]
        cell["insertions"], cell["tokens"], cell["slots"] = row["tokens_count"], row["tokens_sum"], row["slot_count_distinct"]
    return {experiment: dict(sorted(cells.items())) for experiment, cells in sorted(result.items())}


def budget_record(insertions: pa.Table, reserve: pa.Table, geometry: Geometry, budget: BudgetConfig | None) -> dict[str, Any]:
    """Exact totals and fractions; UserError where the plan rewrites, or controllers may rewrite, more than the budget allows."""
    tokens, slots, shifted = rewritten(insertions, geometry)
    reserved = pc.sum(reserve["length"]).as_py() or 0  # apart from one another and from every token insertion
    record = {
        "unit": budget.unit if budget else None,
        "fraction": budget.fraction if budget else None,
        "modified_tokens": tokens,
        "touched_slots": slots,
        "shifted_tokens": shifted,
        "modified_fraction": tokens / geometry.num_tokens,
        "touched_fraction": slots / geometry.num_slots,
        "reserved_tokens": reserved,
        "reserved_slots": pc.count_distinct(reserve["slot"]).as_py(),
    }
    if budget and budget.unit == "slots":
        record["drawn_slots"] = round(budget.fraction * geometry.num_slots)
    if budget and budget.unit == "tokens" and tokens + reserved > budget.fraction * geometry.num_tokens:
        kept = f" and keep {reserved} in reserve for controllers" if reserved else ""
        raise UserError(
            f"The experiments rewrite {tokens} tokens{kept} ({(tokens + reserved) / geometry.num_tokens:.4%} of the run), more than "
            f"budget.fraction = {budget.fraction:.4%} allows. "
            f"Raise the budget, insert fewer copies{', lower the largest number of copies per interval' if reserved else ''}, or train for more steps."
        )
    return record
