"""Tasks over processes: any number of workers, any order, one result; a worker that dies is an error, never a gap.

Processes are spawned, not forked: the tokenizer libraries run threads, which do not survive a fork.
"""

import contextlib
import errno
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from multiprocessing.sharedctypes import SynchronizedArray
from pathlib import Path
from typing import Any, NoReturn, Protocol

from megatron_exp.errors import UserError
from megatron_exp.preparation.preprocess_progress import INTERVAL_SECONDS, NUM_COUNTERS, Counters, Reporter

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG}


class Work(Protocol):
    """What to do with each task: picklable, and opened once in every process that does it. directory: where it writes."""

    @property
    def directory(self) -> Path: ...

    def open(self, counters: Counters) -> Callable[[Any], None]:
        """Load what the tasks share; the function does one task."""
        ...


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


@contextlib.contextmanager
def explained_disk_errors(directory: Path) -> Iterator[None]:
    """Turn the system's refusal to write into a UserError; what was finished before stays."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise UserError(
            f"Writing in {directory} failed: {error.strerror}, with {shutil.disk_usage(directory).free / 1e9:.1f} GB free on that disk. Free some space or "
            "repair the disk, then run the same command again; finished files are not read again."
        ) from error


def run_tasks(work: Work, tasks: Sequence[Any], workers: int, reporter: Reporter) -> None:
    """Do every task, in this process with one worker, else in up to `workers` processes.

    Raises:
        UserError: A task raised one (its own message), or a worker was killed from outside.
        RuntimeError: A worker ended with a bug; its traceback is on stderr.
    """
    if min(workers, len(tasks)) <= 1:
        cells = [0] * NUM_COUNTERS
        do = work.open(Counters(cells, lambda: reporter.report(cells))) if tasks else None
        for task in tasks:
            assert do is not None
            with explained_disk_errors(work.directory):
                do(task)
        reporter.report(cells, last=True)
        return
    context = multiprocessing.get_context("spawn")
    shared: SynchronizedArray[int] = context.Array("q", NUM_COUNTERS)
    pool = [_Worker(context, work, shared) for _ in range(min(workers, len(tasks)))]
    try:
        _drive(pool, list(reversed(tasks)), shared, reporter)
    finally:
        for worker in pool:
            worker.stop()
    reporter.report(shared, last=True)


class _Worker:
    """One process and our end of its pipe."""

    def __init__(self, context: Any, work: Work, shared: "SynchronizedArray[int]"):
        self.pipe, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(target=_serve, args=(theirs, work, shared), daemon=True)
        self.process.start()
        theirs.close()
        self.busy = False

    def give(self, task: Any) -> None:
        self.busy = True
        try:
            self.pipe.send(task)
        except BrokenPipeError:
            self._raise_death()

    def take_reply(self) -> str | None:
        """The message of a UserError, or None after a task well done; raises where the process is gone."""
        try:
            reply: str | None = self.pipe.recv()
        except EOFError:
            self._raise_death()
        self.busy = False
        return reply

    def _raise_death(self) -> NoReturn:
        self.process.join()
        code = self.process.exitcode
        if code is not None and code < 0:
            raise UserError(
                f"A worker process was ended by signal {-code}, which is most often the system running out of memory. "
                "Run the same command again with fewer workers; finished files are not read again."
            )
        raise RuntimeError(f"a worker process ended with exit code {code}; its traceback is above")

    def stop(self) -> None:
        """End the process: an idle one leaves when its pipe closes, a busy one is no longer wanted."""
        if self.busy:
            self.process.terminate()
        self.pipe.close()
        self.process.join()


def _drive(pool: list[_Worker], waiting: list[Any], shared: "SynchronizedArray[int]", reporter: Reporter) -> None:
    for worker in pool:
        worker.give(waiting.pop())
    while busy := [worker for worker in pool if worker.busy]:
        ready = wait([worker.pipe for worker in busy], timeout=INTERVAL_SECONDS)
        for worker in (worker for worker in busy if worker.pipe in ready):
            if message := worker.take_reply():
                raise UserError(message)
            if waiting:
                worker.give(waiting.pop())
        reporter.report(shared)


def _serve(pipe: "Connection[Any, Any]", work: Work, shared: "SynchronizedArray[int]") -> None:
    """The life of a worker: tasks until the pipe closes, which also happens when the parent is killed."""
    do: Callable[[Any], None] | None = None
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        message = None
        try:
            do = do or work.open(Counters(shared, _leave_with_parent))
            with explained_disk_errors(work.directory):
                do(task)
        except UserError as error:
            message = str(error)
        pipe.send(message)


def _leave_with_parent() -> None:
    """Stop in the middle of a task when the parent is gone, so that a job started again meets no stranger at work."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        raise SystemExit(1)
