"""How long it takes to open the stream of a 3.9T-token corpus and to find its first and last slot. No index file is read or made.

Usage: python benchmarks/stream_start.py [--pairs P]

The corpus is a record alone (1,122 shards, no bytes): starting must not look at any. Goal: 1 s and 100 MB for the whole process, without
its imports 10 ms. The peer's way, one shuffled index of all instances, is timed on a thousandth of them.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import seconds, show, spread

_SHARDS, _TOKENS_PER_SHARD = 1_122, 3_476_000_000


def write_record(directory: Path) -> None:
    """A corpus.json like that of OLMo-mix-1124: 1,122 shards, 3.9T tokens."""
    from megatron_exp.shards.corpus import SCHEMA_VERSION, write_record

    shards = [
        {"name": f"shard-{i:05d}", "source": "dclm" if i < 945 else "rest", "num_tokens": _TOKENS_PER_SHARD, "num_documents": 1} for i in range(_SHARDS)
    ]
    tokenizer = {"vocabulary_size": 100_278, "eos_id": 100_257, "fingerprint": "none"}
    write_record(directory, {"schema_version": SCHEMA_VERSION, "fingerprint": "synthetic", "dtype": "int32", "tokenizer": tokenizer, "shards": shards})


def start(directory: Path) -> None:
    """What a trainer does first; prints seconds and peak memory of this process."""
    from megatron_exp.config.load import validate
    from megatron_exp.shards.corpus import Corpus
    from megatron_exp.stream.keyed import KeyedStream

    geometry = {"sequence_length": 4096, "global_batch_size": 512, "steps": 1_800_000}
    config = validate({"name": "x", "corpus": {"path": str(directory)}, "geometry": geometry, "pool": {"slots": 200_000}}, "benchmark")
    begin = time.perf_counter()
    stream = KeyedStream.open(config, Corpus.open(directory))
    stream.instance(0), stream.instance(stream.num_slots - 1)
    used = time.perf_counter() - begin
    print(json.dumps({"seconds": used, "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "slots": stream.num_slots}))


def shuffled_index(num: int) -> None:
    """What an order with an index does at its start."""
    import numpy as np

    np.random.Generator(np.random.PCG64(0)).shuffle(np.arange(num, dtype=np.uint32))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        start(options.child)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_record(Path(folder))
        whole, inside, memory, peer = [], [], [], []
        for _ in range(options.pairs):
            begin = time.perf_counter()
            output = subprocess.run([sys.executable, __file__, "--child", folder], capture_output=True, text=True, check=True).stdout
            whole.append(time.perf_counter() - begin)
            child = json.loads(output)
            inside.append(child["seconds"])
            memory.append(child["mib"])
            peer.append(1000 * seconds(lambda: shuffled_index(_SHARDS * _TOKENS_PER_SHARD // 4096 // 1000)))
    show(
        "stream-start",
        process_seconds=spread(whole),
        goal_process_seconds=1,
        open_seconds=spread(inside),
        process_mib=spread(memory, 0),
        goal_mib=100,
        shuffling_an_index_seconds=spread(peer, 1),
    )


if __name__ == "__main__":
    main()
