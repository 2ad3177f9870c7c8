"""Says what is unusual, in the log and in RUN/alerts.jsonl, and stops a run whose numbers are no longer finite."""

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from megatron_exp.display.numbers import duration
from megatron_exp.errors import UserError
from megatron_exp.run_record import Series
from megatron_exp.training.alerts import WINDOW, Alert, Drift, Spikes, Waits, planned_exceptions
from megatron_exp.training.hooks.base import Hook
from megatron_exp.training.hooks.watchdog import Watch
from megatron_exp.training.json_log import JsonLog
from megatron_exp.training.run import Run

logger = logging.getLogger(__name__)

_STALL_SECONDS, _STALL_UPDATES = 600.0, 20.0
"""Nothing moves where no update has ended for both: so long, and so many times the usual update."""


class AlertHook(Hook):
    """Looks at loss, gradient norm, validation loss and times, and at nothing that an experiment asks.

    What it remembers of numbers that are equal in all processes goes into checkpoints, so that a resumed run says what the uninterrupted
    one would. Only the main process writes.
    """

    name = "alerts"

    def __init__(self, log: JsonLog | None, twins: Sequence[tuple[Series, Series]] = ()):
        """`log`: of alerts, None but on the main process. `twins`: of each, its losses in training and in validation."""
        self._log = log
        self._twins = twins
        self._spikes = Spikes({})
        self._drifts: dict[str, Drift] = {}
        self._planned: dict[int, str] = {}
        self._waits = Waits()
        self._watch = StallWatch(self._say)

    def on_start(self, run: Run, state: Any) -> None:
        state = state or {}
        self._planned = {} if run.plan.baseline else planned_exceptions(run.plan.manifest, run.plan.masked)
        self._spikes = Spikes(self._planned, state.get("spikes"))
        kinds = {"loss": ("the training loss", WINDOW), "validation_loss": ("the validation loss", 1)}
        for number, (name, (what, at_once)) in enumerate(kinds.items()):
            if self._twins:
                self._drifts[name] = Drift(what, [twin[number] for twin in self._twins], at_once, state.get(name))
        if self._log:
            self._watch.start(run.attempt, run.step)

    def on_step(self, run: Run) -> None:
        assert run.last is not None
        result = run.last.result
        self._watch.moved(run.step, run.last.seconds)
        if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
            self._stop(run, result.loss, result.grad_norm)
        late = self._waits.look(run.step, run.last.wait_seconds, run.last.seconds)
        found = [*self._spikes.look(run.step, result.loss, result.grad_norm), *late]
        if "loss" in self._drifts and run.step - 1 not in self._planned:
            found += self._drifts["loss"].look(run.step, result.loss)
        if "validation_loss" in self._drifts and run.validation and run.validation[0] == run.step:
            found += self._drifts["validation_loss"].look(*run.validation)
        for alert in found:
            self._say(run.attempt, alert)

    def on_checkpoint(self, run: Run) -> Any:
        del run
        if self._log:
            self._log.sync()
        return {"spikes": self._spikes.state, **{name: drift.state for name, drift in self._drifts.items()}}

    def on_end(self, run: Run) -> None:
        del run
        self._watch.stop()
        if self._log:
            self._log.close()
            self._log = None

    def on_error(self, run: Run, error: BaseException) -> None:
        del error
        self.on_end(run)

    def _say(self, attempt: int, alert: Alert) -> None:
        if self._log:
            logger.warning("alert (%s): %s.", alert.kind, alert.message)
            self._log.write({"attempt": attempt, "time": time.time(), **asdict(alert)})

    def _stop(self, run: Run, loss: float, gradient_norm: float) -> None:
        """End the run in all processes, which see the same numbers, before any checkpoint is written."""
        step = run.step - 1
        planned = f" The step holds a planned exception of {self._planned[step]}." if step in self._planned else ""
        what = f"in step {step} the loss was {loss} and the gradient norm {gradient_norm}"
        value = loss if math.isfinite(gradient_norm) else gradient_norm
        self._say(run.attempt, Alert("not_finite", run.step, value, None, None, what))
        raise UserError(
            f"The run {run.plan.directory} has diverged: {what}. It stops, and no checkpoint of these weights is written.{planned} The same command would go "
            "on from the last checkpoint and come to the same place. Look at loss and gradient norm before it (metrics.jsonl, alerts.jsonl), then train anew "
            "from an older state with a lower training.schedule.peak_lr, a smaller training.optimizer.clip, or training.precision bf16 in place of fp8."
        )


class StallWatch:
    """A thread that says so where no update ends for long: then no hook is called either. The watchdog ends the process, much later."""

    def __init__(self, say: Callable[[int, Alert], None], shortest_seconds: float = _STALL_SECONDS):
        """`say`: takes the attempt and an alert."""
        self._say = say
        self._shortest = shortest_seconds
        self._tick = shortest_seconds / 20
        self._watch = Watch(float("inf"), self._tick)
        self._over = threading.Event()
        self._usual = 0.0

    def start(self, attempt: int, step: int) -> None:
        """Begin to watch, in state `step`."""
        self._watch.step = step
        threading.Thread(target=self._run, args=(attempt,), name="stall", daemon=True).start()

    def moved(self, step: int, seconds: float) -> None:
        """An update has ended, which took `seconds`."""
        self._watch.step = step
        self._usual = seconds if not self._usual else 0.9 * self._usual + 0.1 * seconds

    def stop(self) -> None:
        """End the thread."""
        self._over.set()

    def _run(self, attempt: int) -> None:
        said: int | None = None
        while not self._over.wait(self._tick):
            self._watch.tick(time.monotonic())
            step, still, limit = self._watch.step, self._watch.still_seconds, max(self._shortest, _STALL_UPDATES * self._usual)
            if step is not None and still > limit and said != step:
                said = step
                what = f"no update has ended for {duration(still)} after state {step}; {duration(self._usual)} would be usual"
                self._say(attempt, Alert("stall", step, still, None, limit, what))
