"""The largest process of `preprocess`, for one large input and for very many tiny documents, beside the equivalent of Megatron's script.

Usage: python benchmarks/preprocess_memory.py [--full] [--peer]

Goal: at most 1.5 GiB per worker whatever the input. By default a quarter of a size at which memory that grows with the input would show: 100 MB of
documents of 4,000 characters, and a million documents of 20. `--full`: 1 GB, and 10 million documents. `--peer` adds Megatron's way (slow).
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from measuring import show
from preprocess import PEERS, make_text, make_tokenizer, run

_CASES = {"large": (100_000_000, 4000, 10), "tiny": (90_000_000, 20, 10)}
"""Bytes of JSON lines, characters of a document, and how many times more `--full` takes. A line has some 70 bytes beside its text."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="1 GB, and 10 million documents")
    parser.add_argument("--peer", action="store_true", help="Megatron's script, or what does the same, beside it")
    options = parser.parse_args()
    for name, (num_bytes, characters, times) in _CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            text = Path(folder) / "in.jsonl"
            make_text(text, num_bytes * (times if options.full else 1), characters)
            tokenizer = make_tokenizer(Path(folder), text)
            load = os.getloadavg()[0]
            ours = [sys.executable, "-m", "megatron_exp", "preprocess", "--input", str(text), "--tokenizer", str(tokenizer)]
            spent, mib = run([*ours, "--output", str(Path(folder) / "corpus"), "--workers", "2"])
            peer = None
            if options.peer:
                script = str(Path(__file__).with_name("preprocess.py"))
                _, peer = run([sys.executable, script, "--peer", next(iter(PEERS)), str(text), str(tokenizer), str(Path(folder) / "theirs")])
            show(
                f"preprocess-memory-{name}",
                megabytes=round(text.stat().st_size / 1e6),
                documents=sum(1 for _ in open(text, "rb")),  # noqa: SIM115 - the process ends
                largest_process_mib=round(mib),
                goal_mib=1536,
                peer_largest_process_mib=peer and round(peer),
                mb_per_second=round(text.stat().st_size / 1e6 / spent, 1),
                load_before=round(load, 2),
            )


if __name__ == "__main__":
    main()
