"""Real training processes, started cheaply: they are forked from a server that has imported everything once."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from megatron_exp import files
from megatron_exp.run_record import METRICS_NAME

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.training.processes", "megatron_exp.training.train"])


def _main(arguments: dict[str, Any] | list[dict[str, Any]], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    from megatron_exp.training.train import train

    if isinstance(arguments, dict):
        arguments.pop("prepare", lambda: None)()
        sys.exit(train(**arguments))
    sys.exit(max(train(**of_run) for of_run in arguments))


def kill_at_sync(call: int) -> None:
    """From now on this process kills itself when it is to make a file durable for the so-manieth time (for `prepare`)."""
    sync, made = files._fsync, itertools.count(1)

    def counted(descriptor: int) -> None:
        if next(made) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(descriptor)

    files._fsync = counted  # type: ignore[assignment]


@contextlib.contextmanager
def training(environment: dict[str, str] | None = None, several: list[dict[str, Any]] | None = None, **arguments: Any) -> Iterator[Any]:
    """A process that calls `train`, or trains `several` runs one after the other; killed at the end of the block if it still lives.

    `prepare`, among the arguments of a single run, is called in the process before.
    """
    process = _CONTEXT.Process(target=_main, args=(arguments if several is None else several, environment or {}))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def train_together(num_processes: int, **arguments: Any) -> list[int]:
    """Exit codes of processes that train one run together, with the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(training({**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **arguments))
            for rank in range(num_processes)
        ]
        for process in started:
            process.join(400)
        return [process.exitcode for process in started]


def wait_for_step(run: Path, step: int, process: Any) -> None:
    """Return when the metrics show that STEP updates are done; fails where the process ends before."""
    while not any(line.get("step", 0) >= step for line in metrics(run)):
        assert process.is_alive(), f"training ended with {process.exitcode} before step {step}"
        time.sleep(0.002)


def metrics(run: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl."""
    path = run / METRICS_NAME
    return [orjson.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []
