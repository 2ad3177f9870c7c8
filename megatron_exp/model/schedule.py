"""The learning rate as a pure function of the step: nothing to store, so nothing to resume wrongly."""

import math
from dataclasses import dataclass

from megatron_exp.config.schema import ScheduleConfig
from megatron_exp.errors import UserError
from megatron_exp.stream.slot import Geometry


@dataclass(frozen=True)
class Schedule:
    """Warm-up, then a base curve, then a straight line to zero.

    kind: `cosine` falls from `peak` to `final_factor * peak` over `horizon_steps` (it may lie far behind the last step: OLMo-2's
    is 5e12 tokens) and stays there; `constant` stays at `peak`. warmup_steps: the rate grows linearly, as in OLMo-core step s (from 0) uses
    (s + 1) / warmup_steps of the peak. decay_start: from this step on the rate falls linearly and would be zero at `steps`, so that the
    last update, steps - 1, still moves the weights; None: no such line.
    """

    kind: str
    peak: float
    steps: int
    warmup_steps: int
    horizon_steps: float
    final_factor: float
    decay_start: int | None

    @classmethod
    def of(cls, config: ScheduleConfig, default_peak: float, geometry: Geometry) -> "Schedule":
        """The schedule of a config; UserError where its moments do not follow each other."""
        tokens_per_step = geometry.global_batch_size * geometry.sequence_length
        horizon = geometry.steps if config.horizon_tokens is None else config.horizon_tokens / tokens_per_step
        schedule = cls(
            kind=config.kind,
            peak=config.peak_lr or default_peak,
            steps=geometry.steps,
            warmup_steps=config.warmup_steps,
            horizon_steps=horizon,
            final_factor=config.final_factor,
            decay_start=config.decay_start,
        )
        schedule._check()
        return schedule

    def learning_rate(self, step: int) -> float:
        """The rate of the update made in `step` (from 0)."""
        if self.decay_start is None or step < self.decay_start:
            return self._base(step)
        return self._base(self.decay_start) * (self.steps - step) / (self.steps - self.decay_start)

    def _base(self, step: int) -> float:
        done = step + 1
        if done < self.warmup_steps:
            return self.peak * done / self.warmup_steps
        if self.kind == "constant":
            return self.peak
        progress = min(1.0, (done - self.warmup_steps) / (self.horizon_steps - self.warmup_steps))
        lowest = self.final_factor * self.peak
        return lowest + (self.peak - lowest) * (1.0 + math.cos(math.pi * progress)) / 2.0

    def _check(self) -> None:
        end = self.steps if self.decay_start is None else self.decay_start
        if self.warmup_steps > end:
            raise UserError(
                f"training.schedule.warmup_steps is {self.warmup_steps}, but the rate begins to fall at step {end}: it would never reach its peak. "
                "Shorten the warm-up."
            )
        if self.decay_start is not None and self.decay_start >= self.steps:
            raise UserError(
                f"training.schedule.decay_start is {self.decay_start}, but the run has {self.steps} steps (0 to {self.steps - 1}). "
                "Use an earlier step, or leave decay_start out."
            )
        if self.kind == "cosine" and self.horizon_steps <= self.warmup_steps:
            raise UserError(
                f"training.schedule.horizon_tokens is {self.horizon_steps:.1f} steps, not more than the warm-up of {self.warmup_steps} steps. "
                "Raise the horizon or shorten the warm-up."
            )
