"""From decisions to insertions: the next items of the bank go to the first places of the interval's reserve."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megatron_exp import seeding
from megatron_exp.control.loop import Loop, State
from megatron_exp.manifest.reader import Manifest
from megatron_exp.manifest.schema import LAYERS, SEGMENTS

SEGMENT_KIND = "segment"
"""Stands for the kind in the key of a segment's insertion ids, so that an item may also be inserted by request."""


@dataclass(frozen=True, eq=False)
class Dispenser:
    """The reserve and the bank of a manifest."""

    manifest: Manifest

    def rows(self, loops: Mapping[str, Loop], decisions: Mapping[str, State]) -> pa.Table:
        """SEGMENTS: what the decisions of one model state insert, sorted by (slot, offset)."""
        parts = [self._rows(loops[name], state) for name, state in sorted(decisions.items())]
        if not parts:
            return SEGMENTS.empty_table()
        return pa.concat_tables(parts).sort_by([("slot", "ascending"), ("offset", "ascending")]).unify_dictionaries().combine_chunks()

    @cached_property
    def _reserve(self) -> dict[tuple[str, int], pa.Table]:
        """The places of each experiment and interval, in order of their number."""
        table = self.manifest.reserve()
        names, intervals = table["experiment"].cast(pa.string()).to_numpy(zero_copy_only=False), table["interval"].to_numpy()
        border = (np.flatnonzero((names[1:] != names[:-1]) | (intervals[1:] != intervals[:-1])) + 1).tolist()
        starts = [0, *border, len(table)] if len(table) else []
        return {
            (names[start], int(intervals[start])): table.slice(start, end - start) for start, end in zip(starts, starts[1:], strict=False)
        }

    @cached_property
    def _banks(self) -> dict[str, pa.Table]:
        table = self.manifest.bank()
        names = table["experiment"].cast(pa.string())
        return {name: table.filter(pc.equal(names, name)) for name in names.unique().to_pylist()}

    def _rows(self, loop: Loop, state: State) -> pa.Table:
        num, name = state.number, loop.experiment
        places = self._reserve[name, state.step // loop.interval].slice(0, num)
        assert len(places) == num, "the reserve holds the largest number of every interval"
        number = state.handed + np.arange(num)
        items = self._banks[name].take(pa.array(number % loop.bank_size))
        repetition = (number // loop.bank_size).astype(np.uint16)
        key = seeding.key(self.manifest.config.seeds.placement, "insertion", name, loop.arm, SEGMENT_KIND)
        same: dict[str, object] = {
            "experiment": name,
            "arm": loop.arm,
            "layer": LAYERS["tokens"],
            "kind": "tokens",
            "exclusive": False,
            "source_slot": None,
            "key": None,
            "window_start": state.step,
            "window_end": loop.end_of(state.step),
            "control_step": state.step,
            "probe_value": state.value,
            "target": state.aim,
            "decision": num,
        }
        columns: dict[str, pa.Array | pa.ChunkedArray] = {column: pa.array([value] * num) for column, value in same.items()}
        columns |= {column: items[column] for column in ("item", "condition", "payload", "length", "payload_hash")}
        columns |= {column: places[column] for column in ("slot", "step", "row", "offset")}
        columns["insertion_id"] = pa.array(seeding.words64(key, repetition, items["item"].to_numpy()))
        columns["repetition"] = pa.array(repetition)
        return pa.table({field.name: columns[field.name].cast(field.type) for field in SEGMENTS})
