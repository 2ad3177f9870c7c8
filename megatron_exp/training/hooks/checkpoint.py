"""When checkpoints are written, and which of them stay."""

import logging
import time
from collections.abc import Sequence
from typing import Any

from megatron_exp.checkpoint.catalogue import checkpoint_path, rotate_checkpoints
from megatron_exp.checkpoint.state import save_checkpoint
from megatron_exp.parallel.agreement import on_main
from megatron_exp.training.hooks.base import Hook
from megatron_exp.training.run import Run

NUM_ROTATING = 2
"""Checkpoints that are there only to go on from: the newest one, and the one before in case that is damaged."""

logger = logging.getLogger(__name__)


class CheckpointHook(Hook):
    """Saves every k steps, in the states that must be kept, when the run is asked to stop, and at its end. Last of the hooks.

    The others make durable what belongs to the state, then the checkpoint is written: what it covers is never lost.
    """

    def __init__(self, hooks: Sequence[Hook], keep: frozenset[int]):
        """`hooks`: all others. `keep`: states whose checkpoints never rotate."""
        self._hooks = hooks
        self._keep = keep

    def on_start(self, run: Run, state: Any) -> None:
        del state
        if run.step == 0 and 0 in self._keep and not on_main(run.layout, checkpoint_path(run.plan.directory, 0).exists):
            self._save(run)

    def on_step(self, run: Run) -> None:
        if run.step % run.plan.config.training.checkpoint.every == 0 or run.step in self._keep or run.is_over or run.stop:
            self._save(run)

    def _save(self, run: Run) -> None:
        states = {hook.name: hook.on_checkpoint(run) for hook in self._hooks}
        extra = {
            "step": run.step,
            "attempt": run.attempt,
            "identity": run.plan.identity,
            "hooks": {name: state for name, state in states.items() if name},
        }
        path = checkpoint_path(run.plan.directory, run.step)
        begin = time.perf_counter()
        save_checkpoint(path, run.model, run.optimizer, extra)
        keep = self._keep | {run.plan.num_steps}
        if run.layout.is_main:
            logger.info("Wrote the checkpoint of step %d in %.1f s.", run.step, time.perf_counter() - begin)
        on_main(run.layout, lambda: [str(gone) for gone in rotate_checkpoints(run.plan.directory, keep, NUM_ROTATING)])
