"""How the processes of a run come to the same decision."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_exp.errors import UserError
from megatron_exp.parallel.layout import Layout

T = TypeVar("T")


def on_main(layout: Layout, work: Callable[[], T]) -> T:
    """Do WORK on the main process only and give its result, or its UserError, to all (collective).

    What is found on disk may differ between two looks, so one process looks and all obey.
    """
    if layout.world_size == 1:
        return work()
    answer: tuple[T | None, str | None] = (None, None)
    if layout.is_main:
        try:
            answer = (work(), None)
        except UserError as error:
            answer = (None, str(error))
    result, mistake = layout.broadcast(answer)
    if mistake is not None:
        raise UserError(mistake)
    return result


def any_process(layout: Layout, flag: bool) -> bool:
    """Whether FLAG is set in any process (collective)."""
    if layout.world_size == 1:
        return flag
    flags = torch.tensor(int(flag))
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags.item())


def sum_over_processes(layout: Layout, values: torch.Tensor) -> torch.Tensor:
    """Element-wise sum of the CPU tensors that all processes pass (collective)."""
    if layout.world_size > 1:
        dist.all_reduce(values)
    return values
