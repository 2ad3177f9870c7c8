"""What the watchdog and the comparison of ranks cost: CPU seconds per step of both hooks, and of the watchdog's thread per second.

Usage: python benchmarks/watchdog.py [--calls N] [--seconds S]

The hooks are called as the loop calls them, on a run that does nothing else, so nothing but their own work is counted. Goal: less than 1% of a
step, that is, of 10 ms: the shortest step worth a cluster. A gather of all ranks' figures comes to this every 50 steps; `ranks` processes on this machine
do it here by gloo.
"""

import argparse
import socket
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from measuring import show, spread

from megatron_exp.training.hooks.stragglers import EVERY_STEPS, Pace, StragglerHook
from megatron_exp.training.hooks.watchdog import WatchdogHook

SHORTEST_STEP_SECONDS = 0.010


def idle_run(directory: Path, world_size: int) -> SimpleNamespace:
    """What the hooks look at, without a model; finalisation does nothing."""
    layout = SimpleNamespace(rank=0, world_size=world_size, is_main=True, gather=lambda pace: [pace] * world_size)
    model = SimpleNamespace(config=SimpleNamespace(finalize_model_grads_func=lambda: None))
    return SimpleNamespace(
        layout=layout, model=model, plan=SimpleNamespace(directory=directory), attempt=1, step=0, last=SimpleNamespace(wait_seconds=0.0)
    )


def cpu_per_step(directory: Path, calls: int) -> float:
    """CPU seconds of both hooks for one step, comparison included, the gather itself not."""
    run = idle_run(directory, world_size=8)
    watchdog, stragglers = WatchdogHook(1800), StragglerHook()
    watchdog.on_start(run, None)
    stragglers.on_start(run, None)
    begin = time.thread_time()
    for run.step in range(calls):
        run.model.config.finalize_model_grads_func()
        watchdog.on_step(run)
        stragglers.on_step(run)
    spent = time.thread_time() - begin
    watchdog.on_end(run)
    return spent / calls


def thread_share(directory: Path, seconds: float) -> float:
    """CPU seconds per second of the watchdog's thread, heartbeat included, while the training thread sleeps."""
    run = idle_run(directory, world_size=1)
    watchdog = WatchdogHook(1800)
    begin = time.process_time()
    watchdog.on_start(run, None)
    time.sleep(seconds)
    spent = time.process_time() - begin
    watchdog.on_end(run)
    return spent / seconds


def gather_seconds(rank: int, ranks: int, port: int, times: int, answers: multiprocessing.SimpleQueue) -> None:
    """Wall seconds of each of `times` gathers of one Pace."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    taken = []
    for _ in range(times):
        begin = time.perf_counter()
        dist.all_gather_object([None] * ranks, Pace(1.0, 0.0, socket.gethostname()))
        taken.append(time.perf_counter() - begin)
    if rank == 0:
        answers.put(taken)
    dist.barrier()
    dist.destroy_process_group()


def measured_gathers(ranks: int, times: int) -> list[float]:
    """The same on `ranks` processes of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    workers = [context.Process(target=gather_seconds, args=(rank, ranks, port, times, answers)) for rank in range(ranks)]
    for worker in workers:
        worker.start()
    taken = answers.get()
    for worker in workers:
        worker.join()
    return taken


def main() -> None:
    """Measure and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=65.0, help="so many, that two heartbeats are among them")
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        hooks = [cpu_per_step(Path(directory), options.calls) for _ in range(5)]
        thread = thread_share(Path(directory), options.seconds)
    gathers = measured_gathers(options.ranks, 200)
    per_step = [value + sorted(gathers)[len(gathers) // 2] / EVERY_STEPS for value in hooks]
    show(
        "watchdog",
        hooks_microseconds_per_step=spread([1e6 * value for value in hooks], 2),
        gather_milliseconds=spread([1e3 * value for value in gathers], 3),
        ranks=options.ranks,
        thread_cpu_share=round(thread, 6),
        share_of_a_10_ms_step=spread([value / SHORTEST_STEP_SECONDS for value in per_step], 5),
    )


if __name__ == "__main__":
    main()
