import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from megatron_exp.manifest.rewritten import rewritten
from megatron_exp.manifest.schema import LAYERS
from megatron_exp.stream.slot import Geometry

GEOMETRY = Geometry(16, 4, 4)
one_row = st.tuples(st.sampled_from(sorted(LAYERS)), st.integers(0, 15), st.integers(0, 15), st.integers(1, 16))


@given(st.lists(one_row, max_size=30))
def test_every_position_and_slot_counts_once_however_insertions_overlap(rows):
    rows = [(kind, slot, offset, min(length, 16 - offset)) for kind, slot, offset, length in rows]
    touched = np.zeros((16, 16), dtype=bool)
    for kind, slot, offset, length in rows:
        touched[slot, offset : offset + length] |= kind != "mask"
    table = pa.table(
        {
            "layer": pa.array([LAYERS[kind] for kind, *_ in rows], pa.uint8()),
            "kind": pa.array([kind for kind, *_ in rows], pa.string()),
            "slot": pa.array([slot for _, slot, *_ in rows], pa.uint64()),
            "offset": pa.array([row[2] for row in rows], pa.uint32()),
            "length": pa.array([row[3] for row in rows], pa.uint32()),
        }
    )
    shifted = sum(16 - offset - length for kind, _, offset, length in rows if kind == "splice")
    assert rewritten(table, GEOMETRY) == (touched.sum(), len({slot for _, slot, *_ in rows}), shifted)
