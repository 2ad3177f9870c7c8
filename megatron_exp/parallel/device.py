"""The one place that knows CPU + gloo from CUDA + NCCL.

megatron-core 0.16.1 writes CUDA into its own modules. Where there is no CUDA, `adapt_megatron` makes the modules that the
CPU path touches name the CPU instead, and touches nothing else: torch itself stays as it is for everybody.
"""

import functools
import importlib
import inspect
import platform
import resource
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_exp.errors import InterruptedRunError, UserError
from megatron_exp.parallel.launched import read_job

_MODULES = (
    "utils",
    "models.common.embeddings.rotary_pos_embedding",
    "tensor_parallel.layers",
    "tensor_parallel.mappings",
    "transformer.attention",
    "pipeline_parallel.schedules",
    "pipeline_parallel.p2p_communication",
    "distributed.param_and_grad_buffer",
    "optimizer.optimizer",
    "optimizer.distrib_optimizer",
    "optimizer.grad_scaler",
    "optimizer.clip_grads",
    "dist_checkpointing.strategies.state_dict_saver",
    "dist_checkpointing.strategies.filesystem_async",
    "dist_checkpointing.strategies.async_utils",
    "dist_checkpointing.strategies.fully_parallel",
)
_CPU_NAMES = {
    "cuda": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}


def has_cuda() -> bool:
    """Whether this process computes on a CUDA device."""
    return torch.cuda.is_available()


def choose_device(local_rank: int) -> torch.device:
    """The device of this process, made current: one GPU per process where there is CUDA, else the CPU.

    Raises:
        UserError: where there are fewer GPUs than processes; InterruptedRunError in a job of SLURM, which then starts it again, since
            there a node has lost one of those that the job was given.
    """
    if not has_cuda():
        return torch.device("cpu")
    if local_rank >= (num_gpus := torch.cuda.device_count()):
        raise (InterruptedRunError if read_job().job else UserError)(
            f"At least {local_rank + 1} processes were started on this machine, and PyTorch sees {num_gpus} GPU{'s' * (num_gpus != 1)}, one for each process. "
            "Start as many as there are GPUs (--processes, torchrun --nproc-per-node, or gpus_per_node of the cluster profile), or check CUDA_VISIBLE_DEVICES."
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def current_device() -> torch.device:
    """Where this process keeps weights and batches."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else torch.device("cpu")


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device. Through pinned memory, so that the caller need not wait until the device has done all it was told before."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def received(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Begin to copy the tensor to the CPU. What is returned waits for the copy, and not for what the device is told to do after this call."""
    if tensor.device.type == "cpu":
        return lambda: tensor
    copy = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> torch.Tensor:
        copied.synchronize()
        return copy

    return wait


def compute_capability() -> tuple[int, int]:
    """(major, minor) of this process's GPU; (0, 0) on CPU."""
    return torch.cuda.get_device_capability() if has_cuda() else (0, 0)


_PEAK_FLOPS = {
    "B200": 2.25e15,
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "H800": 989.4e12,
    "A100": 312e12,
    "L40S": 362e12,
}
"""Dense 16-bit operations per second with 32-bit sums, by a part of the GPU's name, first match (NVIDIA's data sheets)."""


def peak_flops(device: torch.device) -> float | None:
    """The 16-bit matrix operations per second that the device could do at most; None where that is not known, as on any CPU."""
    name = describe_device(device) if device.type == "cuda" else ""
    return next((flops for part, flops in _PEAK_FLOPS.items() if part in name), None)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held at once: on the device by tensors, or by this process on CPU; since the process started."""
    if device.type == "cuda":
        return torch.cuda.memory.memory_stats_as_nested_dict(device)["allocated_bytes"]["all"]["peak"]  # max_memory_allocated sorts all statistics first
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def describe_device(device: torch.device) -> str:
    """What the device is called, for records: the GPU's name, or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {platform.machine()}"


def moment() -> Any:
    """A point in this device's work; `seconds_between` compares two of them once the work up to both is done."""
    if not has_cuda():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(first: Any, last: Any) -> float:
    """Seconds that passed on the device from one `moment` to a later one."""
    return last - first if isinstance(first, float) else first.elapsed_time(last) / 1000


def backend() -> str:
    """What carries collectives. Python objects and CPU tensors always travel by gloo."""
    return "cpu:gloo,cuda:nccl" if has_cuda() else "gloo"


class _Redirected(types.ModuleType):
    """A module seen through: every name is the original's, but for those replaced."""

    def __init__(self, original: types.ModuleType, **replaced: Any):
        super().__init__(original.__name__)
        vars(self).update(vars(original))
        vars(self).update(replaced)
        vars(self)["_original"] = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


@functools.cache
def adapt_megatron() -> None:
    """Make megatron-core run on this machine's device. Does nothing where there is CUDA, and nothing the second time."""
    if has_cuda():
        return
    cuda = _Redirected(torch.cuda, current_device=lambda: torch.device("cpu"), synchronize=lambda device=None: None)
    redirected = _Redirected(torch, cuda=cuda)
    for name in _MODULES:
        module = importlib.import_module(f"megatron.core.{name}")
        module.torch = redirected  # type: ignore[attr-defined]
        for function in _functions(module):
            function.__code__ = _with_cpu_names(function.__code__)
    rotary = importlib.import_module("megatron.core.models.common.embeddings.rotary_pos_embedding")
    rotary.get_pos_emb_on_this_cp_rank = _positions_of_context_rank  # type: ignore[attr-defined]
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    # Recomputation saves and restores the generator of the CUDA device, of which there is none; the CPU's own it treats as ever.
    random._get_cuda_rng_state = lambda *args, **kwargs: None  # type: ignore[attr-defined]
    random._set_cuda_rng_state = lambda *args, **kwargs: None  # type: ignore[attr-defined]


def _functions(module: types.ModuleType) -> Iterator[types.FunctionType]:
    """The functions and methods that a module defines, below their decorators."""
    owners = [module, *(value for value in vars(module).values() if inspect.isclass(value) and value.__module__ == module.__name__)]
    for owner in owners:
        for value in vars(owner).values():
            function = inspect.unwrap(getattr(value, "__func__", value)) if callable(getattr(value, "__func__", value)) else None
            if isinstance(function, types.FunctionType) and function.__module__ == module.__name__:
                yield function


def _with_cpu_names(code: types.CodeType) -> types.CodeType:
    return code.replace(co_consts=tuple(_cpu_constant(constant) for constant in code.co_consts))


def _cpu_constant(constant: Any) -> Any:
    if isinstance(constant, str):
        return _CPU_NAMES.get(constant, constant)
    if isinstance(constant, tuple):
        return tuple(_cpu_constant(member) for member in constant)
    return _with_cpu_names(constant) if isinstance(constant, types.CodeType) else constant


def _positions_of_context_rank(positions: torch.Tensor, dimension: int, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    """Chunks r and 2n - 1 - r of 2n along a dimension; megatron's own goes through pinned memory, which the CPU has not."""
    chunks = positions.chunk(2 * group.size(), dim=dimension)
    return torch.cat([chunks[group.rank()], chunks[2 * group.size() - 1 - group.rank()]], dim=dimension)
