"""How long placement takes at the scale of the reference run: 51.2M slots of 4096 tokens, millions of copies.

Usage: python benchmarks/placement.py [--copies N] [--repeats R]

Prints one JSON line: the median of R runs with their range, copies per second, and the peak memory of the process. Copies
are spread over items with 1 to 128 repetitions and payloads of 20 to 700 tokens; one request in a hundred wants whole slots.
"""

import argparse
import json
import resource
import statistics
import time

import numpy as np

from megatron_exp.placement.place import place
from megatron_exp.placement.rows import Copies, candidate_key, floating, window_copies
from megatron_exp.seeding import Words
from megatron_exp.stream.slot import Geometry

GEOMETRY = Geometry(sequence_length=4096, global_batch_size=512, steps=100_000)


def requests_for(num_copies: int) -> list[Copies]:
    """Requests with `num_copies` copies in all, one per item, from two experiments."""
    words = Words.of(0, "benchmark", "placement")
    repetitions = 1 << words.integers(num_copies, 8, stream=0)
    lengths = 20 + words.integers(num_copies, 681, stream=1)
    num_items = int(np.searchsorted(np.cumsum(repetitions), num_copies, side="right"))
    return [_request(item, int(repetitions[item]), 0 if item % 100 == 0 else int(lengths[item])) for item in range(num_items)]


def _request(item: int, num: int, length: int) -> Copies:
    name = "texts" if length else "swaps"
    first, end = window_copies(0, GEOMETRY.steps, num, GEOMETRY, even=False)
    return Copies(
        name=name,
        condition="all",
        key=candidate_key(0, name, "main", "tokens" if length else "swap"),
        item=item,
        length=length,
        exclusive=not length,
        first_slot=first,
        end_slot=end,
        fixed_slot=floating(num),
        fixed_offset=np.zeros(num, np.uint64),
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--copies", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    requests = requests_for(options.copies)
    num_copies = sum(request.num for request in requests)
    place(requests[:100], GEOMETRY)  # compiles the inner loop
    seconds = []
    for _ in range(options.repeats):
        start = time.perf_counter()
        place(requests, GEOMETRY)
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    result = {
        "benchmark": "placement",
        "copies": num_copies,
        "requests": len(requests),
        "seconds": {"median": round(median, 3), "low": round(min(seconds), 3), "high": round(max(seconds), 3)},
        "copies_per_second": round(num_copies / median),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
