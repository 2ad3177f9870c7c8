"""How the processes of a run come to the same decision."""

import torch
import torch.distributed as dist

from megatron_exp.parallel.layout import Layout


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
