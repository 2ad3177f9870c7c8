"""What is compared between runs."""

from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from megatron_exp.checkpoint.catalogue import checkpoint_path, read_record
from megatron_exp.ledger import read_ledger
from megatron_exp.run_record import RunRecord
from tests.training.toy import STEPS


def weights(run: Path, step: int = STEPS) -> dict[str, bytes]:
    """The bytes of weights and optimizer state in a checkpoint."""
    files = sorted(checkpoint_path(run, step).glob("*.distcp"))
    assert files
    return {file.name: file.read_bytes() for file in files}


def hook_states(run: Path, step: int = STEPS) -> dict[str, Any]:
    """What the hooks keep in a checkpoint, a controller's state among it."""
    return read_record(checkpoint_path(run, step))["extra"]["hooks"]


def segments(run: Path) -> dict[str, bytes]:
    """The insertions that controllers decided, by file."""
    return {file.name: file.read_bytes() for file in (run / "segments").glob("*.parquet")}


def losses(run: Path) -> list[float]:
    """Training losses by state, of the attempts that count."""
    series = RunRecord.open(run).history().series("loss")
    assert series.steps.tolist() == list(range(1, STEPS + 1))
    return series.values.tolist()


def step_hashes(run: Path) -> dict[int, bytes]:
    """What each step consumed, by the ledger."""
    return {entry.step: entry.hash for entry in read_ledger(run / "ledger.bin").steps()}


def answers(run: Path) -> dict[tuple[object, ...], float]:
    """Live probes' values; the last attempt of a state counts."""
    table = pq.read_table(run / "probes.parquet").sort_by("attempt")
    assert pc.all(pc.is_valid(table["attempt"])).as_py()
    return {(row["step"], row["experiment"], row["item"], row["arm"], row["name"]): row["value"] for row in table.to_pylist()}
