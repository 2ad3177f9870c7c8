"""Items, requests and probes of the experiments as the manifest's tables."""

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
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


def item_rows(experiment: str, items: Sequence[Item], store: Payloads, base_rates: BaseRatesLike | None = None) -> Iterator[dict[str, Any]]:
    """Rows of the items table; payloads go into the store, base rates come from a search where there was one."""
    for item in items:
        yield {
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


def table_of(rows: Iterable[dict[str, Any]], table_schema: pa.Schema) -> pa.Table:
    """A table of plain rows in the given schema, made block by block: as Python objects the rows of a large plan take several times as much."""
    left, blocks = iter(rows), [table_schema.empty_table()]
    while block := list(islice(left, _BLOCK_ROWS)):
        blocks.append(pa.Table.from_pylist(block, schema=table_schema))
    return pa.concat_tables(blocks).unify_dictionaries().combine_chunks()


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
    per_request = _per_request([wanted[i] for i in chosen], store, geometry, placement_seed)
    rows = np.flatnonzero(np.repeat(number >= 0, np.diff(placement.table.bounds)))
    insertion_id, places = _ids_and_places(placement, rows, number, per_request, geometry)
    order = _order(places, insertion_id)
    del places
    rows = rows[order]
    columns = {"insertion_id": pa.array(insertion_id[order])}
    del insertion_id, order
    columns |= _per_copy(placement, rows, geometry) | {"source_slot": _source_slots(wanted, placement, rows)}
    request = number[placement.table.request[rows]]
    del rows
    columns |= {name: _spread(values, request) for name, values in per_request.items() if name in schema.INSERTIONS.names}
    return pa.table({name: columns[name] for name in schema.INSERTIONS.names}, schema=schema.INSERTIONS)


def _per_request(wanted: Sequence[Wanted], store: Payloads, geometry: Geometry, placement_seed: int) -> dict[str, pa.Array]:
    """Columns with one value per request, and the key of its insertion ids. Numbers go into arrays as they come: as Python objects they take more."""
    num = len(wanted)
    payloads = [one.item.payload if one.request.kind in PAYLOAD_KINDS else None for one in wanted]
    lengths = (
        one.request.mask_length or (geometry.sequence_length if tokens is None else len(tokens))
        for one, tokens in zip(wanted, payloads, strict=True)
    )
    without = np.fromiter((tokens is None for tokens in payloads), bool, num)
    quiet = np.fromiter((one.request.kind != "noise" for one in wanted), bool, num)
    noise = (0 if still else noise_key(placement_seed, one.experiment) for one, still in zip(wanted, quiet, strict=True))
    keys = (insertion_key(placement_seed, one.experiment, one.item.arm, one.request.kind) for one in wanted)
    hashes = (b"" if tokens is None else payload_hash(tokens) for tokens in payloads)
    return {
        "experiment": _names(one.experiment for one in wanted),
        "condition": _names(one.item.condition for one in wanted),
        "item": pa.array(np.fromiter((one.item.item for one in wanted), np.uint64, num)),
        "arm": _names(one.item.arm for one in wanted),
        "layer": pa.array(np.fromiter((schema.LAYERS[one.request.kind] for one in wanted), np.uint8, num)),
        "kind": _names(one.request.kind for one in wanted),
        "exclusive": pa.array(np.fromiter((one.request.exclusive for one in wanted), bool, num)),
        "length": pa.array(np.fromiter(lengths, np.uint32, num)),
        "payload": pa.array(np.fromiter((0 if tokens is None else store.add(tokens) for tokens in payloads), np.uint64, num), mask=without),
        "key": pa.array(np.fromiter(noise, np.uint64, num), mask=quiet),
        "payload_hash": _binaries(np.fromiter(hashes, "S16", num), without),
        "insertion_key": pa.array(np.fromiter(keys, np.uint64, num)),
    }


def _names(values: Iterable[str]) -> pa.DictionaryArray:
    """The distinct names and their numbers, in the order of their first use."""
    codes: dict[str, int] = {}
    numbers = np.fromiter((codes.setdefault(value, len(codes)) for value in values), np.int32)
    return pa.DictionaryArray.from_arrays(pa.array(numbers), pa.array(list(codes), pa.string()))


def _binaries(values: np.ndarray, mask: np.ndarray) -> pa.Array:
    """Byte strings of one length (S16 [n]) as Arrow, null where `mask`."""
    valid = pa.array(~mask).buffers()[1] if mask.any() else None
    return pa.Array.from_buffers(pa.binary(values.itemsize), len(values), [valid, pa.py_buffer(values.view(np.uint8).data)])


def _ids_and_places(
    placement: Placement, rows: np.ndarray, number: np.ndarray, per_request: dict[str, pa.Array], geometry: Geometry
) -> tuple[np.ndarray, np.ndarray]:
    """uint64 [rows] each: insertion ids, and (slot, layer, offset) as one number."""
    keys, layers = per_request["insertion_key"].to_numpy(), per_request["layer"].to_numpy().astype(np.uint64)
    ids, places = np.empty(len(rows), np.uint64), np.empty(len(rows), np.uint64)
    for start in range(0, len(rows), _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        part = rows[block]
        request = number[placement.table.request[part]]
        ids[block] = seeding.words64(keys[request], placement.table.repetition(part), placement.table.of_request("item", part))
        layer = placement.slots[part] * np.uint64(_NUM_LAYERS) + layers[request]
        places[block] = layer * np.uint64(geometry.sequence_length) + placement.offsets[part].astype(np.uint64)
    return ids, places


def _order(places: np.ndarray, insertion_id: np.ndarray) -> np.ndarray:
    """Order by place, then insertion id."""
    order = np.argsort(places)
    placed = places[order]
    if np.any(placed[1:] == placed[:-1]):  # rare: noise of two experiments in one slot
        return np.lexsort((insertion_id, places))
    return order


def _per_copy(placement: Placement, rows: np.ndarray, geometry: Geometry) -> dict[str, pa.Array]:
    """Columns with a value of its own for each copy, but where swaps come from; in blocks, since temporaries of all rows would take as much as the table."""
    table, batch = placement.table, np.uint64(geometry.global_batch_size)
    names = ("repetition", "slot", "step", "row", "offset", "window_start", "window_end")
    columns = {name: np.empty(len(rows), schema.INSERTIONS.field(name).type.to_pandas_dtype()) for name in names}
    for start in range(0, len(rows), _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        part = rows[block]
        slots, given = placement.slots[part], table.is_given(part)
        first, end = table.windows(part)
        first[given], end[given] = slots[given], slots[given] + np.uint64(1)
        last = (end + batch - np.uint64(1)) // batch
        values = (table.repetition(part), slots, slots // batch, slots % batch, placement.offsets[part], first // batch, last)
        for name, value in zip(names, values, strict=True):
            columns[name][block] = value
    return {name: pa.array(column) for name, column in columns.items()}


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


def _spread(values: pa.Array, index: np.ndarray) -> pa.Array:
    """`values` taken at `index` (int32 [rows]). numpy holds each column once; Arrow's own way takes more memory."""
    if pa.types.is_dictionary(values.type):
        return pa.DictionaryArray.from_arrays(pa.array(values.indices.to_numpy()[index]), values.dictionary)
    mask = values.is_null().to_numpy(zero_copy_only=False)[index] if values.null_count else None
    if pa.types.is_fixed_size_binary(values.type):
        raw = np.frombuffer(values.buffers()[1], f"S{values.type.byte_width}", len(values))
        return _binaries(raw[index], np.zeros(len(index), bool) if mask is None else mask)
    plain = values.fill_null(0) if values.null_count else values
    return pa.array(plain.to_numpy(zero_copy_only=False)[index], mask=mask)


@lru_cache(maxsize=4096)
def insertion_key(placement_seed: int, experiment: str, arm: str, kind: str) -> int:
    """Key of the insertion ids; item and repetition are the counter."""
    return seeding.key(placement_seed, "insertion", experiment, arm, kind)


@lru_cache(maxsize=4096)
def noise_key(placement_seed: int, experiment: str) -> int:
    """Key of an experiment's inserted noise."""
    return seeding.key(placement_seed, "noise", experiment)


def probe_rows(experiment: str, probes: Iterable[Probe], store: Payloads) -> Iterator[dict[str, Any]]:
    """Rows of the probe definitions table (without probe_id); token sequences go into the store."""
    for probe in probes:
        yield {
            "experiment": experiment,
            "item": probe.item,
            "arm": probe.arm,
            "name": probe.name,
            "states": list(probe.states),
            "live": probe.live,
            "of": sorted(probe.of),
            **_ask_columns(probe.ask, store),
        }


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
