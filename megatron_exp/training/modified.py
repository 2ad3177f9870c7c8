"""How many tokens the experiments have rewritten by each state of a run."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megatron_exp.manifest.reader import Manifest
from megatron_exp.manifest.schema import LAYERS


def modified_tokens(manifest: Manifest, masked: frozenset[str]) -> dict[str, np.ndarray]:
    """For each experiment that is not masked: int64 [steps + 1], positions rewritten in the steps before state t.

    Counted as in the manifest: whole slots for swaps and noise, nothing for loss masks.
    """
    table = manifest.insertions().select(["experiment", "step", "length", "layer"])
    table = table.filter(pc.not_equal(table["layer"], LAYERS["mask"]))
    experiment = table["experiment"].cast(pa.string())
    num_steps = manifest.geometry.steps
    result = {}
    for name in manifest.experiments:
        if name not in masked:
            rows = table.filter(pc.equal(experiment, name))
            per_step = np.bincount(rows["step"].to_numpy(), weights=rows["length"].to_numpy(), minlength=num_steps)
            result[name] = np.concatenate([[0], np.cumsum(per_step)]).astype(np.int64)
    return result
