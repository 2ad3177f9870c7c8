"""Keeps run.json: an attempt is entered before its first step, and how it ended when it ends."""

from typing import Any

from megatron_exp.training.hooks.base import Hook
from megatron_exp.training.record import begin_attempt, end_attempt
from megatron_exp.training.run import Run


class RecordHook(Hook):
    """A killed attempt stays `running` in the record; the next one is entered after it."""

    def __init__(self, overrides: list[str], resumed_from: str | None):
        self._overrides = overrides
        self._resumed_from = resumed_from
        self._is_entered = False

    def on_start(self, run: Run, state: Any) -> None:
        del state
        if run.layout.is_main:
            begin_attempt(run, self._overrides, self._resumed_from)
            self._is_entered = True

    def on_end(self, run: Run) -> None:
        if self._is_entered:
            end_attempt(run.plan.directory, run.step, "finished" if run.is_over else "stopped")

    def on_error(self, run: Run, error: BaseException) -> None:
        del error
        if self._is_entered:
            end_attempt(run.plan.directory, run.step, "failed")
