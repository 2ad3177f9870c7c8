"""Storing the payloads of a plan, beside writing the same bytes plainly.

Usage: python benchmarks/payload_store.py [--megabytes N] [--pairs P]

Goal: the speed of the disk. The reference plan's payloads are a million sequences of 740 tokens on average, 3 GB. Both write through to the disk (fsync).
"""

import argparse
import os
import tempfile
from itertools import count
from pathlib import Path

import numpy as np
from measuring import interleaved, ratios, show, spread

from megatron_exp.manifest.payloads import PayloadStore
from megatron_exp.seeding import Words

_TOKENS = 740


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    num = options.megabytes * 1_000_000 // (4 * _TOKENS)
    text = Words.of(0, "benchmark", "payloads").integers(num + _TOKENS, 100_278).astype(np.int32)
    names = (str(number) for number in count())
    with tempfile.TemporaryDirectory() as folder:

        def store() -> None:
            directory = Path(folder) / next(names)
            directory.mkdir()
            payloads = PayloadStore(directory)
            for start in range(num):  # no two are alike
                payloads.add(text[start : start + _TOKENS])
            payloads.close()
            assert (directory / "payloads.bin").stat().st_size == 4 * _TOKENS * num

        def write() -> None:
            with open(Path(folder) / next(names), "wb", buffering=1 << 20) as file:
                for start in range(num):
                    file.write(text[start : start + _TOKENS].data)
                file.flush()
                os.fsync(file.fileno())

        storing, writing = interleaved(store, write, options.pairs)
    megabytes = 4 * _TOKENS * num / 1e6
    show(
        "payload-store",
        megabytes=round(megabytes),
        store_mb_per_second=spread([megabytes / value for value in storing], 0),
        plain_mb_per_second=spread([megabytes / value for value in writing], 0),
        over_plain_writing=ratios(storing, writing),
    )


if __name__ == "__main__":
    main()
