"""The sham: as many overwrites as all experiments make together, of the same lengths, by ordinary text from the pool."""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from megatron_exp.errors import UserError
from megatron_exp.experiments.context import Context
from megatron_exp.experiments.protocol import Analysis, Experiment, Item, Probe, Request, Window
from megatron_exp.experiments.requests import PAYLOAD_KINDS

_SOURCE: dict[str, Any] = {"source": "training data, from the pool", "licence": "that of the training data"}


class Sham(Experiment):
    """Overwrites without an experiment: what they change is the price of rewriting, not of what is written."""

    title: ClassVar[str] = "Sham"
    question: ClassVar[str] = "What changes because base text is overwritten at all?"
    citation: ClassVar[str] = "a control of this package's own"
    needs: ClassVar[frozenset[str]] = frozenset({"pool"})

    def items(self, context: Context) -> Iterator[Item]:
        """One that stands for all until the overwrites of the experiments are known (`overwrites`)."""
        del context
        yield Item(item=0, condition="sham", role="control", **_SOURCE)

    def requests(self, items: Sequence[Item], context: Context) -> Iterator[Request]:
        del items, context
        yield from ()

    def probes(self, items: Sequence[Item], placed: pa.Table, context: Context) -> Iterator[Probe]:
        del items, placed, context
        yield from ()

    @property
    def analysis(self) -> Analysis:
        return Analysis(())


def overwrites(lengths: Sequence[tuple[str, int, int]], context: Context) -> tuple[list[Item], list[Request]]:
    """Items and requests of the sham: the copies of all experiments, each with text of its own.

    lengths: (kind, tokens, copies) of every request. What overwrites tokens gets a piece of a pool slot, what rewrites a whole slot (swap, noise) a pool
    slot (not exclusive: where the sham is on, all others are off); masks rewrite nothing. Where the pool has fewer slots than needed, its text is used again.
    """
    length = context.geometry.sequence_length
    pieces = [tokens for kind, tokens, copies in lengths if kind in PAYLOAD_KINDS for _ in range(copies)]
    num_whole = sum(copies for kind, _, copies in lengths if kind in ("swap", "noise"))
    slots = _pool_slots(-(-sum(pieces) // length) + len(pieces) // 8 + num_whole, context)
    items, requests = [], []
    window = Window(0, context.geometry.steps)
    for number, tokens in enumerate(_texts(slots[num_whole:] if len(slots) > num_whole else slots, pieces, context)):
        items.append(Item(item=number, condition="sham", role="treated", payload=tokens, **_SOURCE))
        requests.append(Request(item=number, kind="tokens", where=window, copies=1))
    for place in range(num_whole):
        number = len(pieces) + place
        items.append(Item(item=number, condition="sham", role="treated", **_SOURCE))
        source = slots[[place % len(slots)]]
        requests.append(Request(item=number, kind="swap", where=window, copies=1, source_slots=source))
    return items, requests


def _pool_slots(wanted: int, context: Context) -> np.ndarray:
    """uint64: as many pool slots as are wanted, or all that are free."""
    if not wanted:
        return np.empty(0, np.uint64)
    num = min(wanted, context.pool.num_free)
    if not num:
        raise UserError(
            "The sham of a dependence test needs text from the pool, but no pool slot is free. Raise pool.slots and plan the manifest again."
        )
    return context.take_pool("overwrites", num)


def _texts(slots: np.ndarray, lengths: Sequence[int], context: Context) -> Iterator[np.ndarray]:
    """Pieces of the slots' text one after the other, int32 of the given lengths; a piece lies in one slot."""
    assert context.stream is not None
    number, position = 0, 0
    tokens = context.stream.read(int(slots[0])).tokens if len(lengths) else np.empty(0, np.int32)
    for length in lengths:
        if position + length > context.geometry.sequence_length:
            number, position = number + 1, 0
            tokens = context.stream.read(int(slots[number % len(slots)])).tokens
        yield tokens[position : position + length].astype(np.int32)
        position += length
