"""Notices that training stands still, says where each process stands, and ends it, so that a scheduler can start it again."""

import faulthandler
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import orjson

from megatron_exp.errors import UserError
from megatron_exp.files import write_file
from megatron_exp.run_record import HEARTBEAT_NAME, SCHEMA_VERSION
from megatron_exp.training.hooks.base import Hook
from megatron_exp.training.run import Run

EXIT_HUNG = 124
"""Exit code of a process that the watchdog ended; `timeout` uses the same."""

GRACE_SECONDS = 30.0
"""Between the message and the end, so that every process gets to say where it stands."""

HEARTBEAT_SECONDS = 30.0

_MOST_SECONDS = 1e9
"""Thirty years; the timers of the system end at ten times as many."""

logger = logging.getLogger(__name__)


class Watch:
    """Counts how long nothing was finished. A thread calls `tick` regularly; the training thread only sets `step`.

    Time in which the process itself was stopped (a suspended job, a laptop asleep) does not count: no tick counts for more than twice
    the usual distance between two.
    """

    def __init__(self, limit_seconds: float, tick_seconds: float):
        """`limit_seconds`: from here on `tick` says that the training hangs."""
        self.step: int | None = None
        """The newest finished step; None while none is under way."""
        self.still_seconds = 0.0
        self._seen: int | None = None
        self._limit, self._tick = limit_seconds, tick_seconds
        self._last: float | None = None

    def tick(self, now: float) -> bool:
        """Whether nothing was finished for the whole limit. now: of a monotonic clock."""
        passed = 0.0 if self._last is None else min(now - self._last, 2 * self._tick)
        self._last = now
        self.still_seconds = 0.0 if self.step != self._seen else self.still_seconds + passed
        self._seen = self.step
        return self.still_seconds >= self._limit


class WatchdogHook(Hook):
    """A thread beside the training. On the main process it also keeps RUN/heartbeat.json, by which others see that the run is alive.

    A step costs one assignment. Should the interpreter itself be stuck in a library, so that the thread cannot run either, faulthandler,
    which needs no interpreter, writes all stacks and ends the process a little later.
    """

    def __init__(self, hang_seconds: float, *, end: Callable[[int], Any] = os._exit, grace_seconds: float = GRACE_SECONDS):
        """`hang_seconds`: 0 switches off the ending of the process, not the heartbeat. `end`, `grace_seconds`: replaced by tests.

        Raises UserError for a time that cannot be waited for; the thread would die of it, and nobody would watch.
        """
        if not 0 <= hang_seconds <= _MOST_SECONDS:  # NaN is in no range
            raise UserError(f"--hang-seconds {hang_seconds} is no time to wait for. Give seconds from 0 (never) to {_MOST_SECONDS:,.0f}.")
        self._tick = min(5.0, hang_seconds / 4) if hang_seconds else 5.0
        self._hang_seconds, self._grace_seconds = hang_seconds, grace_seconds
        self._watch = Watch(hang_seconds or float("inf"), self._tick)
        self._end = end
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def on_start(self, run: Run, state: Any) -> None:
        del state
        self._watch.step = run.step
        self._thread = threading.Thread(target=self._keep_watch, args=(run,), name="watchdog", daemon=True)
        self._thread.start()

    def on_step(self, run: Run) -> None:
        self._watch.step = run.step

    def on_end(self, run: Run) -> None:
        del run
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def on_error(self, run: Run, error: BaseException) -> None:
        del error
        self.on_end(run)

    def _keep_watch(self, run: Run) -> None:
        beaten = float("-inf")
        while True:
            now = time.monotonic()
            if run.layout.is_main and now - beaten >= HEARTBEAT_SECONDS:
                beaten = now
                self._beat(run)
            if self._watch.tick(now):
                self._end_hung(run)
                return
            if self._hang_seconds and sys.__stderr__ is not None:
                faulthandler.dump_traceback_later(self._hang_seconds + self._grace_seconds, exit=True, file=sys.__stderr__)
            if self._over.wait(self._tick):
                return

    def _beat(self, run: Run) -> None:
        beat = {
            "schema_version": SCHEMA_VERSION,
            "attempt": run.attempt,
            "step": run.step,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "host": socket.gethostname(),
            "still_seconds": round(self._watch.still_seconds),
        }
        try:
            write_file(run.plan.directory / HEARTBEAT_NAME, orjson.dumps(beat, option=orjson.OPT_APPEND_NEWLINE))
        except OSError as error:
            logger.warning("The heartbeat of %s could not be written (%s); training goes on.", run.plan.directory, error)

    def _end_hung(self, run: Run) -> None:
        logger.error("%s", describe_hang(run, self._watch.still_seconds))
        if not self._over.wait(self._grace_seconds):
            self._end(EXIT_HUNG)


def describe_hang(run: Run, still_seconds: float) -> str:
    """Which process stands still since when, and where: the stack of its main thread."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    stack = "".join(traceback.format_stack(frame)) if frame else "(no stack)"
    return (
        f"Rank {run.layout.rank} on {socket.gethostname()} (attempt {run.attempt}): no step was finished for {still_seconds:.0f} s, the last was {run.step}. "
        f"The process ends, to be started again. Ranks that wait for another one show a collective here; the one they wait for shows what holds it.\n{stack}"
    )
