"""The training loop. Everything but the update itself is a hook."""

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence

from megatron_exp.errors import UserError
from megatron_exp.model.step import train_step
from megatron_exp.training.hooks.base import Hook
from megatron_exp.training.run import Run, Update

logger = logging.getLogger(__name__)


def train_loop(run: Run, hooks: Sequence[Hook]) -> None:
    """Update until the last planned step, or until a hook sets `run.stop`."""
    try:
        for hook in hooks:
            hook.on_start(run, run.hook_states.get(hook.name))
        while not (run.is_over or run.stop):
            run.last = update(run)
            run.step += 1
            for hook in hooks:
                hook.on_step(run)
        for hook in hooks:
            hook.on_end(run)
    except BaseException as error:
        for hook in hooks:
            with _tolerated(hook):
                hook.on_error(run, error)
        raise


@contextlib.contextmanager
def _tolerated(hook: Hook) -> Iterator[None]:
    """A disk that also refuses what HOOK notes about an error must not take that error's place, nor the other hooks' turn."""
    try:
        yield
    except (OSError, UserError) as error:
        logger.warning("%s could not note how the run ended: %s", type(hook).__name__, error)


def update(run: Run) -> Update:
    """One step: read, forward, backward, optimizer."""
    begin = time.perf_counter()
    batch = run.feed.batch(run.step)
    learning_rate = run.schedule.learning_rate(run.step)
    run.optimizer.set_learning_rate(learning_rate)
    result = train_step(run.model, run.optimizer, batch.micro_batches)
    return Update(
        batch=batch,
        result=result,
        learning_rate=learning_rate,
        seconds=time.perf_counter() - begin,
        wait_seconds=run.feed.wait_seconds,
    )
