"""Insertions decided while training: what controllers handed out so far, as the overlay sees it."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from megatron_exp.stream.slot import Geometry


class Decided:
    """Grows by whole intervals. A reader in another thread sees an interval's insertions all at once, and only below the frontier.

    frontier: the first step about which something is still to be decided; slots from there on must not be read.
    """

    def __init__(self, geometry: Geometry, frontier: int):
        self.frontier = frontier
        self._geometry = geometry
        self._of_slot: dict[int, list[tuple[str, int, int, int]]] = {}
        self._tokens: dict[str, np.ndarray] = {}

    def add(self, rows: pa.Table, frontier: int) -> None:
        """Take in the rows of a segment (SEGMENTS), after which everything below `frontier` is decided."""
        found = dict(self._of_slot)
        columns = [rows[name].to_pylist() for name in ("slot", "experiment", "offset", "length", "payload", "step")]
        for slot, experiment, offset, length, payload, step in zip(*columns, strict=True):
            found[slot] = [*found.get(slot, ()), (experiment, offset, length, payload)]
            per_step = self._tokens.setdefault(experiment, np.zeros(self._geometry.steps, np.int64))
            per_step[step] += length
        self._of_slot = found
        self.frontier = frontier

    def of(self, slot: int) -> Iterator[tuple[str, int, int, int]]:
        """(experiment, offset, length, payload number) of a slot's insertions."""
        if self._geometry.step(slot) >= self.frontier and slot < self._geometry.num_slots:
            raise RuntimeError(
                f"slot {slot} of step {self._geometry.step(slot)} was read, but nothing is decided from step {self.frontier} on"
            )
        return iter(self._of_slot.get(slot, ()))

    def modified_tokens(self, step: int) -> dict[str, int]:
        """Tokens handed out into the steps before state `step`, by experiment."""
        return {name: int(per_step[:step].sum()) for name, per_step in self._tokens.items()}
