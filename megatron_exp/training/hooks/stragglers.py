"""Finds processes that are slower than the others, although all finish a step together."""

import functools
import logging
import socket
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

from megatron_exp.parallel.device import moment, seconds_between
from megatron_exp.training.hooks.base import Hook
from megatron_exp.training.run import Run

EVERY_STEPS = 50
"""Steps between two comparisons; each gathers three values of every process."""

SLOW_FACTOR, SLOW_SECONDS = 1.5, 0.05
"""A process is a straggler where its own work takes that many times the median of all, and at least so much longer."""

logger = logging.getLogger(__name__)


class Pace(NamedTuple):
    """Medians over the last steps. own_seconds: forward and backward, before gradients are exchanged. wait_seconds: for data."""

    own_seconds: float
    wait_seconds: float
    host: str


class StragglerHook(Hook):
    """Compares, every few steps, the time that each process needed until it began to exchange gradients.

    Tensor- and context-parallel processes exchange activations before, so a slow one shows with its whole group.
    """

    def __init__(self) -> None:
        self._begin: Any = None
        self._exchange: Any = None
        self._own: list[float] = []
        self._waits: list[float] = []

    def on_start(self, run: Run, state: Any) -> None:
        del state
        if run.layout.world_size == 1:
            return
        config = run.model.config
        config.finalize_model_grads_func = self._noting(config.finalize_model_grads_func)
        self._begin = moment()

    def _noting(self, finalize: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(finalize)
        def noted(*arguments: Any, **options: Any) -> Any:
            self._exchange = moment()
            return finalize(*arguments, **options)

        return noted

    def on_step(self, run: Run) -> None:
        if self._begin is None:
            return
        assert run.last is not None and self._exchange is not None
        self._waits.append(run.last.wait_seconds)
        self._own.append(seconds_between(self._begin, self._exchange) - run.last.wait_seconds)
        if len(self._own) == EVERY_STEPS:
            self._compare(run)
        self._begin = moment()

    def _compare(self, run: Run) -> None:
        pace = Pace(median(self._own), median(self._waits), socket.gethostname())
        self._own, self._waits = [], []
        paces = run.layout.gather(pace)
        if run.layout.is_main:
            for line in stragglers([Pace(*one) for one in paces]):
                logger.warning("Up to step %d, %s", run.step, line)


def stragglers(paces: Sequence[Pace]) -> list[str]:
    """One sentence per slow process; `paces` by rank."""
    found = []
    for what, values in (
        ("forward and backward took", [pace.own_seconds for pace in paces]),
        ("waiting for data took", [pace.wait_seconds for pace in paces]),
    ):
        usual = median(values)
        for rank, value in enumerate(values):
            if value > SLOW_FACTOR * usual and value > usual + SLOW_SECONDS:
                found.append(
                    f"rank {rank} on {paces[rank].host} is a straggler: {what} {value:.2f} s a step, {usual:.2f} s in the median of all ranks."
                )
    return found
