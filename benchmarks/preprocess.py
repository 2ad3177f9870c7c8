"""Preprocessing JSON lines to .bin/.idx, beside Megatron's preprocess_data.py and its gigatoken script, in the same run; same bytes out.

Usage: python benchmarks/preprocess.py [--megabytes N] [--tokenizer PATH] [--megatron PATH] [--pairs P] [--files F]

Goals: 30 times preprocess_data.py with 2 workers, 4 times the gigatoken script, at most 1.5 GiB per worker. The text is Python's standard library, repeated;
no two documents are alike. With `--megatron`, a checkout of Megatron-LM, its own scripts run; its wheel does not hold them, so otherwise equivalents of
them do: a pool of 2 processes with one call of megatron-core's tokenizer per document, and gigatoken on all strings of a file at once, both
written by megatron-core's IndexedDatasetBuilder.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import psutil
from measuring import as_installed, ratios, show, spread

_WORKERS = 2
_GOALS = {"preprocess_data": 30, "gigatoken_script": 4}


def make_text(path: Path, num_bytes: int, characters: int) -> None:
    """JSON lines of this size: pieces of the standard library's sources, each with its number in front so that caches of whole texts find nothing twice."""
    sources = [file.read_text("utf-8", "ignore") for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))]
    pieces = [source[start : start + characters] for source in sources for start in range(0, len(source), characters)]
    written = number = 0
    with open(path, "wb") as file:
        while written < num_bytes:
            line = (
                orjson.dumps(
                    {"id": f"text-{number}", "text": f"{number}\n{pieces[number % len(pieces)]}", "metadata": {"source": "stdlib"}}
                )
                + b"\n"
            )
            written += file.write(line)
            number += 1


def make_tokenizer(directory: Path, text: Path) -> Path:
    """A byte-level BPE of 4096 of the first 3 MB, where none is given."""
    from megatron_exp.preparation.bpe import train_bpe

    with open(text, "rb") as file:
        lines = file.read(3_000_000).splitlines()[:-1]
    return train_bpe((orjson.loads(line)["text"] for line in lines), 4096, directory / "tokenizer.json")


# The peers, each in its own process: `python preprocess.py --peer NAME INPUT... TOKENIZER PREFIX`.


def _ids_of_line(line: bytes) -> list[int]:
    ids = _state["tokenizer"].tokenize(orjson.loads(line)["text"])
    return [*ids, _state["eos"]]


_state: dict[str, Any] = {}


def _load(tokenizer: str) -> None:
    from megatron_exp.shards.tokenizer import Tokenizer

    loaded = Tokenizer.load(Path(tokenizer))
    _state["eos"], _state["size"] = loaded.eos_id, loaded.vocabulary_size


def _load_megatron(tokenizer: str) -> None:
    from megatron.core.tokenizers import MegatronTokenizer

    _load(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        model = transformers_folder(Path(folder), tokenizer)
        library = {"library": "huggingface"}
        _state["tokenizer"] = MegatronTokenizer.from_pretrained(str(model), library, include_special_tokens=False)


def transformers_folder(folder: Path, tokenizer: str) -> Path:
    """A tokenizer file as a directory of transformers, which is what Megatron's tokenizer loads."""
    from megatron_exp.shards.tokenizer import Tokenizer

    model = folder / "transformers-tokenizer"
    model.mkdir()
    shutil.copy(tokenizer, model / "tokenizer.json")
    loaded = Tokenizer.load(Path(tokenizer))
    eos = next(string for string, number in loaded.special_strings.items() if number == loaded.eos_id)
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos}))
    return model


def peer_preprocess_data(inputs: list[str], tokenizer: str, prefix: str) -> None:
    """What tools/preprocess_data.py --append-eod does: a pool encodes line by line with megatron-core's tokenizer, the parent writes document by document."""
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    _load(tokenizer)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(_state["size"]))
    with multiprocessing.get_context("fork").Pool(_WORKERS, initializer=_load_megatron, initargs=(tokenizer,)) as pool:
        for path in inputs:
            with open(path, "rb") as file:
                for ids in pool.imap(_ids_of_line, file, 32):
                    builder.add_document(torch.IntTensor(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")


def peer_gigatoken_script(inputs: list[str], tokenizer: str, prefix: str) -> None:
    """What its script with gigatoken does, without its loss of documents: all strings of a file in one batch, then document by document."""
    import gigatoken
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    _load(tokenizer)
    fast = gigatoken.Tokenizer.from_json(Path(tokenizer).read_bytes())
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(_state["size"]))
    for path in inputs:
        with open(path, "rb") as file:
            texts = [orjson.loads(line)["text"] for line in file]
        for ids in fast.encode_batch(texts):
            document = np.append(np.asarray(ids, dtype=np.int32), _state["eos"])
            builder.add_document(torch.from_numpy(document), [len(document)])
    builder.finalize(f"{prefix}.idx")


PEERS: dict[str, Callable[[list[str], str, str], None]] = {
    "preprocess_data": peer_preprocess_data,
    "gigatoken_script": peer_gigatoken_script,
}


def real_commands(megatron: Path, name: str, inputs: list[str], tokenizer: str, prefix: str) -> Iterator[list[str]]:
    """The calls of Megatron's own script, one for each input file (it takes one). Its tokenizer is a directory of transformers, made here."""
    folder = Path(f"{prefix}-tokenizer")
    folder.mkdir()
    model = transformers_folder(folder, tokenizer)
    script, own = {
        "preprocess_data": ("preprocess_data.py", ["--workers", str(_WORKERS)]),
        "gigatoken_script": ("preprocess_data_fast.py", ["--use-gigatoken"]),
    }[name]
    shared = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(model), "--tokenizer-hf-no-include-special-tokens", "--append-eod"]
    for number, path in enumerate(inputs):
        yield [sys.executable, str(megatron / "tools" / script), "--input", path, "--output-prefix", f"{prefix}-{number}", *shared, *own]


def run(command: list[str]) -> tuple[float, float]:
    """(seconds, largest resident memory of any one of its processes in MiB)."""
    with tempfile.TemporaryFile() as messages:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=messages, env=as_installed())
        watched, peak = psutil.Process(process.pid), 0
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                peak = max([peak, *(member.memory_info().rss for member in [watched, *watched.children(recursive=True)])])
            time.sleep(0.02)
        spent = time.perf_counter() - start
        if process.returncode:
            messages.seek(0)
            raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}:\n{messages.read().decode(errors='replace')}")
    return spent, peak / 2**20


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=120, help="of JSON lines; 1000 for the large case")
    parser.add_argument("--files", type=int, default=4, help="that these are spread over")
    parser.add_argument("--characters", type=int, default=4000, help="of each document; 20 for the case of tiny documents")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json; default: a BPE of 4096 trained on the spot")
    parser.add_argument("--megatron", type=Path, help="checkout of Megatron-LM, to run its own scripts")
    parser.add_argument("--only", choices=PEERS, help="this peer alone (the slow one takes minutes at 1 GB)")
    parser.add_argument("--peer", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        name, *inputs, tokenizer, prefix = options.peer
        PEERS[name](inputs, tokenizer, prefix)
        return
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), options, round(load, 2))


class Contest:
    """Ours and one peer, in turn over the same inputs."""

    def __init__(self, folder: Path, name: str, tokenizer: Path, megatron: Path | None):
        self.name = name
        self._folder, self._tokenizer, self._megatron = folder, tokenizer, megatron
        self._round = 0

    def once(self, inputs: list[Path]) -> tuple[tuple[float, float], tuple[float, float]]:
        """(seconds, MiB) of ours and of the peer; SystemExit where their tokens differ."""
        self._round += 1
        corpus, prefix = (self._folder / f"{who}-{self.name}-{self._round}" for who in ("ours", "theirs"))
        named = [part for path in inputs for part in ("--input", str(path))]
        ours = run(
            [sys.executable, "-m", "megatron_exp", "preprocess", *named, "--tokenizer", str(self._tokenizer), "--output", str(corpus)]
        )
        theirs = [run(command) for command in self._peer_commands([str(path) for path in inputs], str(prefix))]
        self._compare(corpus, prefix, len(inputs))
        return ours, (sum(spent for spent, _ in theirs), max(mib for _, mib in theirs))

    def _peer_commands(self, inputs: list[str], prefix: str) -> list[list[str]]:
        if self._megatron is None:
            return [[sys.executable, __file__, "--peer", self.name, *inputs, str(self._tokenizer), prefix]]
        return list(real_commands(self._megatron, self.name, inputs, str(self._tokenizer), prefix))

    def _compare(self, corpus: Path, prefix: Path, num_inputs: int) -> None:
        theirs = [f"{prefix}.bin"] if self._megatron is None else [f"{prefix}-{number}_text_document.bin" for number in range(num_inputs)]
        if b"".join(Path(path).read_bytes() for path in theirs) != (corpus / "shard-00000.bin").read_bytes():
            raise SystemExit(f"{corpus} and {prefix} hold different tokens")
        if self._megatron is None and Path(f"{prefix}.idx").read_bytes() != (corpus / "shard-00000.idx").read_bytes():
            raise SystemExit(f"{corpus} and {prefix} have different indexes")


def measure(folder: Path, options: argparse.Namespace, load: float) -> None:
    """Ours and each peer in turn, `pairs` times, and once with a single document, which is what starting costs."""
    inputs = [folder / "in" / f"part-{number}.jsonl" for number in range(options.files)]
    inputs[0].parent.mkdir()
    for path in inputs:
        make_text(path, options.megabytes * 1_000_000 // options.files, options.characters)
    single = folder / "single.jsonl"
    make_text(single, 1, options.characters)
    megabytes = sum(path.stat().st_size for path in inputs) / 1e6
    tokenizer = options.tokenizer or make_tokenizer(folder, inputs[0])
    contests = [Contest(folder, name, tokenizer, options.megatron) for name in ([options.only] if options.only else PEERS)]
    starts = [contest.once([single]) for contest in contests]
    rounds = [[contest.once(inputs) for contest in contests] for _ in range(options.pairs)]
    for number, contest in enumerate(contests):
        ours, theirs = zip(*(one[number] for one in rounds), strict=True)
        show(
            f"preprocess-against-{contest.name.replace('_', '-')}",
            peer="Megatron-LM's own script" if options.megatron else "an equivalent of Megatron-LM's script",
            megabytes=round(megabytes),
            ours_mb_per_second=spread([megabytes / spent for spent, _ in ours], 1),
            peer_mb_per_second=spread([megabytes / spent for spent, _ in theirs], 2),
            times_faster=ratios([spent for spent, _ in theirs], [spent for spent, _ in ours]),
            goal_times_faster=_GOALS[contest.name],
            start_seconds={"ours": round(starts[number][0][0], 1), "peer": round(starts[number][1][0], 1)},
            largest_process_mib={"ours": round(max(mib for _, mib in ours)), "peer": round(max(mib for _, mib in theirs))},
            goal_mib=1536,
            same_tokens=True,
            tokenizer=str(options.tokenizer or "BPE of 4096"),
            load_before=load,
        )


if __name__ == "__main__":
    main()
