"""How much of the training data a set of insertions rewrites, each position and each slot counted once."""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megatron_exp.manifest.schema import LAYERS
from megatron_exp.stream.slot import Geometry


class Rewritten(NamedTuple):
    """tokens: positions with other content or noise than the base stream (a loss mask rewrites none). slots: touched in any way.

    shifted: positions that show base content from further left, moved by a splice; not among `tokens`.
    """

    tokens: int
    slots: int
    shifted: int


def rewritten(insertions: pa.Table, geometry: Geometry) -> Rewritten:
    """Exact counts, however the insertions overlap: the union of [offset, offset + length) within every slot."""
    num_slots = len(np.unique(insertions["slot"].to_numpy()))
    rows = insertions.filter(pc.not_equal(insertions["layer"], LAYERS["mask"]))
    starts = rows["slot"].to_numpy() * np.uint64(geometry.sequence_length) + rows["offset"].to_numpy().astype(np.uint64)
    order = np.argsort(starts)  # equal ones may come in any order: their union is the same
    starts = starts[order]
    ends = starts + rows["length"].to_numpy().astype(np.uint64)[order]
    covered_to = np.maximum.accumulate(ends) if len(ends) else ends
    begin = starts.copy()
    begin[1:] = np.maximum(starts[1:], covered_to[:-1])
    spliced = rows.filter(pc.equal(rows["kind"].cast(pa.string()), "splice"))
    shifted = pc.sum(pc.subtract(geometry.sequence_length, pc.add(spliced["offset"], spliced["length"]).cast(pa.int64()))).as_py() or 0
    return Rewritten(int(np.maximum(ends.astype(np.int64) - begin.astype(np.int64), 0).sum()), num_slots, shifted)
