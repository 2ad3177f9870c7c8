"""Parts of training as an experiment declares them, fractions, and as placement takes them, steps."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Window:
    """Anywhere in the steps [start, end), uniformly, every copy independent of the others."""

    start: int
    end: int

    @classmethod
    def of_fractions(cls, fractions: Sequence[float], steps: int) -> "Window":
        """The steps of a part of training given as two fractions in [0, 1]: the step that holds the first, to the nearest of the second.

        At least one step, however close the two are.
        """
        low, high = fractions
        start = min(int(low * steps), steps - 1)
        return cls(start, max(start + 1, round(high * steps)))
