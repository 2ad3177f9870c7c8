"""One run of the test: trained from the checkpoint, scored, and written whole or not at all."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_exp.dependence.rows import held
from megatron_exp.errors import UserError
from megatron_exp.experiments.loading import load_experiment
from megatron_exp.files import durable_directory, require_file
from megatron_exp.manifest.reader import Manifest
from megatron_exp.manifest.schema import DICT, SCHEMA_VERSION
from megatron_exp.overlay.overlay import Overlay
from megatron_exp.scoring.engine import Scorer
from megatron_exp.scoring.probes import score_probes
from megatron_exp.scoring.responses import of_experiment, responses_table, stamped
from megatron_exp.stream.base import Stream

RESULTS_NAME = "results.parquet"
CELL = pa.schema(
    [
        ("row", DICT),
        ("column", DICT),
        ("seed", pa.uint32()),
        ("value", pa.float64()),
        ("num_items", pa.uint32()),
        ("num_unscored", pa.uint32()),
        ("sd", pa.float64()),
    ]
)
_META = b"cell"


class Trainer(Protocol):
    """A loaded checkpoint from which any number of runs begin (`training.continuation.Continuation`)."""

    @property
    def scorer(self) -> Scorer: ...

    num_steps: int
    step_seconds: float

    def train(self, stream: Any, shard_names: list[str]) -> list[float]: ...


@dataclass(frozen=True, eq=False)
class Block:
    """A replicate: its manifest, which all rows mask, and the base stream below it."""

    seed: int
    manifest: Manifest
    base: Stream

    def stream(self, row: str, experiments: Sequence[str]) -> Any:
        """What a row's run reads."""
        holding = held(row, experiments)
        if not holding:
            return self.base
        return Overlay.open(self.base, self.manifest, frozenset(set(self.manifest.experiments) - set(holding)))


def cell_path(directory: Path, row: str, seed: int) -> Path:
    """CPDT/cells/<row>-<seed>."""
    return Path(directory) / "cells" / f"{row}-{seed}"


def run_cell(
    trainer: Trainer, block: Block, row: str, columns: Sequence[str], experiments: Sequence[str]
) -> tuple[pa.Table, dict[str, Any]]:
    """Train one row in one block and score every column. Returns the rows of CELL and what is known of the run."""
    began, before = time.perf_counter(), trainer.step_seconds
    shards = [shard.name for shard in block.base.corpus.shards]
    losses = trainer.train(block.stream(row, experiments), shards)
    trained = time.perf_counter()
    answers = score_probes(trainer.scorer, block.manifest.probes(), block.manifest, block.base)
    scored = time.perf_counter()
    responses = responses_table([stamped(answers, "run", block.manifest.geometry.steps)], block.manifest.items())
    rows = [{"row": row, "column": column, "seed": block.seed, **outcome(block.manifest, column, responses)} for column in columns]
    facts = {
        "steps": len(losses),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "num_probes": len(answers),
        "step_seconds": trainer.step_seconds - before,
        "train_seconds": trained - began,
        "score_seconds": scored - trained,
        "other_seconds": time.perf_counter() - scored,
    }
    return pa.Table.from_pylist(rows, schema=CELL), facts


def outcome(manifest: Manifest, column: str, responses: pa.Table) -> dict[str, Any]:
    """Y of one experiment: the mean over its items; null where none could be scored."""
    entry = next(entry for entry in manifest.config.experiments if entry.name == column)
    values = load_experiment(entry).item_values(of_experiment(manifest.items(), column), of_experiment(responses, column))
    known = values[np.isfinite(values)]
    return {
        "value": float(known.mean()) if len(known) else None,
        "num_items": len(known),
        "num_unscored": len(values) - len(known),
        "sd": float(known.std(ddof=1)) if len(known) > 1 else None,
    }


def write_cell(directory: Path, row: str, seed: int, table: pa.Table, plan: str, facts: dict[str, Any]) -> None:
    """Write a cell that appears whole. plan: fingerprint of the plan it belongs to."""
    meta = {"schema_version": SCHEMA_VERSION, "plan": plan, **facts}
    with durable_directory(cell_path(directory, row, seed)) as partial:
        pq.write_table(table.replace_schema_metadata({_META: orjson.dumps(meta)}), partial / RESULTS_NAME, compression="zstd")


def read_cell(directory: Path, row: str, seed: int, plan: str) -> tuple[pa.Table, dict[str, Any]] | None:
    """A cell with its facts, None where there is none; UserError where it is damaged or of another plan."""
    path = cell_path(directory, row, seed)
    if not path.exists():
        return None
    file = require_file(path / RESULTS_NAME, "the results of a cell")
    try:
        table = pq.read_table(file)
        facts = orjson.loads((table.schema.metadata or {}).get(_META, b"{}"))
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{file} cannot be read ({error}). Remove {path} to run this cell again.") from error
    if facts.get("plan") != plan:
        raise UserError(
            f"{path} is a cell of another plan ({str(facts.get('plan'))[:12]} instead of {plan[:12]}): another manifest, checkpoint, intensity or length of "
            "run. Cells of different plans are never mixed: use another --out, or remove it."
        )
    return table.cast(CELL), facts
