"""What the inserted data is like, per experiment: as the rest of training (i.i.d.), other text, or nothing natural. Table 4 of arXiv 2509.23383."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megatron_exp.manifest.schema import LAYERS
from megatron_exp.stream.slot import Geometry

_KEY = ["experiment", "item", "arm"]
_NUMBERS = ("items", "insertions", "tokens", "iid", "ood", "unusual", "reserved")


def data_kinds(
    items: pa.Table, insertions: pa.Table, reserve: pa.Table, unusual: Mapping[str, frozenset[str]], geometry: Geometry
) -> dict[str, dict[str, Any]]:
    """{experiment: {items, insertions, tokens, fraction, iid, ood, unusual, reserved}}.

    All but the first two and the fraction are tokens. iid: whole slots swapped in, from the pool or the stream. unusual: embedding noise,
    and the spans of payloads that an experiment names so. ood: all other payload tokens. reserved: the most that a controller may insert,
    in no other column; `items` are those inserted or in a controller's bank.
    """
    result = {name: dict.fromkeys(_NUMBERS, 0) for name in unusual}
    treated = items.filter(pc.equal(items["role"].cast(pa.string()), "treated"))
    for row in treated.group_by("experiment").aggregate([("item", "count")]).to_pylist():
        result[row["experiment"]]["items"] = row["item_count"]
    by_kind = insertions.group_by(["experiment", "layer"]).aggregate([("length", "sum"), ("length", "count")]).to_pylist()
    for row in by_kind:
        cell = result[row["experiment"]]
        cell["insertions"] += row["length_count"]
        if column := {LAYERS["swap"]: "iid", LAYERS["tokens"]: "ood", LAYERS["noise"]: "unusual"}.get(row["layer"]):
            cell[column] += row["length_sum"]
    for name, tokens in _unusual_tokens(treated, insertions, unusual).items():
        result[name]["ood"] -= tokens
        result[name]["unusual"] += tokens
    for row in reserve.group_by("experiment").aggregate([("length", "sum")]).to_pylist():
        result[row["experiment"]]["reserved"] = row["length_sum"]
    for cell in result.values():
        cell["tokens"] = cell["iid"] + cell["ood"] + cell["unusual"]
    return {name: cell | {"fraction": cell["tokens"] / geometry.num_tokens} for name, cell in result.items()}


def _unusual_tokens(treated: pa.Table, insertions: pa.Table, unusual: Mapping[str, frozenset[str]]) -> dict[str, int]:
    """{experiment: tokens of the spans it names, over all copies}."""
    spans = treated["spans"].combine_chunks()
    flat, parents = pc.list_flatten(spans), pc.list_parent_indices(spans).to_numpy()
    names = pc.struct_field(flat, "name").to_numpy(zero_copy_only=False)
    lengths = pc.subtract(pc.struct_field(flat, "end"), pc.struct_field(flat, "start")).to_numpy().astype(np.int64)
    experiments = treated["experiment"].cast(pa.string()).to_numpy(zero_copy_only=False)
    named = np.array([name in unusual[experiments[row]] for name, row in zip(names, parents, strict=True)], dtype=bool)
    per_item = np.bincount(parents[named], weights=lengths[named], minlength=len(treated)).astype(np.int64)
    chosen = np.flatnonzero(per_item)
    if not len(chosen):
        return {}
    plain = treated.select(_KEY).take(pa.array(chosen)).append_column("unusual", pa.array(per_item[chosen]))
    written = insertions.filter(pc.equal(insertions["layer"], LAYERS["tokens"])).select([*_KEY, "length"])
    copies = _plain(written).group_by(_KEY).aggregate([("length", "count")])
    joined = _plain(plain).join(copies, keys=_KEY, join_type="inner")
    total = joined.append_column("total", pc.multiply(joined["unusual"], joined["length_count"]))
    summed = total.group_by("experiment").aggregate([("total", "sum")]).to_pylist()
    return {row["experiment"]: row["total_sum"] for row in summed}


def _plain(table: pa.Table) -> pa.Table:
    return table.cast(pa.schema([(f.name, pa.string() if pa.types.is_dictionary(f.type) else f.type) for f in table.schema]))
