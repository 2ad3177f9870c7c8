"""From an experiment's requests to the rows that placement works on, with every mistake caught before anything is written."""

from collections.abc import Sequence

import numpy as np

from megatron_exp.errors import UserError
from megatron_exp.experiments import protocol
from megatron_exp.experiments.protocol import Item, Request
from megatron_exp.placement.rows import Copies, candidate_key, floating, window_copies
from megatron_exp.stream.slot import Geometry

_WHOLE_SLOT_KINDS = ("swap", "noise")


def check_items(experiment: str, items: Sequence[Item], geometry: Geometry, vocabulary_size: int) -> None:
    """UserError where items are missing, numbered twice, too long or hold ids outside the vocabulary."""
    if not items:
        raise UserError(f"Experiment {experiment} yields no items. Check its counts and its data file.")
    seen: set[tuple[int, str]] = set()
    for item in items:
        if (item.item, item.arm) in seen:
            raise UserError(
                f"Experiment {experiment}: item {item.item}, arm {item.arm} occurs twice. Item numbers must be unique; remove the duplicate."
            )
        seen.add((item.item, item.arm))
        if item.payload is None:
            continue
        if len(item.payload) > geometry.sequence_length:
            raise UserError(
                f"Experiment {experiment}, condition {item.condition}, item {item.item}: the payload has {len(item.payload)} tokens but a slot holds "
                f"{geometry.sequence_length}. Shorten the text or raise geometry.sequence_length."
            )
        if not len(item.payload) or int(item.payload.min()) < 0 or int(item.payload.max()) >= vocabulary_size:
            raise UserError(
                f"Experiment {experiment}, item {item.item}: its payload is empty or holds a token id outside the vocabulary of {vocabulary_size}. "
                "Tokenise it with the corpus's own tokenizer."
            )


def copies_of(experiment: str, item: Item, request: Request, geometry: Geometry, placement_seed: int) -> Copies:
    """The placement rows of one request."""
    _check_request(experiment, item, request)
    num, where = request.copies, request.where
    first, end = floating(num), floating(num)
    fixed_slot, fixed_offset = floating(num), np.zeros(num, np.uint64)
    if isinstance(where, protocol.Window | protocol.Strata):
        _check_window(experiment, item, where.start, where.end, geometry)
        first, end = window_copies(where.start, where.end, num, geometry, even=isinstance(where, protocol.Strata))
    else:
        places = _fixed_places(where, geometry)
        if len(places) != num:
            raise UserError(
                f"Experiment {experiment}, item {item.item}: {num} copies are wanted but {len(places)} places are given. Make them equal."
            )
        fixed_slot = np.array([slot for slot, _ in places], dtype=np.uint64)
        fixed_offset = np.array([offset for _, offset in places], dtype=np.uint64)
    length = 0 if request.kind in _WHOLE_SLOT_KINDS else (request.mask_length or 0) if request.kind == "mask" else len(item.payload)  # type: ignore[arg-type]
    return Copies(
        name=experiment,
        condition=item.condition,
        key=candidate_key(placement_seed, experiment, item.arm, request.kind),
        item=item.item,
        length=length,
        exclusive=request.exclusive,
        first_slot=first,
        end_slot=end,
        fixed_slot=fixed_slot,
        fixed_offset=fixed_offset,
    )


def _fixed_places(where: protocol.Where, geometry: Geometry) -> list[tuple[int, int]]:
    match where:
        case protocol.Positions(places):
            return list(places)
        case protocol.Match(slots):
            return [(slot, 0) for slot in slots]
        case protocol.Batches(steps):
            return [(slot, 0) for step in steps for slot in geometry.slots_of_step(step)]
    raise AssertionError(where)


def _check_window(experiment: str, item: Item, start: int, end: int, geometry: Geometry) -> None:
    if not 0 <= start < end <= geometry.steps:
        raise UserError(
            f"Experiment {experiment}, condition {item.condition}: its window is steps {start} to {end}, but the run has steps 0 to "
            f"{geometry.steps}. Give a window inside the run."
        )


def _check_request(experiment: str, item: Item, request: Request) -> None:
    """Mistakes an experiment's author can make; messages name the experiment so that users know whom to ask."""
    problem = None
    if request.kind == "splice":
        problem = "splice placement is not available in this version; use kind `tokens`, which overwrites"
    elif request.copies < 1 or request.copies > 65_535:
        problem = f"{request.copies} copies are wanted; 1 to 65,535 are possible"
    elif item.role != "treated":
        problem = f"its role is {item.role}, and only treated items may be inserted"
    elif request.kind == "tokens" and item.payload is None:
        problem = "it has no payload to write"
    elif request.kind == "swap" and (request.source_slots is None or len(request.source_slots) != request.copies):
        problem = "a swap needs one source slot per copy"
    elif request.kind == "noise" and request.noise is None:
        problem = "a noise request needs its scale"
    elif request.kind == "mask" and not request.mask_length:
        problem = "a mask request needs mask_length"
    elif request.exclusive and request.kind not in _WHOLE_SLOT_KINDS:
        problem = "only swaps and noise can be exclusive"
    if problem:
        raise UserError(f"Experiment {experiment}, condition {item.condition}, item {item.item} cannot be inserted: {problem}.")
