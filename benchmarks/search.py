"""How fast `search` scans: 1,000 strings of 50 tokens, on all cores, beside summing the same array (reading it once).

Usage: python benchmarks/search.py [--tokens N] [--pairs P]

Goal: 250M tokens/s on 2 cores.
"""

import argparse
import os

import numpy as np
from measuring import interleaved, show, spread

from megatron_exp.search.patterns import Patterns
from megatron_exp.search.scan import scan
from megatron_exp.seeding import Words

_STRINGS, _LENGTH, _VOCABULARY = 1_000, 50, 100_278


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=100_000_000)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    tokens = Words.of(0, "benchmark", "search").integers(options.tokens, _VOCABULARY).astype(np.int32)
    starts = Words.of(0, "benchmark", "strings").integers(_STRINGS, options.tokens - _LENGTH)
    patterns = Patterns.of([tokens[start : start + _LENGTH].copy() for start in starts])
    threads = len(os.sched_getaffinity(0))
    found = scan(tokens, patterns, threads=threads)  # compiles, and warms the memory
    assert set(found.patterns.tolist()) == set(range(_STRINGS))
    scanning, summing = interleaved(lambda: scan(tokens, patterns, threads=threads), lambda: tokens.sum(), options.pairs)
    show(
        "search",
        million_tokens_per_second=spread([options.tokens / 1e6 / value for value in scanning], 1),
        goal_million_tokens_per_second=250,
        summing_the_array=spread([options.tokens / 1e6 / value for value in summing], 1),
        threads=threads,
        strings=_STRINGS,
    )


if __name__ == "__main__":
    main()
