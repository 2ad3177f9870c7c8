"""From an experiment's `Controller` to what the manifest holds of it: a reserve of places, the bank, and a record."""

import inspect
from collections import Counter
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from megatron_exp import seeding
from megatron_exp.control.rules import find_rule
from megatron_exp.errors import UserError
from megatron_exp.experiments.protocol import Controller, Item, Probe
from megatron_exp.experiments.tables import Payloads, Wanted, insertion_key
from megatron_exp.manifest.payloads import payload_hash
from megatron_exp.manifest.schema import BANK, RESERVE
from megatron_exp.placement.place import Placement
from megatron_exp.placement.rows import Copies, candidate_key
from megatron_exp.stream.slot import Geometry

RESERVE_KIND = "reserve"
_MOST_COPIES = 65_535


class Reserved(NamedTuple):
    """The places kept for one interval of an experiment's controller."""

    experiment: str
    arm: str
    interval: int
    copies: Copies


def reserved_places(
    experiment: str, controller: Controller, items: Sequence[Item], geometry: Geometry, placement_seed: int
) -> list[Reserved]:
    """As many places in every interval as the controller may ever use, each long enough for any item of the bank.

    Call after `check_controller`. They are placed like copies of the experiment, after those it requests, so nothing else is ever put there.
    """
    length = max(len(item.payload) for item in _bank(controller, items) if item.payload is not None)
    key = candidate_key(placement_seed, experiment, controller.arm, RESERVE_KIND)
    batch, found = geometry.global_batch_size, []
    for interval, step in enumerate(range(0, geometry.steps, controller.interval)):
        window = (step * batch, min(step + controller.interval, geometry.steps) * batch)
        copies = Copies(experiment, RESERVE_KIND, key, interval, length, False, controller.largest, *window)
        found.append(Reserved(experiment, controller.arm, interval, copies))
    return found


def check_controller(experiment: str, controller: Controller, items: Sequence[Item], geometry: Geometry) -> None:
    """UserError where a controller cannot work: an empty bank, numbers outside their ranges, an unknown rule."""
    find_rule(controller.rule, controller.parameters)
    by_item = {item.item: item for item in items if item.arm == controller.arm}
    unfit = [number for number in controller.bank if number not in by_item or not _can_be_handed_out(by_item[number])]
    twice = [number for number, times in Counter(controller.bank).items() if times > 1]
    intervals = -(-geometry.steps // max(controller.interval, 1))
    problem = None
    if not 1 <= controller.interval <= geometry.steps:
        problem = f"its interval is {controller.interval} steps, but the run has {geometry.steps}; choose 1 to {geometry.steps}"
    elif not controller.bank:
        problem = "its bank is empty, so there is nothing to insert; give it items"
    elif unfit or twice:
        problem = (
            f"item {(unfit or twice)[0]} of its bank "
            + ("is not a treated item with a payload" if unfit else "stands there twice")
            + "; correct the bank"
        )
    elif not 1 <= controller.first <= controller.largest <= _MOST_COPIES:
        problem = f"it begins with {controller.first} copies and may go up to {controller.largest}; 1 <= first <= largest <= {_MOST_COPIES:,} is needed"
    elif controller.largest * intervals / len(controller.bank) > _MOST_COPIES:
        problem = f"a bank of {len(controller.bank)} could be handed out more than {_MOST_COPIES:,} times over; give it more items"
    elif not controller.target > 0:
        problem = f"its target is {controller.target}; give a number above 0"
    if problem:
        raise UserError(f"The controller of experiment {experiment} cannot work: {problem}.")


def check_probes(experiment: str, controller: Controller, probes: Iterable[Probe], geometry: Geometry) -> None:
    """UserError where what the controller measures is not asked of the live model whenever it decides."""
    states = set(range(controller.interval, geometry.steps, controller.interval))
    asked = {probe.item: probe for probe in probes if probe.name == controller.probe and probe.arm == controller.arm}
    silent = [item for item in controller.asked if item not in asked or not asked[item].live or not states <= set(asked[item].states)]
    if not controller.asked or silent:
        found = f"item {silent[0]}" if silent else "nobody"
        raise UserError(
            f"The controller of experiment {experiment} decides every {controller.interval} steps by the probe {controller.probe!r}, but {found} is not "
            "asked it live in all of these states. Yield live probes of that name with these states."
        )


def controller_record(controller: Controller, intervals: int) -> dict[str, Any]:
    """The entry of manifest.json; the bank is a table of its own."""
    rule = type(find_rule(controller.rule, controller.parameters))
    return {
        "interval": controller.interval,
        "intervals": intervals,
        "probe": controller.probe,
        "arm": controller.arm,
        "asked": list(controller.asked),
        "bank_size": len(controller.bank),
        "first": controller.first,
        "largest": controller.largest,
        "target": controller.target,
        "rule": controller.rule,
        "parameters": find_rule(controller.rule, controller.parameters).model_dump(mode="json"),
        "rule_hash": sha256(Path(inspect.getfile(rule)).read_bytes()).hexdigest(),
    }


def reserve_table(
    wanted: Sequence[Wanted | Reserved], placement: Placement, geometry: Geometry, placement_seed: int, only: frozenset[str] | None = None
) -> pa.Table:
    """RESERVE: where the reserved places are; `wanted` is in the order that placement had."""
    parts = []
    for request, one in enumerate(wanted):
        if isinstance(one, Wanted) or (only is not None and one.experiment not in only):
            continue
        slots, offsets = placement.of(request)
        num = len(slots)
        number = np.arange(num, dtype=np.uint16)
        key = insertion_key(placement_seed, one.experiment, one.arm, RESERVE_KIND)
        batch = np.uint64(geometry.global_batch_size)
        columns = {
            "place_id": seeding.words64(key, number, one.interval),
            "experiment": [one.experiment] * num,
            "interval": np.full(num, one.interval, np.uint32),
            "number": number,
            "slot": slots,
            "step": (slots // batch).astype(np.uint32),
            "row": (slots % batch).astype(np.uint32),
            "offset": offsets.astype(np.uint32),
            "length": np.full(num, one.copies.length, np.uint32),
        }
        parts.append(pa.table({name: pa.array(values).cast(RESERVE.field(name).type) for name, values in columns.items()}, schema=RESERVE))
    return pa.concat_tables(parts).unify_dictionaries().combine_chunks() if parts else RESERVE.empty_table()


def bank_table(experiment: str, controller: Controller, items: Sequence[Item], store: Payloads) -> pa.Table:
    """BANK: the items in hand-out order, with their payloads."""
    bank = _bank(controller, items)
    payloads = [item.payload for item in bank if item.payload is not None]
    columns: dict[str, Any] = {
        "experiment": [experiment] * len(bank),
        "position": np.arange(len(bank), dtype=np.uint32),
        "item": np.array([item.item for item in bank], np.uint64),
        "condition": [item.condition for item in bank],
        "arm": [item.arm for item in bank],
        "payload": np.array([store.add(tokens) for tokens in payloads], np.uint64),
        "length": np.array([len(tokens) for tokens in payloads], np.uint32),
        "payload_hash": pa.array([payload_hash(tokens) for tokens in payloads], pa.binary(16)),
    }
    return pa.table({name: pa.array(values).cast(BANK.field(name).type) for name, values in columns.items()}, schema=BANK)


def _bank(controller: Controller, items: Sequence[Item]) -> list[Item]:
    by_item = {item.item: item for item in items if item.arm == controller.arm}
    return [by_item[number] for number in controller.bank]


def _can_be_handed_out(item: Item) -> bool:
    return item.role == "treated" and item.payload is not None
