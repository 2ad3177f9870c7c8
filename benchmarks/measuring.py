"""What the benchmarks share: interleaved pairs, medians with their range, one JSON line."""

import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def interleaved(first: Callable[[], object], second: Callable[[], object], pairs: int) -> tuple[list[float], list[float]]:
    """Seconds of both, measured in turn, so that a machine that slows down slows both."""
    measured = [(seconds(first), seconds(second)) for _ in range(pairs)]
    return [a for a, _ in measured], [b for _, b in measured]


def as_installed() -> dict[str, str]:
    """The environment of a command that is timed from its start: an installed package has bytecode, so a checkout must be allowed to keep its own."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def spread(values: list[float], digits: int = 4) -> dict[str, float]:
    """Median with its range."""
    return {"median": round(statistics.median(values), digits), "low": round(min(values), digits), "high": round(max(values), digits)}


def ratios(slower: list[float], faster: list[float]) -> dict[str, float]:
    """How many times faster, pair by pair."""
    return spread([a / b for a, b in zip(slower, faster, strict=True)], 2)


def show(name: str, **result: Any) -> None:
    """Print one JSON line with what the machine was."""
    print(json.dumps({"benchmark": name, **result, "cores": len(os.sched_getaffinity(0)), "load": round(os.getloadavg()[0], 1)}))
