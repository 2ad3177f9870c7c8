"""Requests and their copies as columns: the input and the output of placement."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from megatron_exp import seeding
from megatron_exp.errors import UserError
from megatron_exp.stream.slot import Geometry

FLOATING = -1
"""Value of `REQUEST["given"]` where the places are to be found."""

REQUEST = np.dtype(
    [
        ("experiment", np.int32),
        ("condition", np.int32),
        ("key", np.uint64),
        ("item", np.uint64),
        ("length", np.int64),
        ("start", np.int64),
        ("end", np.int64),
        ("given", np.int64),
        ("exclusive", np.bool_),
        ("even", np.bool_),
        ("splice", np.bool_),
    ]
)
"""One request. experiment, condition: numbers of names. given: where its places begin in `CopyTable.given_slots`, or FLOATING."""


class Copies(NamedTuple):
    """All copies of one request.

    experiment, condition: for rank and messages. key: of the candidate sequences; item and repetition are its counters. length: tokens to
    write, or 0 for the whole slot. start, end: window in slots; `even` gives copy r the r-th of `num` equal parts of it. fixed: given
    (slots, offsets), uint64 [num] each, or None where places are to be found. splice: at a document boundary, in a slot of its own.
    """

    experiment: str
    condition: str
    key: int
    item: int
    length: int
    exclusive: bool
    num: int
    start: int = 0
    end: int = 0
    even: bool = False
    fixed: tuple[np.ndarray, np.ndarray] | None = None
    splice: bool = False


@lru_cache(maxsize=4096)
def candidate_key(placement_seed: int, experiment: str, arm: str, kind: str) -> int:
    """Key of the candidate sequences of one experiment's copies; item, repetition and draw are the counter."""
    return seeding.key(placement_seed, "place", experiment, arm, kind)


@dataclass(frozen=True, eq=False)
class CopyTable:
    """One row per copy, in rank order (requests as given, then repetition); what copies of a request share is kept once.

    requests: REQUEST [num]. bounds: int64 [num + 1], first row of each request. request: int32 [rows]. given_slots, given_offsets: uint64, the given
    places of all requests, one after the other. names: of experiments and conditions.
    """

    requests: np.ndarray
    bounds: np.ndarray
    request: np.ndarray
    given_slots: np.ndarray
    given_offsets: np.ndarray
    names: tuple[str, ...]

    @classmethod
    def of(cls, requests: Iterable[Copies]) -> "CopyTable":
        """The rows of all requests, which are looked at one by one."""
        names: dict[str, int] = {}
        given: list[tuple[np.ndarray, np.ndarray]] = []
        columns = np.fromiter(_rows(requests, names, given), np.dtype([("num", np.int64), ("request", REQUEST)]))
        slots, offsets = (np.concatenate([np.empty(0, np.uint64), *(pair[k] for pair in given)]) for k in (0, 1))
        return cls(
            requests=columns["request"].copy(),
            bounds=np.concatenate([[0], np.cumsum(columns["num"])]),
            request=np.repeat(np.arange(len(columns), dtype=np.int32), columns["num"]),
            given_slots=slots,
            given_offsets=offsets,
            names=tuple(names),
        )

    def __len__(self) -> int:
        return len(self.request)

    def of_request(self, name: str, rows: np.ndarray | slice) -> np.ndarray:
        """A column of the rows' requests."""
        return self.requests[name][self.request[rows]]

    def of_all(self, name: str) -> np.ndarray:
        """A column of the requests of all rows, without an index of all rows."""
        return np.repeat(self.requests[name], np.diff(self.bounds))

    @cached_property
    def whole(self) -> np.ndarray:
        """bool [rows]: copies that take the whole slot."""
        return np.repeat(self.requests["length"] == 0, np.diff(self.bounds))

    def repetition(self, rows: np.ndarray) -> np.ndarray:
        """uint64: which copy of its request each row is."""
        return (rows - self.bounds[self.request[rows]]).astype(np.uint64)

    def is_given(self, rows: np.ndarray | slice) -> np.ndarray:
        """Whether the rows' places are given."""
        return self.of_request("given", rows) != FLOATING

    def given_place(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Given slots and offsets of rows that have them."""
        index = self.of_request("given", rows) + self.repetition(rows).astype(np.int64)
        return self.given_slots[index], self.given_offsets[index]

    def windows(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint64 first and end slot of each row's own window: the whole one of its request, or its part of it."""
        request = self.request[rows]
        start, end, copies = self.requests["start"][request], self.requests["end"][request], np.diff(self.bounds)[request]
        even, repetition, width = self.requests["even"][request], rows - self.bounds[request], end - start
        first = np.where(even, start + repetition * width // copies, start)
        last = np.where(even, start + (repetition + 1) * width // copies, end)
        return first.astype(np.uint64), last.astype(np.uint64)

    @cached_property
    def experiments(self) -> list[slice]:
        """Rows of each experiment (consecutive requests of one name)."""
        names = self.requests["experiment"]
        starts = np.flatnonzero(np.concatenate([[True], names[1:] != names[:-1]])) if len(names) else np.empty(0, np.int64)
        return [slice(int(self.bounds[a]), int(self.bounds[b])) for a, b in pairwise([*starts.tolist(), len(names)])]

    def name(self, row: int) -> str:
        """How messages call a row's request."""
        one = self.requests[self.request[row]]
        return f"Experiment {self.names[one['experiment']]}, condition {self.names[one['condition']]}, item {one['item']}"

    def no_room(self, row: int, geometry: Geometry, detail: str) -> UserError:
        """The error for a copy that finds no place."""
        one, rows = self.requests[self.request[row]], np.array([row])
        repetition, length = int(self.repetition(rows)[0]), int(one["length"])
        if one["given"] != FLOATING:
            slot, offset = (int(column[0]) for column in self.given_place(rows))
            needs = ", holds another copy, or has no document boundary there" if one["splice"] else " or holds another copy"
            return UserError(
                f"{self.name(row)}: copy {repetition} must be at slot {slot}, offset {offset}, which is exclusive{needs}. "
                "Choose another place, or list this experiment before the one that holds it."
            )
        first, end = (int(column[0]) for column in self.windows(rows))
        size = f"of {length} tokens " if length else ""
        kind = "free slot with a document boundary that leaves room for it" if one["splice"] else "free place"
        return UserError(
            f"{self.name(row)}: copy {repetition} {size}finds no {kind} in steps {geometry.step(first)} to "
            f"{-(-end // geometry.global_batch_size)} ({end - first} slots, {(end - first) * geometry.sequence_length} tokens): {detail}. "
            "Widen the window, ask for fewer or shorter copies, or train for more steps."
        )

    def check(self, geometry: Geometry) -> None:
        """UserError where a request can never be met: payload longer than a slot, window outside the run or empty."""
        requests, copies = self.requests, np.diff(self.bounds)
        for number in np.flatnonzero((requests["length"] > geometry.sequence_length) & (copies > 0))[:1]:
            raise UserError(
                f"{self.name(self.bounds[number])}: the payload has {requests['length'][number]} tokens but a slot holds {geometry.sequence_length}. "
                "Shorten the text or raise geometry.sequence_length."
            )
        given = requests["given"] != FLOATING
        last = np.where(given, 0, requests["end"])
        for number in np.flatnonzero(given):
            last[number] = self.given_slots[requests["given"][number] :][: copies[number]].max(initial=np.uint64(0)) + np.uint64(1)
        for number in np.flatnonzero((last > geometry.num_slots) & (copies > 0))[:1]:
            steps = -(-int(last[number]) // geometry.global_batch_size)
            raise UserError(
                f"{self.name(self.bounds[number])}: it asks for steps up to {steps}, but the run has {geometry.steps}. Move the window."
            )
        width = requests["end"] - requests["start"]
        for number in np.flatnonzero(~given & (copies > 0) & (width < np.where(requests["even"], copies, 1)))[:1]:
            raise UserError(
                f"{self.name(self.bounds[number])}: its window holds no slot (fewer slots than copies, or an empty window). "
                "Widen it or ask for fewer copies."
            )


def _rows(requests: Iterable[Copies], names: dict[str, int], given: list[tuple[np.ndarray, np.ndarray]]) -> Iterator[tuple]:
    """(copies, REQUEST) of each request; names get numbers as they come, given places are set aside."""
    num_given = 0
    for one in requests:
        place = FLOATING
        if one.fixed is not None:
            place, num_given = num_given, num_given + one.num
            given.append(one.fixed)
        experiment, condition = names.setdefault(one.experiment, len(names)), names.setdefault(one.condition, len(names))
        window = (one.start, one.end, place, one.exclusive, one.even, one.splice)
        yield one.num, (experiment, condition, one.key, one.item, one.length, *window)
