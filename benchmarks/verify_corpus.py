"""Verifying a corpus, beside plainly reading the same bytes in the same run.

Usage: python benchmarks/verify_corpus.py [--megabytes N] [--pairs P] [--corpus CORPUS]

Goal: at least 80% of the speed of reading. Both read from the operating system's cache, where reading is fastest and the goal hardest; from a disk
both wait for it.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from measuring import interleaved, ratios, show, spread

from megatron_exp.preparation.bpe import train_bpe
from megatron_exp.preparation.import_shards import import_shards
from megatron_exp.seeding import Words
from megatron_exp.shards.corpus import Corpus
from megatron_exp.shards.indexed import IndexedWriter

_VOCABULARY, _DOCUMENT_TOKENS = 320, 500
_BLOCK_BYTES = 1 << 20


def make_corpus(directory: Path, megabytes: int) -> Corpus:
    """Documents of 500 drawn ids in one shard, imported."""
    tokenizer = train_bpe([Path(__file__).read_text(encoding="utf-8")], _VOCABULARY, directory / "tokenizer.json")
    (directory / "in").mkdir()
    per_piece = 10_000
    drawn = 1 + Words.of(0, "benchmark", "verify").integers(per_piece * _DOCUMENT_TOKENS, _VOCABULARY - 1).astype(np.uint16)
    drawn[_DOCUMENT_TOKENS - 1 :: _DOCUMENT_TOKENS] = 0  # the EOS
    with IndexedWriter(directory / "in" / "made.bin", directory / "in" / "made.idx", np.dtype("<u2")) as writer:
        for _ in range(max(megabytes * 1_000_000 // drawn.nbytes, 1)):
            writer.add_stored(drawn.data)
            writer.add_lengths(np.full(per_piece, _DOCUMENT_TOKENS))
    return import_shards([str(directory / "in")], tokenizer, directory / "corpus")


def read_plainly(paths: list[Path]) -> None:
    """Every byte, in order, into one buffer."""
    buffer = bytearray(_BLOCK_BYTES)
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=2000)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--corpus", type=Path, help="an existing corpus instead")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        corpus = Corpus.open(options.corpus) if options.corpus else make_corpus(Path(folder), options.megabytes)
        paths = [path for path in corpus.path.rglob("*") if path.is_file()]

        def verify() -> None:
            found = list(corpus.verify())
            if found:
                raise SystemExit(found[0])

        read_plainly(paths), verify()
        reading, verifying = interleaved(lambda: read_plainly(paths), verify, options.pairs)
        megabytes = sum(path.stat().st_size for path in paths) / 1e6
    show(
        "verify-corpus",
        megabytes=round(megabytes),
        verify_mb_per_second=spread([megabytes / value for value in verifying], 0),
        reading_mb_per_second=spread([megabytes / value for value in reading], 0),
        share_of_reading_speed=ratios(reading, verifying),
        goal_share=0.8,
    )


if __name__ == "__main__":
    main()
