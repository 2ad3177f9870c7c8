"""From an experiment's requests to the rows that placement works on, with every mistake caught before anything is written."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from megatron_exp.errors import UserError
from megatron_exp.experiments import protocol
from megatron_exp.experiments.protocol import Item, Request
from megatron_exp.placement.rows import Copies, candidate_key
from megatron_exp.stream.slot import Geometry

PAYLOAD_KINDS = ("tokens", "splice")
"""Kinds that write the item's payload."""

_WHOLE_SLOT_KINDS = ("swap", "noise")
_WINDOWS = (protocol.Window, protocol.Strata)
_MAX_COPIES = 65_535


def check_items(experiment: str, items: Sequence[Item], geometry: Geometry, vocabulary_size: int) -> None:
    """UserError where items are missing, numbered twice, too long or hold ids outside the vocabulary."""
    if not items:
        raise UserError(f"Experiment {experiment} yields no items. Check its counts and its data file.")
    seen: set[tuple[int, str]] = set()
    for item in items:
        where = f"Experiment {experiment}, condition {item.condition}, item {item.item}"
        if (item.item, item.arm) in seen:
            raise UserError(f"{where}, arm {item.arm} occurs twice. Item numbers must be unique; remove the duplicate.")
        seen.add((item.item, item.arm))
        if item.payload is None:
            continue
        if len(item.payload) > geometry.sequence_length:
            raise UserError(
                f"{where} ({item.source}): the payload has {len(item.payload)} tokens but a slot holds {geometry.sequence_length}. "
                "Shorten the text or raise geometry.sequence_length."
            )
        if not len(item.payload) or int(item.payload.min()) < 0 or int(item.payload.max()) >= vocabulary_size:
            raise UserError(
                f"{where}: its payload is empty or holds a token id outside the vocabulary of {vocabulary_size}. "
                "Tokenise it with the corpus's own tokenizer."
            )


def ranked(experiment: str, requests: Sequence[Request]) -> list[Request]:
    """The requests in rank order: item, arm, kind. These and the repetition name a copy, so there is one request for each."""
    ordered = sorted(requests, key=lambda request: (request.item, request.arm, request.kind))
    for before, after in pairwise(ordered):
        if (before.item, before.arm, before.kind) == (after.item, after.arm, after.kind):
            raise UserError(
                f"Experiment {experiment} makes two {after.kind} requests for item {after.item}, arm {after.arm}. Ask for all copies in one, "
                "or use two items."
            )
    return ordered


def copies_of(experiment: str, item: Item, request: Request, geometry: Geometry, placement_seed: int) -> Copies:
    """The placement rows of one request."""
    _check_request(experiment, item, request)
    where, kind = request.where, request.kind
    start = end = 0
    given = None
    if isinstance(where, _WINDOWS):
        _check_window(experiment, item, where.start, where.end, geometry)
        start, end = where.start * geometry.global_batch_size, where.end * geometry.global_batch_size
    else:
        given = _fixed_places(experiment, item, request, geometry)
    return Copies(
        experiment,
        item.condition,
        candidate_key(placement_seed, experiment, item.arm, kind),
        item.item,
        length_of(item, request),
        request.exclusive,
        request.copies,
        start,
        end,
        isinstance(where, protocol.Strata),
        given,
        kind == "splice",
    )


def length_of(item: Item, request: Request) -> int:
    """Tokens to write, 0 for the whole slot."""
    if request.kind in _WHOLE_SLOT_KINDS:
        return 0
    return request.mask_length or 0 if request.kind == "mask" else len(item.payload)  # type: ignore[arg-type]  # checked


def _fixed_places(experiment: str, item: Item, request: Request, geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
    match request.where:
        case protocol.Positions(places):
            pairs = list(places)
        case protocol.Match(slots):
            pairs = [(slot, 0) for slot in slots]
        case protocol.Batches(steps):
            pairs = [(slot, 0) for step in steps for slot in geometry.slots_of_step(step)]
        case _:
            raise AssertionError(request.where)
    if len(pairs) != request.copies:
        raise UserError(
            f"Experiment {experiment}, item {item.item}: {request.copies} copies are wanted but {len(pairs)} places are given. Make them equal."
        )
    columns = np.array(pairs, dtype=np.uint64).reshape(-1, 2)
    return columns[:, 0], columns[:, 1]


def _check_window(experiment: str, item: Item, start: int, end: int, geometry: Geometry) -> None:
    if not 0 <= start < end <= geometry.steps:
        raise UserError(
            f"Experiment {experiment}, condition {item.condition}: its window is steps {start} to {end}, but the run has steps 0 to "
            f"{geometry.steps}. Give a window inside the run."
        )


def _check_request(experiment: str, item: Item, request: Request) -> None:
    """Mistakes an experiment's author can make; messages name the experiment so that users know whom to ask."""
    problem = None
    if not 1 <= request.copies <= _MAX_COPIES:
        problem = f"{request.copies} copies are wanted; 1 to {_MAX_COPIES:,} are possible"
    elif item.role != "treated":
        problem = f"its role is {item.role}, and only treated items may be inserted"
    elif request.kind in PAYLOAD_KINDS and item.payload is None:
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
