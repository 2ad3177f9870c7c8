"""What is planned before an experiment that needs a reference: its context's view of the others."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from megatron_exp.experiments.controllers import Reserved
from megatron_exp.experiments.protocol import Item
from megatron_exp.experiments.tables import Wanted
from megatron_exp.placement.place import Placement


class _Slots(NamedTuple):
    replaced: np.ndarray
    sources: np.ndarray
    closed: np.ndarray


class Earlier:
    """It implements `EarlierLike` of the experiments' context. Places are looked for when somebody asks for slots."""

    def __init__(self, items: Sequence[tuple[str, Sequence[Item]]], place: Callable[[], tuple[Sequence[Wanted | Reserved], Placement]]):
        """items: (experiment, items) of the enabled ones. place: the requests of all of them, disabled ones too, and their places."""
        self._items, self._place = items, place

    def payloads(self) -> Iterator[tuple[str, np.ndarray]]:
        """(experiment, int32 ids) of all treated items that have tokens."""
        for name, items in self._items:
            yield from ((name, item.payload) for item in items if item.role == "treated" and item.payload is not None)

    @property
    def replaced(self) -> np.ndarray:
        return self._slots.replaced

    @property
    def sources(self) -> np.ndarray:
        return self._slots.sources

    @property
    def closed(self) -> np.ndarray:
        """Disabled experiments write nothing and keep their places: their whole slots are closed."""
        return self._slots.closed

    @cached_property
    def _slots(self) -> _Slots:
        enabled = {name for name, _ in self._items}
        wanted, placement = self._place()
        replaced, sources, closed = ([np.empty(0, np.uint64)] for _ in range(3))
        for number, one in enumerate(wanted):
            if isinstance(one, Reserved):
                continue  # places of tokens
            if one.request.kind == "swap" and one.experiment in enabled:
                replaced.append(placement.of(number)[0])
                sources.append(np.asarray(one.request.source_slots, np.uint64))
            elif one.request.kind in ("swap", "noise", "splice"):
                closed.append(placement.of(number)[0])
        return _Slots(*(np.unique(np.concatenate(parts)) for parts in (replaced, sources, closed)))
