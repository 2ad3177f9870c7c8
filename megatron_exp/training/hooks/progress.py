"""Says every few seconds how far the run is, as plain lines that also read well in a log file."""

import logging
import time
from typing import Any

from megatron_exp.display.numbers import count, duration, measured
from megatron_exp.training.hooks.base import Hook
from megatron_exp.training.hooks.metrics import Speed
from megatron_exp.training.run import Run

EVERY_SECONDS = 10.0

logger = logging.getLogger(__name__)


class ProgressHook(Hook):
    """Logs on the main process. The time left counts everything, probes and checkpoints included."""

    def __init__(self) -> None:
        self._begin = self._said = time.monotonic()
        self._first_step = 0

    def on_start(self, run: Run, state: Any) -> None:
        del state
        self._begin = self._said = time.monotonic()
        self._first_step = run.step
        if run.layout.is_main:
            what = "the twin" if run.plan.baseline else "the run"
            where = f"from step {run.step} on (attempt {run.attempt})" if run.step else "from the start"
            logger.info(
                "Training %s %s, %d steps, %s: %s parameters.",
                what,
                run.plan.directory,
                run.plan.num_steps,
                where,
                count(run.model.shape.num_parameters),
            )

    def on_step(self, run: Run) -> None:
        now = time.monotonic()
        if not run.layout.is_main or (now - self._said < EVERY_SECONDS and not run.is_over and not run.stop):
            return
        assert run.last is not None
        self._said = now
        geometry = run.plan.base.geometry
        per_step = (now - self._begin) / (run.step - self._first_step)
        mfu = Speed.of(run).mfu
        logger.info(
            "step %d of %d: loss %s, %s tokens/s%s, %s left",
            run.step,
            run.plan.num_steps,
            measured(run.last.result.loss, 4),
            count(geometry.global_batch_size * geometry.sequence_length / per_step),
            "" if mfu is None else f" ({mfu:.0%} of the GPU in the last step)",
            duration(per_step * (run.plan.num_steps - run.step)),
        )
