"""`inspect MANIFEST --step N`, whole process, on a manifest of five million rows and a corpus of the reference run's size.

Usage: python benchmarks/inspect_step.py [--copies N] [--batch B] [--steps S] [--pairs P]

Goal: 1 s. Beside it: a process that imports the same modules and looks at nothing, which no command can beat; and what has to be done without the overlay's
index, reading the slot column of insertions.parquet whole. The corpus is one sparse file: documents of 2,000 tokens in the index and map, zeros as tokens.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from measuring import as_installed, interleaved, ratios, seconds, show, spread

from megatron_exp.config.load import validate
from megatron_exp.preparation.bpe import train_bpe
from megatron_exp.preparation.plan import plan
from megatron_exp.shards import corpus as corpora
from megatron_exp.shards.documents import DocumentMapWriter
from megatron_exp.shards.indexed import write_index
from megatron_exp.shards.tokenizer import Tokenizer

_LENGTH, _SHARD_TOKENS, _DOCUMENT_TOKENS = 4096, 2 << 30, 2048
_ITEMS = 100
_IMPORTS = "import megatron_exp.cli.main, megatron_exp.inspection.slots, megatron_exp.inspection.render, megatron_exp.overlay.overlay"


def make_corpus(directory: Path, num_tokens: int) -> None:
    """Sparse shards of 8 GiB with index and document map, and a record. All shards share the files of the first, as hard links."""
    directory.mkdir()
    tokenizer = Tokenizer.load(train_bpe([Path(__file__).read_text("utf-8")], 400, directory.parent / "tokenizer.json"))
    tokenizer.save_copy(directory / corpora.TOKENIZER_FOLDER)
    per_shard = _SHARD_TOKENS // _DOCUMENT_TOKENS
    first = directory / "shard-00000"
    with open(f"{first}.bin", "wb") as file:
        file.truncate(4 * _SHARD_TOKENS)
    write_index(Path(f"{first}.idx"), np.full(per_shard, _DOCUMENT_TOKENS), np.dtype("<i4"))
    rows = DocumentMapWriter(Path(f"{first}.docs.parquet"))
    numbers = np.arange(per_shard)
    rows.add(pa.table({"file": pa.repeat("made.jsonl", per_shard), "line": numbers, "id": pa.array(numbers).cast(pa.string())}))
    rows.close()
    shards = []
    for number in range(-(-num_tokens // _SHARD_TOKENS)):
        name = f"shard-{number:05d}"
        for suffix in ("bin", "idx", "docs.parquet") if number else ():
            (directory / f"{name}.{suffix}").hardlink_to(f"{first}.{suffix}")
        files = {suffix: {"bytes": Path(f"{first}.{suffix}").stat().st_size, "root": "-"} for suffix in ("bin", "idx", "docs.parquet")}
        shards.append({"name": name, "source": "made", "num_tokens": _SHARD_TOKENS, "num_documents": per_shard, "files": files})
    about = {"fingerprint": tokenizer.fingerprint, "vocabulary_size": tokenizer.vocabulary_size, "eos_id": tokenizer.eos_id}
    corpora.write_record(
        directory,
        {
            "schema_version": corpora.SCHEMA_VERSION,
            "fingerprint": "made",
            "dtype": "int32",
            "tokenizer": about,
            "shards": shards,
            "ledger": {},
        },
    )


def make_manifest(directory: Path, options: argparse.Namespace) -> Path:
    """Texts of some 40 tokens, `copies` of each, placed by `plan` itself."""
    make_corpus(directory / "corpus", (options.steps + 1000) * options.batch * _LENGTH)
    texts = directory / "texts.jsonl"
    texts.write_bytes(
        b"".join(
            orjson.dumps({"id": number, "text": f"Text {number} of the benchmark, which has a few words."}) + b"\n"
            for number in range(2 * _ITEMS)
        )
    )
    experiment = {"name": "texts", "type": "texts", "file": str(texts), "copies": [0, options.copies], "metric": "loss", "licence": "none"}
    geometry = {"sequence_length": _LENGTH, "global_batch_size": options.batch, "steps": options.steps}
    config = {"name": "made", "corpus": {"path": str(directory / "corpus")}, "geometry": geometry, "experiments": [experiment]}
    return plan(validate(config, "benchmark"), directory / "manifest").path


def run(*command: str) -> None:
    """A process, its output taken and dropped."""
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL, env=as_installed())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--copies", type=int, default=50_000, help=f"of each of {_ITEMS} texts")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        manifest = make_manifest(Path(folder), options)
        command = ("-m", "megatron_exp", "inspect", str(manifest), "--step", str(options.steps // 2))
        run(*command)
        inspecting, importing = interleaved(lambda: run(*command), lambda: run("-c", _IMPORTS), options.pairs)
        table = manifest / "insertions.parquet"
        scanning = [
            seconds(lambda: np.flatnonzero(pq.read_table(table, columns=["slot"])["slot"].to_numpy() == 7)) for _ in range(options.pairs)
        ]
        rows = pq.read_metadata(table).num_rows
    show(
        "inspect-step",
        rows=rows,
        slots_of_the_step=options.batch,
        process_seconds=spread(inspecting, 2),
        goal_process_seconds=1,
        imports_alone_seconds=spread(importing, 2),
        over_imports_alone=ratios(inspecting, importing),
        reading_the_slot_column_seconds=spread(scanning, 2),
    )


if __name__ == "__main__":
    main()
