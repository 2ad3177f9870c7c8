"""Loss, gradient norm, speed, weight norms and tokens rewritten so far, after every update."""

from typing import Any

import numpy as np

from megatron_exp.training.hooks.base import Hook
from megatron_exp.training.metrics_log import MetricsLog
from megatron_exp.training.modified import modified_tokens
from megatron_exp.training.norms import weight_norms
from megatron_exp.training.run import Run

NORMS_EVERY = 10
"""Updates between two looks at the weight norms; each reads all weights once."""


class MetricsHook(Hook):
    """Writes a line for every update to the log, which is None on all processes but the main one. The log is closed here."""

    def __init__(self, log: MetricsLog | None):
        self._log = log
        self._modified: dict[str, np.ndarray] = {}

    def on_start(self, run: Run, state: Any) -> None:
        del state
        if self._log and not run.plan.baseline:
            self._modified = modified_tokens(run.plan.manifest, run.plan.masked)

    def on_step(self, run: Run) -> None:
        norms = weight_norms(run.model) if run.step % NORMS_EVERY == 0 or run.is_over else None
        if self._log:
            self._log.write(run.step, self._values(run) | ({"norms": norms} if norms else {}))

    def on_checkpoint(self, run: Run) -> None:
        del run
        if self._log:
            self._log.sync()

    def on_end(self, run: Run) -> None:
        del run
        if self._log:
            self._log.close()

    def on_error(self, run: Run, error: BaseException) -> None:
        del error
        self.on_end(run)

    def _values(self, run: Run) -> dict[str, Any]:
        update, geometry = run.last, run.plan.base.geometry
        assert update is not None
        tokens_per_step = geometry.global_batch_size * geometry.sequence_length
        return {
            "loss": update.result.loss,
            "z_loss": update.result.z_loss,
            "grad_norm": update.result.grad_norm,
            "learning_rate": update.learning_rate,
            "tokens": run.step * tokens_per_step,
            "tokens_per_second": tokens_per_step / update.seconds,
            "seconds": update.seconds,
            "wait_seconds": update.wait_seconds,
            "modified_tokens": {name: int(so_far[run.step]) for name, so_far in self._modified.items()},
        }
