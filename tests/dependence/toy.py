"""A dependence test at toy size: three experiments of three kinds, runs of 5 steps, and everything real."""

from pathlib import Path
from typing import Any

from megatron_exp.dependence.run import Machinery, Settings, cpdt
from megatron_exp.preparation.plan import plan
from megatron_exp.training.continuation import Continuation, rate_at
from megatron_exp.training.train import train
from tests.training.toy import EXPERIMENTS, make_manifest

CANARIES, WATERMARKS = EXPERIMENTS[0], EXPERIMENTS[2]
SWAPS = {"name": "swaps", "type": "forgetting_curves", "num_batches": 1, "window": [0.4, 0.9], "offsets": [0, 1, 2, 4], "grid_points": 0}
TESTED: list[dict[str, Any]] = [CANARIES, SWAPS, WATERMARKS]
STATE = 8
SETTINGS: dict[str, Any] = {"num_seeds": 2, "steps": 4, "intensity": 0.1, "raise_to": 0.1, "leave_one_out": "never"}

MACHINERY = Machinery(planner=plan, continue_from=Continuation.open, learning_rate=rate_at)


def make_start(directory: Path) -> Path:
    """`manifest` and `twin` (stopped in state 8, before its end) below a directory."""
    manifest = make_manifest(directory, experiments=TESTED, training={"checkpoint": {"every": 4, "keep": [STATE]}})
    train(manifest, directory / "twin", baseline=True, stop_at=STATE)
    return directory


def run_test(directory: Path, out: Path, **changes: Any) -> dict[str, Any] | None:
    """Run a test; the content of matrix.json."""
    return cpdt(directory / "manifest", directory / "twin", out, Settings(**SETTINGS | changes), MACHINERY)
