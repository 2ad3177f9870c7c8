"""How much of an experiment a short run holds: a part of what it requests, drawn by key, or more copies of all of it."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from megatron_exp.errors import UserError
from megatron_exp.experiments.context import words64_of
from megatron_exp.experiments.protocol import Batches, Item, Match, Positions, Request, Window
from megatron_exp.experiments.requests import PAYLOAD_KINDS, length_of
from megatron_exp.seeding import Words
from megatron_exp.stream.slot import Geometry

_MOST_COPIES = 65_535
Key = tuple[int, str]
"""What names an item: its number and arm."""


def open_loop(items: Sequence[Item], requests: Sequence[Request], bank: Collection[int], geometry: Geometry) -> list[Request]:
    """The requests, and one copy anywhere for every item of a controller's bank that has none: a closed loop at a fixed intensity."""
    requested, numbers = {(request.item, request.arm) for request in requests}, set(bank)
    handed = [item for item in items if item.role == "treated" and item.item in numbers and (item.item, item.arm) not in requested]
    where = Window(0, geometry.steps)
    return [*requests, *(Request(item=item.item, arm=item.arm, kind="tokens", where=where, copies=1) for item in handed)]


def at_tokens(requests: Sequence[Request], items: Mapping[Key, Item], wanted: int, geometry: Geometry, words: Words) -> list[Request]:
    """Requests for about `wanted` tokens: never fewer, and at most one copy more, where what is requested can be repeated at all.

    Clusters are taken in keyed order, whole as far as they fit, so that what is read together stays together. Swaps, noise and masks exist once: where
    all of them are fewer, they are all taken.
    """
    tokens_of = [_length(items, request, geometry) * request.copies for request in requests]
    total = sum(tokens_of)
    if not total:
        return list(requests)
    if total < wanted:
        repeatable = all(request.kind in PAYLOAD_KINDS for request in requests)
        return _repeated(requests, items, wanted, geometry, words) if repeatable else list(requests)
    taken, left = [], wanted
    for index in _order(requests, items, words):
        if left <= 0:
            break
        request = requests[index]
        length = _length(items, request, geometry)
        copies = min(request.copies, -(-left // length))
        taken.append(request if copies == request.copies else _with_copies(request, copies, geometry))
        left -= copies * length
    return taken


def _repeated(requests: Sequence[Request], items: Mapping[Key, Item], wanted: int, geometry: Geometry, words: Words) -> list[Request]:
    """Every request as often as all fit into the wanted tokens, and one more copy of the first in keyed order."""
    copies = [0] * len(requests)
    total = sum(_length(items, request, geometry) * request.copies for request in requests)
    for index, request in enumerate(requests):
        copies[index] = request.copies * (wanted // total)
    left = wanted - total * (wanted // total)
    for index in _order(requests, items, words):
        if left <= 0:
            break
        more = min(requests[index].copies, -(-left // _length(items, requests[index], geometry)))
        copies[index] += more
        left -= more * _length(items, requests[index], geometry)
    if max(copies) > _MOST_COPIES:
        raise UserError(
            f"An experiment would repeat one item {max(copies)} times to reach its share of a dependence test. Give it more items, or a smaller --intensity."
        )
    return [_with_copies(request, number, geometry) for request, number in zip(requests, copies, strict=True) if number]


def _order(requests: Sequence[Request], items: Mapping[Key, Item], words: Words) -> list[int]:
    """Indices of the requests by cluster, then item, both in keyed order."""
    clusters = [_cluster(items[request.item, request.arm]) for request in requests]
    by_cluster = words64_of(words.child("clusters"), clusters)
    by_item = words64_of(words.child("items"), [request.item for request in requests])
    return sorted(range(len(requests)), key=lambda index: (by_cluster[index], by_item[index], requests[index].arm, requests[index].kind))


def _with_copies(request: Request, copies: int, geometry: Geometry) -> Request:
    where = request.where
    match where:
        case Positions(places):
            where = Positions(places[:copies]) if copies <= len(places) else Window(0, geometry.steps)
        case Match(slots):
            where = Match(slots[:copies])
        case Batches():
            return request  # a batch is read as one
    sources = None if request.source_slots is None else request.source_slots[:copies]
    return dataclasses.replace(request, copies=copies, source_slots=sources, where=where)


def _length(items: Mapping[Key, Item], request: Request, geometry: Geometry) -> int:
    return request.mask_length or (length_of(items[request.item, request.arm], request) or geometry.sequence_length)


def _cluster(item: Item) -> int:
    return item.item if item.cluster is None else item.cluster
