"""Before the run: what will it all cost? Counted from the manifest; hours by a stated formula, since nothing has been measured yet."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_exp.dependence.rows import PILOT_SEEDS, standard_rows
from megatron_exp.dependence.what import Tested
from megatron_exp.manifest.reader import Manifest
from megatron_exp.model.presets import ModelShape

PEAK_FLOPS, UTILISATION = 989e12, 0.4
"""Dense bf16 operations per second of one H100 SXM, and the share of it that training is assumed to reach."""
ASSUMPTION = "operations / (40% of 989 TFLOP/s, the bf16 peak of one H100); forward passes a third of a training step's operations"
_FORWARD = 1.0 / 3.0
_FULL_BYTES = {"fp32": 16, "bf16": 14, "fp8": 14}
"""Per parameter: the weight, its fp32 master and two moments."""
_NUM_ROTATING = 2


def gpu_hours(flops: float) -> float:
    """Hours of one GPU by ASSUMPTION."""
    return flops / (PEAK_FLOPS * UTILISATION) / 3600.0


def run_bill(manifest: Manifest, shape: ModelShape) -> dict[str, Any]:
    """Tokens, hours of run and twin, scoring and checkpoints of a manifest."""
    tokens = manifest.geometry.num_tokens
    asked = scored_tokens(manifest, manifest.probes())
    kept = len(manifest.keep_steps) + _NUM_ROTATING
    size = shape.num_parameters * _FULL_BYTES[manifest.config.training.precision]
    return {
        "tokens": tokens,
        "modified_tokens": manifest.record["budget"]["modified_tokens"],
        "extra_tokens": 0,
        "run_gpu_hours": gpu_hours(shape.flops_per_token * tokens),
        "twin_gpu_hours": gpu_hours(shape.flops_per_token * tokens),
        "num_questions": asked["num_questions"],
        "scored_tokens": asked["tokens"],
        "scoring_gpu_hours": gpu_hours(shape.flops_per_token * _FORWARD * asked["tokens"]),
        "num_checkpoints": kept,
        "checkpoint_bytes": kept * size,
        "assumption": ASSUMPTION,
    }


def scored_tokens(manifest: Manifest, probes: pa.Table) -> dict[str, int]:
    """Questions over all states and models, and the tokens that go through a model for them.

    A likelihood costs its text; a generated token the text so far (as without a cache); a gradient three forward passes.
    """
    starts = manifest.payload_tokens()[1]
    lengths = np.diff(starts)
    num_questions = total = 0
    for row in probes.select(["ask", "payload", "end", "num_tokens", "num_samples", "states", "of"]).to_pylist():
        times = max(1, len(row["states"])) * len(row["of"])
        num_questions += times
        total += times * _tokens_of(row, lengths, manifest.geometry.sequence_length)
    return {"num_questions": num_questions, "tokens": total}


def _tokens_of(row: dict[str, Any], lengths: np.ndarray, sequence_length: int) -> int:
    if row["ask"] == "loglikelihood":
        return int(row["end"])
    if row["ask"] in ("greedy", "sample"):
        written, prompt = row["num_tokens"], int(lengths[row["payload"]])
        return (row["num_samples"] or 1) * (written * prompt + written * (written - 1) // 2)
    return sequence_length * (3 if row["ask"] == "embedding_gradient" else 1)


def cpdt_bill(
    manifest: Manifest, shape: ModelShape, what: Tested, *, num_seeds: int, steps: int, tokens_per_second: float | None = None
) -> dict[str, Any]:
    """Cells, tokens and hours of a dependence test; `tokens_per_second`, of training on the machine at hand, gives hours there."""
    per_cell = steps * manifest.geometry.global_batch_size * manifest.geometry.sequence_length
    cells = len(standard_rows(what.rows)) * num_seeds
    most_pilot = PILOT_SEEDS * (len(what.columns) + 1)
    extra = len(what.rows) * num_seeds
    items = sum(outcome.max_items for outcome in what.columns.values())
    length = _mean_length(manifest, list(what.columns))
    record = {
        "rows": len(standard_rows(what.rows)),
        "columns": len(what.columns),
        "num_seeds": num_seeds,
        "steps": steps,
        "num_cells": cells,
        "tokens": cells * per_cell,
        "gpu_hours": gpu_hours(shape.flops_per_token * cells * per_cell),
        "pilot_cells_per_round": most_pilot,
        "leave_one_out_cells": extra,
        "leave_one_out_gpu_hours": gpu_hours(shape.flops_per_token * extra * per_cell),
        "scored_tokens_at_most": round(cells * items * length),
        "scoring_gpu_hours_at_most": gpu_hours(shape.flops_per_token * _FORWARD * cells * items * length),
        "assumption": ASSUMPTION,
    }
    if tokens_per_second:
        trained, scored = cells * per_cell, _FORWARD * cells * items * length
        record["hours_here"] = (trained + scored) / tokens_per_second / 3600.0
        record["pilot_hours_here_per_round"] = most_pilot * per_cell / tokens_per_second / 3600.0
    return record


def _mean_length(manifest: Manifest, names: Sequence[str]) -> float:
    """Mean tokens of a question to the experiments named, over the manifest's own questions."""
    lengths, probes = np.diff(manifest.payload_tokens()[1]), manifest.probes()
    rows = probes.select(["experiment", "ask", "payload", "end", "num_tokens", "num_samples"]).to_pylist()
    found = [_tokens_of(row, lengths, manifest.geometry.sequence_length) for row in rows if row["experiment"] in names]
    return float(np.mean(found)) if found else float(manifest.geometry.sequence_length)
