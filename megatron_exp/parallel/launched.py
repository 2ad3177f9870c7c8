"""What torchrun, srun or SLURM says about this process, from variables of the environment. No torch."""

import os
from typing import NamedTuple


class Processes(NamedTuple):
    """This process among those of its command. launched: whether a launcher has started it."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launched: bool


def read_launcher() -> Processes:
    """The variables that torchrun sets (a SLURM template sets the same); without them, one process alone."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Processes(0, 1, 0, 1, launched=False)
    world_size = int(os.environ["WORLD_SIZE"])
    return Processes(
        rank=int(os.environ["RANK"]),
        world_size=world_size,
        local_rank=int(os.environ.get("LOCAL_RANK", os.environ["RANK"])),
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
        launched=True,
    )


class Job(NamedTuple):
    """A SLURM job. job: its number, None outside of one. restart: how often SLURM has started it again."""

    job: str | None
    restart: int


def read_job() -> Job:
    """The variables that SLURM sets; a job that is started again keeps its number."""
    return Job(os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", 0)))


def launched_rank() -> int:
    """The number of this process among those that were launched together; 0 alone."""
    return read_launcher().rank
