"""Items, requests and probes of the experiments as the manifest's tables."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from megatron_exp import seeding
from megatron_exp.experiments import protocol
from megatron_exp.experiments.protocol import Item, Probe, Request
from megatron_exp.manifest import schema
from megatron_exp.manifest.payloads import payload_hash
from megatron_exp.placement.place import Placed
from megatron_exp.placement.rows import Copies
from megatron_exp.stream.slot import Geometry

_REQUEST_COLUMNS = ("experiment", "condition", "item", "arm", "layer", "kind", "exclusive", "length", "payload", "key", "payload_hash")


class Payloads(Protocol):
    """Numbers token sequences; `manifest.payloads.PayloadStore` writes them too."""

    def add(self, tokens: np.ndarray) -> int:
        """The number of this sequence; equal sequences share one."""
        ...


@dataclass(frozen=True, eq=False, kw_only=True)
class PlannedRequest:
    """A request with its item, the copies asked of placement, and where they went."""

    experiment: str
    item: Item
    request: Request
    copies: Copies
    placed: Placed


def item_rows(experiment: str, items: Sequence[Item], store: Payloads) -> list[dict[str, Any]]:
    """Rows of the items table; payloads go into the store."""
    return [
        {
            "item": item.item,
            "experiment": experiment,
            "condition": item.condition,
            "arm": item.arm,
            "role": item.role,
            "assignment_unit": item.item if item.assignment_unit is None else item.assignment_unit,
            "stratum": item.stratum,
            "cluster": item.item if item.cluster is None else item.cluster,
            "payload": None if item.payload is None else store.add(item.payload),
            "num_tokens": 0 if item.payload is None else len(item.payload),
            "spans": [{"name": span.name, "start": span.start, "end": span.end} for span in item.spans],
            "source": item.source,
            "licence": item.licence,
            "sensitive": item.sensitive,
            "base_rate": None,
            "metadata": orjson.dumps(item.metadata, option=orjson.OPT_SORT_KEYS | orjson.OPT_SERIALIZE_NUMPY).decode(),
        }
        for item in items
    ]


def table_of(rows: list[dict[str, Any]], table_schema: pa.Schema) -> pa.Table:
    """A table of plain rows in the given schema."""
    return pa.Table.from_pylist(rows, schema=table_schema)


def insertions_table(planned: Sequence[PlannedRequest], store: Payloads, geometry: Geometry, placement_seed: int) -> pa.Table:
    """The insertions table, sorted by (slot, layer, offset). One value per request is spread over its copies, column by column."""
    if not planned:
        return schema.INSERTIONS.empty_table()
    counts = np.array([len(one.placed.slots) for one in planned], dtype=np.int64)
    columns = _per_request(planned, store, geometry, placement_seed)
    rows: dict[str, pa.Array] = {
        name: _spread(values, counts, schema.INSERTIONS.field(name).type) for name, values in columns.items() if name != "id_key"
    }
    rows |= _per_copy(planned, geometry)
    id_key = np.repeat(np.array(columns["id_key"], dtype=np.uint64), counts)
    item = np.repeat(np.array(columns["item"], dtype=np.uint64), counts)
    rows["insertion_id"] = pa.array(seeding.words64(id_key, rows["repetition"].to_numpy(), item))
    table = pa.table({name: rows[name] for name in schema.INSERTIONS.names}, schema=schema.INSERTIONS)
    order = [("slot", "ascending"), ("layer", "ascending"), ("offset", "ascending"), ("insertion_id", "ascending")]
    return table.take(pc.sort_indices(table.select([name for name, _ in order]), sort_keys=order))


def _per_request(planned: Sequence[PlannedRequest], store: Payloads, geometry: Geometry, placement_seed: int) -> dict[str, list[Any]]:
    """Columns with one value per request; `id_key` is the key of its insertion ids."""
    columns: dict[str, list[Any]] = {name: [] for name in (*_REQUEST_COLUMNS, "id_key")}
    for one in planned:
        item, request = one.item, one.request
        tokens = item.payload if request.kind == "tokens" else None
        values = {
            "experiment": one.experiment,
            "condition": item.condition,
            "item": item.item,
            "arm": item.arm,
            "layer": schema.LAYERS[request.kind],
            "kind": request.kind,
            "exclusive": request.exclusive,
            "length": one.copies.length or geometry.sequence_length,
            "payload": None if tokens is None else store.add(tokens),
            "key": seeding.key(placement_seed, "noise", one.experiment) if request.kind == "noise" else None,
            "payload_hash": None if tokens is None else payload_hash(tokens),
            "id_key": seeding.key(placement_seed, "insertion", one.experiment, item.arm, request.kind),
        }
        for name, value in values.items():
            columns[name].append(value)
    return columns


def _per_copy(planned: Sequence[PlannedRequest], geometry: Geometry) -> dict[str, pa.Array]:
    """Columns with a value of its own for each copy."""
    slots = np.concatenate([one.placed.slots for one in planned])
    batch = np.uint64(geometry.global_batch_size)
    windows = [_window(one) for one in planned]
    sources = [one.request.source_slots if one.request.kind == "swap" else None for one in planned]
    source = np.concatenate(
        [np.zeros(len(p.placed.slots), np.uint64) if s is None else np.asarray(s, np.uint64) for p, s in zip(planned, sources, strict=True)]
    )
    absent = np.concatenate([np.full(len(p.placed.slots), s is None) for p, s in zip(planned, sources, strict=True)])
    return {
        "repetition": pa.array(np.concatenate([np.arange(len(one.placed.slots), dtype=np.uint16) for one in planned])),
        "slot": pa.array(slots),
        "step": pa.array((slots // batch).astype(np.uint32)),
        "row": pa.array((slots % batch).astype(np.uint32)),
        "offset": pa.array(np.concatenate([one.placed.offsets for one in planned]).astype(np.uint32)),
        "source_slot": pa.array(source, mask=absent),
        "window_start": pa.array((np.concatenate([start for start, _ in windows]) // batch).astype(np.uint32)),
        "window_end": pa.array(((np.concatenate([end for _, end in windows]) + batch - np.uint64(1)) // batch).astype(np.uint32)),
    }


def _window(one: PlannedRequest) -> tuple[np.ndarray, np.ndarray]:
    """First and end slot of each copy's window; a fixed place is its own window."""
    if isinstance(one.request.where, protocol.Window | protocol.Strata):
        return one.copies.first_slot, one.copies.end_slot
    return one.placed.slots, one.placed.slots + np.uint64(1)


def _spread(values: list[Any], counts: np.ndarray, kind: pa.DataType) -> pa.Array:
    """`values` repeated `counts` times as one Arrow array."""
    index = pa.array(np.repeat(np.arange(len(values), dtype=np.int64), counts))
    if pa.types.is_dictionary(kind):
        encoded = pa.array(values, pa.string()).dictionary_encode().cast(kind)
        return pa.DictionaryArray.from_arrays(encoded.indices.take(index), encoded.dictionary)
    return pa.array(values, kind).take(index)


def probe_rows(experiment: str, probes: Iterable[Probe], store: Payloads) -> list[dict[str, Any]]:
    """Rows of the probe definitions table (without probe_id); token sequences go into the store."""
    return [
        {
            "experiment": experiment,
            "item": probe.item,
            "arm": probe.arm,
            "name": probe.name,
            "states": list(probe.states),
            "live": probe.live,
            "of": sorted(probe.of),
            **_ask_columns(probe.ask, store),
        }
        for probe in probes
    ]


def _ask_columns(ask: protocol.Ask, store: Payloads) -> dict[str, Any]:
    match ask:
        case protocol.LogLikelihood():
            return {"ask": "loglikelihood", "payload": store.add(ask.tokens), "start": ask.start, "end": ask.end}
        case protocol.Greedy():
            target = None if ask.target is None else store.add(ask.target)
            return {"ask": "greedy", "payload": store.add(ask.prompt), "num_tokens": ask.num_tokens, "target": target}
        case protocol.Sample():
            return {
                "ask": "sample",
                "payload": store.add(ask.prompt),
                "num_tokens": ask.num_tokens,
                "num_samples": ask.num_samples,
                "temperature": ask.temperature,
            }
        case protocol.SlotLoss():
            return {"ask": "slot_loss", "slot": ask.slot}
        case protocol.EmbeddingGradient():
            return {"ask": "embedding_gradient", "slot": ask.slot, "key": ask.noise_key, "noise_slot": ask.noise_slot, "scale": ask.scale}
