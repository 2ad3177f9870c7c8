"""Where this process stands among all processes of a run, and how they are started and stopped."""

import dataclasses
import functools
import itertools
import os
from typing import Any

import torch
import torch.distributed as dist

from megatron_exp.config.schema import ParallelConfig
from megatron_exp.errors import UserError
from megatron_exp.parallel import device as devices
from megatron_exp.parallel.launched import Processes, read_launcher


@dataclasses.dataclass(frozen=True)
class Layout:
    """The place of this process in the grid of tensor (tp), context (cp), data (dp) and pipeline (pp) parallelism.

    threads: CPU threads of this process; sums on CPU depend on it, so two runs must agree on it to be bitwise equal.
    virtual_size: parts of the model on each pipeline stage. deterministic: only kernels and collectives with a fixed order of sums.
    """

    rank: int
    world_size: int
    device: torch.device
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    cp_rank: int
    cp_size: int
    dp_rank: int
    dp_size: int
    sequence_parallel: bool
    threads: int
    virtual_size: int = 1
    deterministic: bool = False

    @property
    def is_first_stage(self) -> bool:
        """Whether this process holds the embedding (first pipeline stage)."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this process computes the loss (last pipeline stage)."""
        return self.pp_rank == self.pp_size - 1

    @property
    def reads_data(self) -> bool:
        """Whether this process needs the content of slots: the stages between the first and the last only pass activations on."""
        return self.is_first_stage or self.is_last_stage

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process of the run is here."""
        dist.barrier()

    def broadcast(self, value: Any) -> Any:
        """The value that rank 0 passes, on every rank (a decision or a user's mistake must reach all)."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """What each process passes, by rank, on every rank."""
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def gather_replicas(self, value: Any) -> list[Any]:
        """What each data-parallel replica passes, in order, on every rank; the ranks of one replica pass equal values."""
        from megatron.core import parallel_state

        gathered: list[Any] = [None] * self.dp_size
        dist.all_gather_object(gathered, value, group=parallel_state.get_data_parallel_group())
        return gathered

    def stop(self) -> None:
        """Leave the process group; the layout is of no use afterwards."""
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def start_parallel(config: ParallelConfig, threads: int | None = None, deterministic: bool = False) -> Layout:
    """Join the run's processes: those that torchrun started, or this one alone.

    Args:
        config: degrees of tensor, pipeline and context parallelism; the rest of the processes is data-parallel.
        threads: CPU threads of this process. Default: the machine's cores divided among the processes on it.
        deterministic: on GPUs allow only what has a fixed order of sums; nothing changes on CPU, where runs repeat anyway.

    Raises:
        UserError: where the number of processes cannot be divided as asked.
    """
    processes = read_launcher()
    _check_degrees(config, processes.world_size)
    cores = len(os.sched_getaffinity(0))
    threads = threads or max(1, cores // processes.local_world_size)
    torch.set_num_threads(threads)
    if devices.has_cuda():
        if config.tp > 1:
            # One queue to the device: a tensor-parallel sum that is issued first also starts first, and the product after it hides it.
            os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        if deterministic:
            _require_determinism()
    device = devices.choose_device(processes.local_rank)
    store = _launched_store() if processes.launched else dist.HashStore()
    dist.init_process_group(devices.backend(), store=store, rank=processes.rank, world_size=processes.world_size)
    return _place(config, processes, device, threads, deterministic)


_DETERMINISM = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}
"""What cuBLAS, NCCL and Transformer Engine read from the environment (megatron's own deterministic mode asks for the same)."""


def _require_determinism() -> None:
    """Tell the libraries before any of them has started; the processes of a run keep this until they end.

    Raises:
        UserError: where the environment asks one of them for something else.
    """
    for name, value in _DETERMINISM.items():
        if os.environ.setdefault(name, value) != value:
            raise UserError(
                f"training.deterministic is on, but the environment has {name}={os.environ[name]}; only {value} gives sums in a fixed order. "
                f"Unset {name}, or turn training.deterministic off."
            )
    torch.use_deterministic_algorithms(True)


_start_numbers = itertools.count()


def _launched_store() -> dist.Store:
    """Where the processes find each other; every start has its own names, so addresses of an earlier one are never met."""
    return dist.PrefixStore(f"start-{next(_start_numbers)}", _launcher_store())


@functools.cache
def _launcher_store() -> dist.Store:
    store, _, _ = next(dist.rendezvous("env://"))
    return store


def _place(config: ParallelConfig, processes: Processes, device: torch.device, threads: int, deterministic: bool) -> Layout:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import initialize_rng_tracker

    devices.adapt_megatron()
    # Nothing draws random numbers in the model: there is no dropout, and weights and noise are counter-based. The tracker made for
    # inference keeps no state, so none has to be saved or restored.
    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tp,
        pipeline_model_parallel_size=config.pp,
        virtual_pipeline_model_parallel_size=config.virtual if config.virtual > 1 else None,
        context_parallel_size=config.cp,
    )
    return Layout(
        rank=processes.rank,
        world_size=processes.world_size,
        device=device,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=config.tp,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=config.pp,
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=config.cp,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        sequence_parallel=config.sequence_parallel and config.tp > 1,
        threads=threads,
        virtual_size=config.virtual,
        deterministic=deterministic,
    )


def _check_degrees(config: ParallelConfig, world_size: int) -> None:
    if config.virtual > 1 and config.pp == 1:
        raise UserError(
            f"training.parallel.virtual = {config.virtual} divides each pipeline stage into parts, but there is only one stage (training.parallel.pp = 1). "
            "Raise pp, or leave virtual out."
        )
    needed = config.tp * config.pp * config.cp
    if world_size % needed:
        raise UserError(
            f"tp {config.tp} x pp {config.pp} x cp {config.cp} (training.parallel, or --tp and --pp of eval) are {needed} processes for each copy of the "
            f"model, but {world_size} were started, which is not a multiple. Start a multiple of {needed} (--processes, or torchrun --nproc-per-node), or "
            "change the degrees."
        )
