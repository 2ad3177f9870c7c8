"""Services that show metrics to people. None of them can stop, slow down or change a run."""

import logging
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

logger = logging.getLogger(__name__)

_MOST_WAITING = 10_000
_CLOSING_SECONDS = 30.0


class Tracker(Protocol):
    """What a service must take."""

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """What was measured in the state after `step` updates."""

    def close(self) -> None:
        """There is no more."""


class Detached:
    """A tracker on a thread of its own. Its first failure is logged, and from then on it gets nothing.

    That holds for whatever it raises, for one that takes longer than lines come, and for one that never ends.
    """

    def __init__(self, name: str, make: Callable[[], Tracker]):
        """`make` opens the tracker, on the thread."""
        self._name = name
        self._make = make
        self._lines: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(_MOST_WAITING)
        self._gave_up = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self._put((step, numbers))

    def close(self) -> None:
        self._put(None)
        self._thread.join(0.0 if self._gave_up.is_set() else _CLOSING_SECONDS)
        if self._thread.is_alive() and not self._gave_up.is_set():
            self._give_up(f"it did not end within {_CLOSING_SECONDS:.0f} s")

    def _put(self, line: tuple[int, dict[str, float]] | None) -> None:
        if self._gave_up.is_set():
            return
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._give_up(f"{_MOST_WAITING:,} lines wait for it")

    def _run(self) -> None:
        try:
            tracker = self._make()
            while (line := self._lines.get()) is not None:
                tracker.write(*line)
            tracker.close()
        except Exception as error:  # noqa: BLE001 - a foreign service may raise anything, and nothing depends on it
            self._give_up(f"{type(error).__name__}: {error}")

    def _give_up(self, why: str) -> None:
        self._gave_up.set()
        logger.warning("%s gets no more metrics (%s). The run goes on; metrics.jsonl has everything.", self._name, why)


class WeightsAndBiases:
    """W&B, one run of it for all attempts of ours. Account, server and offline mode are said to its own client (`wandb login`, WANDB_MODE)."""

    def __init__(self, directory: Path, project: str, name: str, run_id: str, config: dict[str, Any]):
        import wandb

        self._run = wandb.init(project=project, name=name, id=run_id, resume="allow", dir=str(directory), config=config)
        # States as an axis of our own: W&B's own steps must rise, and a resumed attempt begins again before the last one.
        self._run.define_metric("state")
        self._run.define_metric("*", step_metric="state")

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log({**numbers, "state": step})

    def close(self) -> None:
        self._run.finish()
