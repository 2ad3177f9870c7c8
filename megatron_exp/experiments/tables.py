"""Items, requests and probes of the experiments as the manifest's tables."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import orjson
import pyarrow as pa

from megatron_exp import seeding
from megatron_exp.experiments import protocol
from megatron_exp.experiments.context import BaseRatesLike
from megatron_exp.experiments.protocol import Item, Probe, Request
from megatron_exp.experiments.requests import PAYLOAD_KINDS
from megatron_exp.manifest import schema
from megatron_exp.manifest.payloads import payload_hash
from megatron_exp.placement.place import Placement
from megatron_exp.stream.slot import Geometry

_BLOCK_ROWS = 1 << 18
_NUM_LAYERS = max(schema.LAYERS.values()) + 1


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


def item_rows(experiment: str, items: Sequence[Item], store: Payloads, base_rates: BaseRatesLike | None = None) -> list[dict[str, Any]]:
    """Rows of the items table; payloads go into the store, base rates come from a search where there was one."""
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
            "base_rate": None if base_rates is None or item.payload is None else base_rates.of(item.payload),
            "metadata": orjson.dumps(item.metadata, option=orjson.OPT_SORT_KEYS | orjson.OPT_SERIALIZE_NUMPY).decode(),
        }
        for item in items
    ]


def table_of(rows: list[dict[str, Any]], table_schema: pa.Schema) -> pa.Table:
    """A table of plain rows in the given schema."""
    return pa.Table.from_pylist(rows, schema=table_schema)


def insertions_table(
    wanted: Sequence[Any],
    placement: Placement,
    store: Payloads,
    geometry: Geometry,
    placement_seed: int,
    only: frozenset[str] | None = None,
) -> pa.Table:
    """The insertions table, sorted by (slot, layer, offset): one value per request spread over its copies, column by column.

    wanted: in the order placement had them; what is not a `Wanted` (a reserve) has no row. only: leave out the requests of all other experiments.
    """
    chosen = [i for i, one in enumerate(wanted) if isinstance(one, Wanted) and (only is None or one.experiment in only)]
    if not chosen:
        return schema.INSERTIONS.empty_table()
    number = np.full(len(wanted), -1, dtype=np.int32)
    number[chosen] = np.arange(len(chosen), dtype=np.int32)
    rows = np.flatnonzero(number[placement.table.request] >= 0)
    per_request = _per_request([wanted[i] for i in chosen], store, geometry, placement_seed)
    insertion_id = _insertion_ids(placement, rows, per_request.pop("insertion_key").to_numpy()[number[placement.table.request[rows]]])
    order = _order(placement, rows, per_request["layer"].to_numpy()[number[placement.table.request[rows]]], insertion_id, geometry)
    rows = rows[order]
    columns = {"insertion_id": pa.array(insertion_id[order])}
    del insertion_id, order
    spread = pa.array(number[placement.table.request[rows]])
    for name in list(per_request):
        columns[name] = _spread(per_request.pop(name), spread)
    columns |= _per_copy(wanted, placement, rows, geometry)
    return pa.table({name: columns[name] for name in schema.INSERTIONS.names}, schema=schema.INSERTIONS)


def _per_request(wanted: Sequence[Wanted], store: Payloads, geometry: Geometry, placement_seed: int) -> dict[str, pa.Array]:
    """Columns with one value per request, and the key of its insertion ids."""
    kinds = [one.request.kind for one in wanted]
    payloads = [one.item.payload if kind in PAYLOAD_KINDS else None for one, kind in zip(wanted, kinds, strict=True)]
    lengths = [
        one.request.mask_length or (geometry.sequence_length if tokens is None else len(tokens))
        for one, tokens in zip(wanted, payloads, strict=True)
    ]
    noise = [noise_key(placement_seed, one.experiment) if kind == "noise" else None for one, kind in zip(wanted, kinds, strict=True)]
    keys = [insertion_key(placement_seed, one.experiment, one.item.arm, kind) for one, kind in zip(wanted, kinds, strict=True)]
    values: dict[str, list[Any]] = {
        "experiment": [one.experiment for one in wanted],
        "condition": [one.item.condition for one in wanted],
        "item": [one.item.item for one in wanted],
        "arm": [one.item.arm for one in wanted],
        "layer": [schema.LAYERS[kind] for kind in kinds],
        "kind": kinds,
        "exclusive": [one.request.exclusive for one in wanted],
        "length": lengths,
        "payload": [None if tokens is None else store.add(tokens) for tokens in payloads],
        "key": noise,
        "payload_hash": [None if tokens is None else payload_hash(tokens) for tokens in payloads],
    }
    columns = {name: _encoded(values.pop(name), schema.INSERTIONS.field(name).type) for name in list(values)}
    return columns | {"insertion_key": pa.array(keys, pa.uint64())}


def _insertion_ids(placement: Placement, rows: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """uint64 [rows], in blocks: the words of all rows at once would take several times the table."""
    ids = np.empty(len(rows), np.uint64)
    for start in range(0, len(rows), _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        part = rows[block]
        ids[block] = seeding.words64(keys[block], placement.table.repetition(part), placement.table.of_request("item", part))
    return ids


def _order(placement: Placement, rows: np.ndarray, layers: np.ndarray, insertion_id: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Order by slot, layer, offset, insertion id."""
    where = placement.slots[rows] * np.uint64(_NUM_LAYERS) + layers
    where *= np.uint64(geometry.sequence_length)
    where += placement.offsets[rows].astype(np.uint64)
    order = np.argsort(where, kind="stable")
    placed = where[order]
    if np.any(placed[1:] == placed[:-1]):  # rare: noise of two experiments in one slot
        return np.lexsort((insertion_id, where))
    return order


def _per_copy(wanted: Sequence[Any], placement: Placement, rows: np.ndarray, geometry: Geometry) -> dict[str, pa.Array]:
    """Columns with a value of its own for each copy."""
    table, batch = placement.table, np.uint64(geometry.global_batch_size)
    slots = placement.slots[rows]
    window_start, window_end = np.empty(len(rows), np.uint32), np.empty(len(rows), np.uint32)
    for start in range(0, len(rows), _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        given = table.is_given(rows[block])
        first, end = table.windows(rows[block])
        first[given], end[given] = slots[block][given], slots[block][given] + np.uint64(1)
        window_start[block], window_end[block] = first // batch, (end + batch - np.uint64(1)) // batch
    return {
        "repetition": pa.array(table.repetition(rows).astype(np.uint16)),
        "slot": pa.array(slots),
        "step": pa.array((slots // batch).astype(np.uint32)),
        "row": pa.array((slots % batch).astype(np.uint32)),
        "offset": pa.array(placement.offsets[rows].astype(np.uint32)),
        "source_slot": _source_slots(wanted, placement, rows),
        "window_start": pa.array(window_start),
        "window_end": pa.array(window_end),
    }


def _source_slots(wanted: Sequence[Any], placement: Placement, rows: np.ndarray) -> pa.Array:
    """Where swaps take their content; null for all other kinds."""
    table = placement.table
    swaps = [index for index, one in enumerate(wanted) if isinstance(one, Wanted) and one.request.kind == "swap"]
    if not swaps:
        return pa.nulls(len(rows), pa.uint64())
    source, has_source = np.zeros(len(table), np.uint64), np.zeros(len(table), bool)
    for index in swaps:
        copies = slice(int(table.bounds[index]), int(table.bounds[index + 1]))
        source[copies], has_source[copies] = np.asarray(wanted[index].request.source_slots, np.uint64), True
    return pa.array(source[rows], mask=~has_source[rows])


def _encoded(values: list[Any], kind: pa.DataType) -> pa.Array:
    """`values` as an Arrow array."""
    return pa.array(values, pa.string()).dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else pa.array(values, kind)


def _spread(values: pa.Array, index: pa.Array) -> pa.Array:
    """`values` taken at `index`."""
    if pa.types.is_dictionary(values.type):
        return pa.DictionaryArray.from_arrays(values.indices.take(index), values.dictionary)
    return values.take(index)


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
            columns = {"ask": "loglikelihood", "payload": store.add(ask.tokens), "start": ask.start, "end": ask.end}
            return columns if ask.lowest == 1.0 else columns | {"scale": ask.lowest}
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
        case protocol.Judge():
            return {"ask": "judge", "payload": store.add(ask.context)}
        case protocol.SlotLoss():
            return {"ask": "slot_loss", "slot": ask.slot}
        case protocol.EmbeddingGradient():
            return {"ask": "embedding_gradient", "slot": ask.slot, "key": ask.noise_key, "noise_slot": ask.noise_slot, "scale": ask.scale}
