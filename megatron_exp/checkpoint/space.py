"""How much room checkpoints take, from the size of the model. No torch."""

from collections.abc import Collection
from pathlib import Path

from megatron_exp import files
from megatron_exp.checkpoint.catalogue import list_checkpoints
from megatron_exp.display.numbers import size
from megatron_exp.errors import UserError

_WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp8": 2}
_OPTIMIZER_BYTES = 12
"""Per parameter: master weight and two moments in fp32, whatever the precision of training."""
_AROUND_TENSORS = 1 << 20
"""Names, places and the frames of the file format."""


def checkpoint_bytes(num_parameters: int, precision: str) -> int:
    """Size of a checkpoint with optimizer state, all ranks together; every layout and both forms hold the same numbers."""
    return num_parameters * (_WEIGHT_BYTES[precision] + _OPTIMIZER_BYTES) * 51 // 50 + _AROUND_TENSORS


def most_at_once(every: int, portable_every: int, keep: Collection[int], num_steps: int, num_rotating: int) -> int:
    """How many checkpoints a run has at its fullest: all kept ones, those that rotate, and the one being written."""
    kept = {state for state in keep if state <= num_steps} | {num_steps}
    rotating = {state for interval in (every, portable_every) if interval for state in range(interval, num_steps, interval)} - kept
    return len(kept) + min(len(rotating), num_rotating + 1 + bool(portable_every))


def require_room(run_dir: Path, each_bytes: int, num_wanted: int) -> None:
    """UserError where the checkpoints that are still to come, beside those that lie there, do not fit on the disk of a run."""
    num_present = len(list_checkpoints(run_dir))
    needed, free = max(0, num_wanted - num_present) * each_bytes, files.free_bytes(run_dir)
    if free < needed:
        raise UserError(
            f"{run_dir} needs room for {num_wanted} checkpoints of {size(each_bytes)} at its fullest (kept states, those that rotate, and the one being "
            f"written) and has {num_present}, so {size(needed)} more are needed; its disk has {size(free)} free. Free space, train on a larger disk, or keep "
            "fewer states (training.checkpoint.keep; `plan` lists those that experiments need)."
        )


def require_room_for_one(path: Path, each_bytes: int) -> None:
    """UserError where the next checkpoint, to be written at PATH, does not fit."""
    free = files.free_bytes(path)
    if free < each_bytes:
        raise UserError(
            f"The checkpoint {path} takes {size(each_bytes)}, and its disk has {size(free)} free. It is not begun, and the checkpoints before it are as they "
            "were. Free space, then give the same command again: it goes on from the newest one."
        )
