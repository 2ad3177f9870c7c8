"""How far preprocessing is: what callers of `progress` get, and the counters it is made of."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.sharedctypes import SynchronizedArray
from typing import Literal

Phase = Literal["tokenise", "merge", "import"]
INTERVAL_SECONDS = 0.5

_READ, _TEXT, _DOCUMENTS, _TOKENS = range(4)
NUM_COUNTERS = 4


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A moment of one phase. Counts are of this call: what an earlier, interrupted one finished is in `done_before_bytes`.

    total_bytes: stored bytes of all input (tokenise) or bytes of all shards (merge, import). read_bytes: of these, done now.
    text_bytes: UTF-8 after decompression.
    """

    phase: Phase
    seconds: float
    total_bytes: int
    done_before_bytes: int
    read_bytes: int
    text_bytes: int
    documents: int
    tokens: int

    @property
    def fraction(self) -> float:
        return min((self.done_before_bytes + self.read_bytes) / self.total_bytes, 1.0) if self.total_bytes else 1.0

    @property
    def megabytes_per_second(self) -> float:
        """Of text while tokenising, of shard bytes otherwise."""
        return (self.text_bytes if self.phase == "tokenise" else self.read_bytes) / 1e6 / max(self.seconds, 1e-9)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """At the present rate; None before anything was read."""
        left = max(self.total_bytes - self.done_before_bytes - self.read_bytes, 0)
        return left * self.seconds / self.read_bytes if self.read_bytes else None


ProgressCallback = Callable[[Progress], None]


class Counters:
    """Running counts; `cells` is shared memory where several processes count together."""

    def __init__(self, cells: "list[int] | SynchronizedArray[int]", on_change: Callable[[], None] = lambda: None):
        self._cells = cells
        self._on_change = on_change

    def add(self, *, read_bytes: int = 0, text_bytes: int = 0, documents: int = 0, tokens: int = 0) -> None:
        if isinstance(self._cells, list):
            self._add(read_bytes, text_bytes, documents, tokens)
        else:
            with self._cells.get_lock():
                self._add(read_bytes, text_bytes, documents, tokens)
        self._on_change()

    def _add(self, *amounts: int) -> None:
        for index, amount in enumerate(amounts):
            self._cells[index] += amount


class Reporter:
    """Calls back at most every INTERVAL_SECONDS, and once at the end."""

    def __init__(self, callback: ProgressCallback | None, phase: Phase, total_bytes: int, done_before_bytes: int):
        self._callback = callback
        self._phase: Phase = phase
        self._total, self._before = total_bytes, done_before_bytes
        self._start = self._last = time.monotonic()

    def report(self, cells: "list[int] | SynchronizedArray[int]", *, last: bool = False) -> None:
        now = time.monotonic()
        if self._callback is None or not (last or now - self._last >= INTERVAL_SECONDS):
            return
        self._last = now
        self._callback(
            Progress(
                phase=self._phase,
                seconds=now - self._start,
                total_bytes=self._total,
                done_before_bytes=self._before,
                read_bytes=cells[_READ],
                text_bytes=cells[_TEXT],
                documents=cells[_DOCUMENTS],
                tokens=cells[_TOKENS],
            )
        )
