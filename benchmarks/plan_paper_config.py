"""`plan` on examples/paper.yaml without its corpus: a stand-in of 215B tokens whose files are sparse.

Usage: python benchmarks/plan_paper_config.py [--config FILE] [--folder DIR]

Prints the tables of `plan`, then one JSON line: seconds and peak memory of the command. What needs a reference model waits. The tokenizer
is a byte-pair encoding of 32,768 entries trained on Python's standard library; with the real one (100,278) generated texts have about as
many tokens.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from megatron_exp.cli.quickstart import standard_library
from megatron_exp.preparation.bpe import train_bpe
from megatron_exp.preparation.texts import texts_of
from megatron_exp.shards.corpus import SCHEMA_VERSION, TOKENIZER_FOLDER, logical_fingerprint, write_record
from megatron_exp.shards.tokenizer import Tokenizer

SHARES = {
    "dclm": 0.951,
    "starcoder": 0.0213,
    "pes2o": 0.0151,
    "arxiv": 0.0053,
    "open-web-math": 0.0031,
    "algebraic-stack": 0.003,
    "wiki": 0.001,
}
"""Parts of OLMo-mix-1124."""
NUM_TOKENS = 215_000_000_000
_SHARD_TOKENS = (8 << 30) // 4
_VOCABULARY = 32_768


def stand_in(folder: Path, tokenizer: Path, num_tokens: int = NUM_TOKENS) -> Path:
    """A corpus directory with the right sizes and no content; `plan` opens it, `verify` refuses it."""
    loaded = Tokenizer.load(tokenizer)
    loaded.save_copy(folder / TOKENIZER_FOLDER)
    shards = []
    for source, share in SHARES.items():
        left = int(share * num_tokens)
        while left > 0:
            size = min(left, _SHARD_TOKENS)
            name = f"shard-{len(shards):05d}"
            with open(folder / f"{name}.bin", "wb") as file:
                file.truncate(4 * size)
            files = {suffix: {"bytes": 4 * size, "root": "0" * 32} for suffix in ("bin", "idx", "docs.parquet")}
            shards.append({"name": name, "source": source, "num_tokens": size, "num_documents": max(1, size // 1000), "files": files})
            left -= size
    about = {"fingerprint": loaded.fingerprint, "vocabulary_size": loaded.vocabulary_size, "eos_id": loaded.eos_id}
    record = {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": logical_fingerprint(about, shards),
        "tokenizer": about,
        "dtype": np.dtype(np.int32).name,
    }
    write_record(folder, record | {"shards": shards, "package_version": "stand-in"})
    return folder


def main() -> None:
    """Plan and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", type=Path, default=Path(__file__).parent.parent / "examples" / "paper.yaml")
    parser.add_argument("--folder", type=Path, help="where the manifest goes; default: a temporary folder")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    train_bpe(texts_of([str(path) for path in standard_library()]), _VOCABULARY, folder / "tokenizer.json")
    (folder / "corpus").mkdir()
    corpus = stand_in(folder / "corpus", folder / "tokenizer.json")
    arguments = ["plan", str(options.config), "--out", str(folder / "manifest"), "--set", f"corpus.path={corpus}"]
    started = time.perf_counter()
    code = subprocess.run([sys.executable, "-m", "megatron_exp", *arguments], check=False).returncode
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    result = {"benchmark": "plan_paper_config", "exit": code, "seconds": round(time.perf_counter() - started), "peak_mib": peak}
    print(json.dumps(result | {"load_before": round(os.getloadavg()[0], 2)}))
    if options.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
