"""Items, requests and probes of the experiments as the manifest's tables."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import orjson
import pyarrow as pa

from megatron_exp import seeding
from megatron_exp.experiments import protocol
from megatron_exp.experiments.protocol import Item, Probe, Request
from megatron_exp.manifest import schema
from megatron_exp.manifest.payloads import payload_hash
from megatron_exp.placement.place import Placement
from megatron_exp.placement.rows import FLOATING
from megatron_exp.stream.slot import Geometry

_REQUEST_COLUMNS = ("experiment", "condition", "item", "arm", "layer", "kind", "exclusive", "length", "payload", "key", "payload_hash")


class Payloads(Protocol):
    """Numbers token sequences; `manifest.payloads.PayloadStore` writes them too."""

    def add(self, tokens: np.ndarray) -> int:
        """The number of this sequence; equal sequences share one."""
        ...


class Wanted(NamedTuple):
    """One request with the experiment and the item it belongs to."""

    experiment: str
    item: Item
    request: Request


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


def insertions_table(
    wanted: Sequence[Wanted],
    placement: Placement,
    store: Payloads,
    geometry: Geometry,
    placement_seed: int,
    only: frozenset[str] | None = None,
) -> pa.Table:
    """The insertions table, sorted by (slot, layer, offset): one value per request spread over its copies, column by column.

    wanted: in the order placement had them. only: leave out the requests of all other experiments.
    """
    chosen = [i for i, one in enumerate(wanted) if only is None or one.experiment in only]
    if not chosen:
        return schema.INSERTIONS.empty_table()
    number = np.full(len(wanted), -1, dtype=np.int64)
    number[chosen] = np.arange(len(chosen))
    rows = np.flatnonzero(number[placement.table.request] >= 0)
    keys = np.fromiter(
        (insertion_key(placement_seed, wanted[i].experiment, wanted[i].item.arm, wanted[i].request.kind) for i in chosen),
        np.uint64,
        len(chosen),
    )
    layers = np.fromiter((schema.LAYERS[wanted[i].request.kind] for i in chosen), np.int64, len(chosen))
    request = number[placement.table.request[rows]]
    item, repetition = placement.table.item[rows], placement.table.repetition[rows]
    insertion_id = seeding.words64(keys[request], repetition, item)
    order = np.lexsort((insertion_id, placement.offsets[rows], layers[request], placement.slots[rows]))
    rows, request = rows[order], request[order]
    per_request = _per_request(wanted, chosen, store, geometry, placement_seed)
    columns = {name: _spread(values, request, schema.INSERTIONS.field(name).type) for name, values in per_request.items()}
    columns |= _per_copy(wanted, placement, rows, geometry)
    columns["insertion_id"] = pa.array(insertion_id[order])
    return pa.table({name: columns[name] for name in schema.INSERTIONS.names}, schema=schema.INSERTIONS)


def _per_request(
    wanted: Sequence[Wanted], chosen: Sequence[int], store: Payloads, geometry: Geometry, placement_seed: int
) -> dict[str, list[Any]]:
    """Columns with one value per request."""
    columns: dict[str, list[Any]] = {name: [] for name in _REQUEST_COLUMNS}
    for index in chosen:
        experiment, item, request = wanted[index]
        tokens = item.payload if request.kind == "tokens" else None
        values = (
            experiment,
            item.condition,
            item.item,
            item.arm,
            schema.LAYERS[request.kind],
            request.kind,
            request.exclusive,
            request.mask_length or (geometry.sequence_length if tokens is None else len(tokens)),
            None if tokens is None else store.add(tokens),
            noise_key(placement_seed, experiment) if request.kind == "noise" else None,
            None if tokens is None else payload_hash(tokens),
        )
        for name, value in zip(_REQUEST_COLUMNS, values, strict=True):
            columns[name].append(value)
    return columns


def _per_copy(wanted: Sequence[Wanted], placement: Placement, rows: np.ndarray, geometry: Geometry) -> dict[str, pa.Array]:
    """Columns with a value of its own for each copy."""
    table, batch = placement.table, np.uint64(geometry.global_batch_size)
    slots = placement.slots[rows]
    floating = table.fixed_slot[rows] == FLOATING
    first = np.where(floating, table.first_slot[rows], slots)
    end = np.where(floating, table.end_slot[rows], slots + np.uint64(1))
    source, has_source = np.zeros(len(table), np.uint64), np.zeros(len(table), bool)
    for index, one in enumerate(wanted):
        if one.request.kind == "swap":
            copies = slice(int(table.bounds[index]), int(table.bounds[index + 1]))
            source[copies], has_source[copies] = np.asarray(one.request.source_slots, np.uint64), True
    return {
        "repetition": pa.array(table.repetition[rows].astype(np.uint16)),
        "slot": pa.array(slots),
        "step": pa.array((slots // batch).astype(np.uint32)),
        "row": pa.array((slots % batch).astype(np.uint32)),
        "offset": pa.array(placement.offsets[rows].astype(np.uint32)),
        "source_slot": pa.array(source[rows], mask=~has_source[rows]),
        "window_start": pa.array((first // batch).astype(np.uint32)),
        "window_end": pa.array(((end + batch - np.uint64(1)) // batch).astype(np.uint32)),
    }


def _spread(values: list[Any], index: np.ndarray, kind: pa.DataType) -> pa.Array:
    """`values` taken at `index` as one Arrow array."""
    if pa.types.is_dictionary(kind):
        encoded = pa.array(values, pa.string()).dictionary_encode().cast(kind)
        return pa.DictionaryArray.from_arrays(encoded.indices.take(pa.array(index)), encoded.dictionary)
    return pa.array(values, kind).take(pa.array(index))


@lru_cache(maxsize=4096)
def insertion_key(placement_seed: int, experiment: str, arm: str, kind: str) -> int:
    """Key of the insertion ids; item and repetition are the counter."""
    return seeding.key(placement_seed, "insertion", experiment, arm, kind)


@lru_cache(maxsize=4096)
def noise_key(placement_seed: int, experiment: str) -> int:
    """Key of an experiment's inserted noise."""
    return seeding.key(placement_seed, "noise", experiment)


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
