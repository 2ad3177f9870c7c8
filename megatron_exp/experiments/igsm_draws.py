"""Keyed random numbers one at a time, for generators that branch on what they draw."""

import math
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np

from megatron_exp.seeding import Words, words64

T = TypeVar("T")

_BLOCK = 192
"""Words made at once for one stream; most problems need fewer."""
_STREAMS_AT_ONCE = 256
_FULL = 1 << 64


class Draws:
    """The words of one stream in order; a pure function of (key, stream), however many other streams are read."""

    __slots__ = ("_key", "_stream", "_words", "_next", "_made")

    def __init__(self, key: int, stream: int, words: list[int] | None = None):
        self._key, self._stream = key, stream
        self._words = words if words is not None else []
        self._next, self._made = 0, len(self._words)

    def word(self) -> int:
        """The next 64-bit word."""
        if self._next == len(self._words):
            index = np.arange(self._made, self._made + _BLOCK, dtype=np.uint64)
            self._words, self._next = words64(self._key, index, self._stream).tolist(), 0
            self._made += _BLOCK
        self._next += 1
        return self._words[self._next - 1]

    def below(self, high: int) -> int:
        """Uniform on [0, high)."""
        return self.word() * high >> 64

    def uniform(self) -> float:
        """On [0, 1)."""
        return self.word() / _FULL

    def coin(self) -> bool:
        """Fair."""
        return self.word() < _FULL >> 1

    def normal(self) -> float:
        """Standard normal, by Box-Muller."""
        radius = math.sqrt(-2.0 * math.log((self.word() + 1) / (_FULL + 1)))
        return radius * math.cos(2.0 * math.pi * self.uniform())

    def one_of(self, choices: Sequence[T]) -> T:
        """Uniformly one of them."""
        return choices[self.word() * len(choices) >> 64]

    def sample(self, choices: Sequence[T], num: int) -> list[T]:
        """`num` of them without replacement, in random order."""
        rest = list(choices)
        for place in range(num):
            other = place + self.below(len(rest) - place)
            rest[place], rest[other] = rest[other], rest[place]
        return rest[:num]

    def weighted(self, weights: Sequence[float]) -> int:
        """An index with probability in proportion to its weight."""
        left = self.uniform() * sum(weights)
        for index, weight in enumerate(weights):
            left -= weight
            if left < 0:
                return index
        return len(weights) - 1


def draws_of(words: Words, first: int, num: int) -> Iterator[Draws]:
    """The streams `first` to `first` + num - 1, their first words made together."""
    index = np.arange(_BLOCK, dtype=np.uint64)
    for start in range(first, first + num, _STREAMS_AT_ONCE):
        streams = range(start, min(start + _STREAMS_AT_ONCE, first + num))
        made = words64(words.key, index[None, :], np.array(streams, np.uint64)[:, None]).tolist()
        for stream, own in zip(streams, made, strict=True):
            yield Draws(words.key, stream, own)
