"""How one process decides for all."""

from collections.abc import Callable
from typing import TypeVar

from megatron_exp.errors import InterruptedRunError, UserError
from megatron_exp.parallel.layout import Layout

T = TypeVar("T")


def on_main(layout: Layout, work: Callable[[], T]) -> T:
    """Do WORK on the main process only and give its result, or its UserError or InterruptedRunError, to all (collective).

    What is found on disk may differ between two looks, so one process looks and all obey.
    """
    if layout.world_size == 1:
        return work()
    answer: tuple[T | None, Exception | None] = (None, None)
    if layout.is_main:
        try:
            answer = (work(), None)
        except (UserError, InterruptedRunError) as error:
            answer = (None, error)
    result, failure = layout.broadcast(answer)
    if failure is not None:
        raise failure
    return result
