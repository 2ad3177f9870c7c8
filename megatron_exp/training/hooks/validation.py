"""Loss on text that is never trained on: the first slots of the pool."""

from typing import Any

import numpy as np

from megatron_exp.stream.slot import pool_slot
from megatron_exp.training.data import refuse_unknown_ids
from megatron_exp.training.hooks.base import Hook
from megatron_exp.training.metrics_log import MetricsLog
from megatron_exp.training.run import Run

_SLOTS_AT_ONCE = 256


class ValidationHook(Hook):
    """Measures in the initial state, every `validation.every` updates and in the final state; the log is None but on the main process."""

    def __init__(self, log: MetricsLog | None):
        self._log = log

    def on_start(self, run: Run, state: Any) -> None:
        del state
        if run.step == 0:
            self._measure(run)

    def on_step(self, run: Run) -> None:
        if run.step % run.plan.config.training.validation.every == 0 or run.is_over:
            self._measure(run)

    def _measure(self, run: Run) -> None:
        num_slots = run.plan.config.training.validation.slots
        if num_slots:
            loss = validation_loss(run, num_slots)
            run.validation = (run.step, loss)
            if self._log:
                self._log.write(run.step, {"validation_loss": loss})


def validation_loss(run: Run, num_slots: int) -> float:
    """Mean loss in nats over the unmasked tokens of the first `num_slots` pool slots (collective)."""
    total, num_tokens = 0.0, 0
    for first in range(0, num_slots, _SLOTS_AT_ONCE):
        slots = [pool_slot(index) for index in range(first, min(first + _SLOTS_AT_ONCE, num_slots))]
        contents = [run.plan.base.read(slot) for slot in slots]
        tokens, loss_mask = np.stack([content.tokens for content in contents]), np.stack([content.loss_mask for content in contents])
        refuse_unknown_ids(run.plan.base, slots, tokens, run.model.shape.vocabulary_size, run.plan.shard_names)
        losses = run.scorer.slot_losses(tokens, loss_mask)
        counts = loss_mask.sum(axis=1, dtype=np.int64)
        total += float(np.dot(losses[counts > 0], counts[counts > 0]))
        num_tokens += int(counts.sum())
    return total / num_tokens
