"""When checkpoints are written, and which of them stay."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_exp.checkpoint.catalogue import checkpoint_path, rotate_checkpoints
from megatron_exp.checkpoint.saving import SavingCheckpoint
from megatron_exp.checkpoint.space import checkpoint_bytes, most_at_once, require_room, require_room_for_one
from megatron_exp.parallel.agreement import on_main
from megatron_exp.training.agreement import any_process
from megatron_exp.training.hooks.base import Hook
from megatron_exp.training.run import Run

NUM_ROTATING = 2
"""Checkpoints that are there only to go on from: the newest one, and the one before in case that is damaged."""

logger = logging.getLogger(__name__)


class CheckpointHook(Hook):
    """Saves every k steps, in the states that must be kept, when the run is asked to stop, and at its end. Last of the hooks.

    The others make durable what belongs to the state, then the checkpoint is written: what it covers is never lost. Those that outlive
    the layout are portable: kept states, every `portable_every`, at a stop and at the end.
    """

    def __init__(self, hooks: Sequence[Hook], keep: frozenset[int]):
        """`hooks`: all others. `keep`: states whose checkpoints never rotate."""
        self._hooks = hooks
        self._keep = keep
        self._sound: set[Path] = set()
        self._saving: SavingCheckpoint | None = None
        self._begun = 0.0

    def on_start(self, run: Run, state: Any) -> None:
        del state
        self._sound = {run.resumed_from} if run.resumed_from else set()
        settings = run.plan.config.training.checkpoint
        most = most_at_once(settings.every, settings.portable_every, self._keep, run.plan.num_steps, NUM_ROTATING)
        on_main(run.layout, lambda: require_room(run.plan.directory, self._bytes(run), most))
        if run.step == 0 and 0 in self._keep and not on_main(run.layout, checkpoint_path(run.plan.directory, 0).exists):
            self._save(run)

    def on_step(self, run: Run) -> None:
        if self._saving and not any_process(run.layout, not self._saving.is_written()):
            self._finish(run)
        if run.step % run.plan.config.training.checkpoint.every == 0 or self._is_portable(run):
            self._save(run)

    def _bytes(self, run: Run) -> int:
        return checkpoint_bytes(run.model.shape.num_parameters, run.model.precision)

    def _is_portable(self, run: Run) -> bool:
        every = run.plan.config.training.checkpoint.portable_every
        return run.step in self._keep or run.is_over or run.stop or bool(every and run.step % every == 0)

    def _save(self, run: Run) -> None:
        if self._saving:
            self._finish(run)
        path = checkpoint_path(run.plan.directory, run.step)
        on_main(run.layout, lambda: require_room_for_one(path, self._bytes(run)))
        states = {hook.name: hook.on_checkpoint(run) for hook in self._hooks}
        extra = {
            "step": run.step,
            "attempt": run.attempt,
            "identity": run.plan.identity,
            "tokenizer": run.plan.base.corpus.tokenizer_fingerprint,
            "learning_rate": run.last.learning_rate if run.last else None,
            "hooks": {name: state for name, state in states.items() if name},
        }
        in_background = run.plan.config.training.checkpoint.in_background and not (run.is_over or run.stop)
        self._begun = time.perf_counter()
        portable = self._is_portable(run)
        self._saving = SavingCheckpoint(path, run.model, run.optimizer, extra, is_portable=portable, in_background=in_background)
        if not in_background:
            self._finish(run)

    def _finish(self, run: Run) -> None:
        """Complete the checkpoint under way, which has been read back by then, and let older ones go."""
        assert self._saving
        self._saving.finish()
        path, self._saving = self._saving.directory, None
        self._sound.add(path)
        if run.layout.is_main:
            logger.info("Wrote the checkpoint %s in %.1f s.", path.name, time.perf_counter() - self._begun)
        keep = self._keep | {run.plan.num_steps}
        on_main(run.layout, lambda: [str(gone) for gone in rotate_checkpoints(run.plan.directory, keep, NUM_ROTATING, self._sound)])
