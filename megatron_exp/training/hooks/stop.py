"""Ends an attempt early and in order: on SIGTERM (a scheduler), SIGUSR1 (before a time limit), or at a step that was asked for."""

import logging
import signal
from typing import Any

from megatron_exp.training.agreement import any_process
from megatron_exp.training.hooks.base import Hook
from megatron_exp.training.run import Run

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

logger = logging.getLogger(__name__)


class StopHook(Hook):
    """Stops all processes after the same step, although a signal may reach them in different ones."""

    def __init__(self, stop_at: int | None = None):
        """`stop_at`: state in which to stop although the run is not over."""
        self._stop_at = stop_at
        self._received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def on_start(self, run: Run, state: Any) -> None:
        del state
        self._previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        run.stop = self._stop_at is not None and run.step >= self._stop_at

    def on_step(self, run: Run) -> None:
        if any_process(run.layout, self._received is not None):
            if self._received:
                logger.info("%s: the run stops after step %d, with a checkpoint.", self._received.name, run.step)
            run.stop = True
        elif self._stop_at is not None and run.step >= self._stop_at:
            run.stop = True

    def on_end(self, run: Run) -> None:
        del run
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def on_error(self, run: Run, error: BaseException) -> None:
        del error
        self.on_end(run)

    def _note(self, number: int, frame: Any) -> None:
        del frame
        self._received = signal.Signals(number)
