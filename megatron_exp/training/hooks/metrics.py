"""Loss, gradient norm, speed, memory, weight norms and tokens rewritten so far, after every update."""

from typing import Any, NamedTuple

import numpy as np

from megatron_exp.parallel.device import peak_flops, peak_memory_bytes
from megatron_exp.training.hooks.base import Hook
from megatron_exp.training.metrics_log import MetricsLog
from megatron_exp.training.modified import modified_tokens
from megatron_exp.training.norms import weight_norms
from megatron_exp.training.run import Run


class Speed(NamedTuple):
    """Of one update, hooks not counted. flops_per_second: of the model, per process. mfu: as a share of what its GPU could do, or None.

    docs/performance.md has the formula.
    """

    tokens_per_second: float
    flops_per_second: float
    mfu: float | None

    @classmethod
    def of(cls, run: Run) -> "Speed":
        """The speed of the newest update."""
        assert run.last is not None
        geometry = run.plan.base.geometry
        tokens_per_second = geometry.global_batch_size * geometry.sequence_length / run.last.seconds
        flops = run.model.shape.flops_per_token * tokens_per_second / run.layout.world_size
        peak = peak_flops(run.layout.device)
        return cls(tokens_per_second, flops, None if peak is None else flops / peak)


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
            self._log.write(run.step, self._values(run) | ({"norms": norms.parts, "layer_norms": norms.layers} if norms else {}))

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
        speed = Speed.of(run)
        return {
            "loss": update.result.loss,
            "z_loss": update.result.z_loss,
            "grad_norm": update.result.grad_norm,
            "learning_rate": update.learning_rate,
            "tokens": run.step * tokens_per_step,
            "tokens_per_second": speed.tokens_per_second,
            "flops_per_second": speed.flops_per_second,
            **({} if speed.mfu is None else {"mfu": speed.mfu}),
            "memory_bytes": peak_memory_bytes(run.layout.device),
            "seconds": update.seconds,
            "wait_seconds": update.wait_seconds,
            "modified_tokens": self._modified_tokens(run),
        }

    def _modified_tokens(self, run: Run) -> dict[str, int]:
        """Planned insertions and what controllers handed out."""
        decided = run.plan.chain.decided.modified_tokens(run.step) if run.plan.chain else {}
        return {name: int(so_far[run.step]) + decided.get(name, 0) for name, so_far in self._modified.items()}
