"""Keeps run.json: an attempt is entered before its first step, and how it ended when it ends."""

from typing import Any

from megatron_exp.errors import UserError
from megatron_exp.training.hooks.base import Hook
from megatron_exp.training.ownership import Ownership
from megatron_exp.training.record import begin_attempt, end_attempt, is_newest
from megatron_exp.training.run import Run


class RecordHook(Hook):
    """A killed attempt stays `running` in the record until the next one is entered after it and calls it `killed`.

    An attempt that was only believed dead ends when it finds another owner of the directory (`training.ownership`). Where it does not see that
    in time, it finds the next one in the record before it writes another checkpoint.
    """

    def __init__(self, overrides: list[str], resumed_from: str | None, ownership: Ownership | None = None):
        """`ownership`: of the main process; what another one has taken over by then is not written."""
        self._overrides = overrides
        self._resumed_from = resumed_from
        self._ownership = ownership
        self._is_entered = False

    def on_start(self, run: Run, state: Any) -> None:
        del state
        if run.layout.is_main:
            begin_attempt(run, self._overrides, self._resumed_from)
            self._is_entered = True

    def on_checkpoint(self, run: Run) -> None:
        if self._is_entered and not is_newest(run):
            self._is_entered = False  # the record is the other's now
            raise UserError(
                f"Another attempt at {run.plan.directory} has begun while attempt {run.attempt} was still at work, for instance because its node was taken for "
                "lost. This attempt ends without a checkpoint; the newer one goes on."
            )

    def on_end(self, run: Run) -> None:
        self._end(run, "finished" if run.is_over else "stopped")

    def on_error(self, run: Run, error: BaseException) -> None:
        self._end(run, "failed", error)

    def _end(self, run: Run, state: str, error: BaseException | None = None) -> None:
        """Once: an error while the other hooks end takes nothing back."""
        if self._is_entered and (self._ownership is None or self._ownership.is_ours):
            end_attempt(run.plan.directory, run.attempt, run.step, state, error)
        self._is_entered = False
