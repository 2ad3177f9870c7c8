"""Which checkpoints a run has, which of them are sound, and which may go."""

from collections.abc import Collection
from pathlib import Path


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """RUN/checkpoints/step-XXXXXXXX of the state after `step` updates."""
    return Path(run_dir) / "checkpoints" / f"step-{step:08d}"


def list_checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """The complete checkpoints of a run as (step, path), oldest first; content is not read."""
    raise NotImplementedError


def verify_checkpoint(directory: Path) -> list[str]:
    """What is wrong with a checkpoint, one sentence per finding naming the file; empty means sound. Reads every byte."""
    raise NotImplementedError


def require_sound(directory: Path) -> None:
    """Raise UserError naming the damaged, missing or unlisted files of a checkpoint, if any."""
    raise NotImplementedError


def newest_verified(run_dir: Path) -> tuple[int, Path] | None:
    """The newest sound checkpoint of a run; a damaged one is logged and the one before is tried."""
    raise NotImplementedError


def rotate_checkpoints(run_dir: Path, keep: Collection[int], num_rotating: int = 2) -> list[Path]:
    """Remove checkpoints but the `keep` steps and the newest `num_rotating` sound others; returns what was removed."""
    raise NotImplementedError
