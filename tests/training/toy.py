"""A whole run, tiny: a corpus of made-up sentences, a manifest with three experiments, a model of 2 layers. Everything is real."""

from pathlib import Path
from typing import Any

import orjson

from megatron_exp.config.load import validate
from megatron_exp.config.schema import Config
from megatron_exp.preparation.bpe import train_bpe
from megatron_exp.preparation.plan import plan
from megatron_exp.preparation.preprocess import preprocess
from megatron_exp.seeding import Words

STEPS, BATCH, LENGTH = 12, 4, 32
_NUM_DOCUMENTS, _SENTENCES = 120, 12
_WORDS = """
    lamp river stone garden window paper silver morning winter bridge letter market forest candle sailor teacher music bottle ladder
    mountain the a of and under over with without near far old new small large runs falls sings waits opens closes breaks shines turns
""".split()


def write_texts(path: Path) -> Path:
    """A JSONL file of documents whose sentences are words drawn by key."""
    lines = []
    for document in range(_NUM_DOCUMENTS):
        drawn = Words.of(0, "toy", document).integers(8 * _SENTENCES, len(_WORDS))
        words = [_WORDS[index] for index in drawn]
        text = " ".join(" ".join(words[first : first + 8]).capitalize() + "." for first in range(0, len(words), 8))
        lines.append(orjson.dumps({"text": text, "id": str(document)}))
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def make_corpus(directory: Path) -> Path:
    """CORPUS with one shard of about 12,000 tokens; 320 ids."""
    texts = write_texts(directory / "texts.jsonl")
    return make_corpus_of(directory, [orjson.loads(line)["text"] for line in texts.read_bytes().splitlines()])


def make_corpus_of(directory: Path, documents: list[str]) -> Path:
    """CORPUS of these documents, with a tokenizer of up to 320 ids trained on them."""
    texts = directory / "texts.jsonl"
    texts.write_bytes(b"".join(orjson.dumps({"text": text, "id": str(number)}) + b"\n" for number, text in enumerate(documents)))
    tokenizer = train_bpe(documents, 320, directory / "tokenizer.json")
    preprocess([str(texts)], tokenizer, directory / "corpus", workers=1)
    return directory / "corpus"


def make_config(
    corpus: Path,
    *,
    steps: int = STEPS,
    training: dict[str, Any] | None = None,
    experiments: list[dict[str, Any]] | None = None,
    model: dict[str, Any] | None = None,
) -> Config:
    """12 steps of 4 slots of 32 tokens; canaries, a swapped batch with dense live probes, and watermarks."""
    return validate(
        {
            "name": "toy",
            "corpus": {"path": str(corpus)},
            "geometry": {"sequence_length": LENGTH, "global_batch_size": BATCH, "steps": steps},
            "pool": {"slots": 24},
            "model": model or {"preset": "tiny", "layers": 2, "hidden": 32, "heads": 2, "ffn": 64},
            "training": {
                "micro_batch_size": 2,
                "schedule": {"peak_lr": 1e-2, "warmup_steps": 3},
                "checkpoint": {"every": 4},
                "validation": {"every": 6, "slots": 4},
                **(training or {}),
            },
            "experiments": EXPERIMENTS if experiments is None else experiments,
        },
        "the toy config",
    )


EXPERIMENTS: list[dict[str, Any]] = [
    {
        "name": "canaries",
        "type": "memorization_patterns",
        "suffix_types": ["random"],
        "suffix_lengths": [4],
        "repetitions": [1, 2],
        "num_per_condition": 2,
        "num_held_out": 4,
        "min_tokens": 8,
        "max_tokens": 16,
        "num_length_strata": 1,
    },
    {"name": "forgetting", "type": "forgetting_curves", "num_batches": 1, "window": [0.4, 0.9], "offsets": [0, 1, 2, 4], "grid_points": 0},
    {"name": "watermarks", "type": "gaussian_watermarks", "fraction": 0.1, "evaluated": 2, "window": [0.5, 1.0]},
]


def make_manifest(directory: Path, name: str = "manifest", **changes: Any) -> Path:
    """MANIFEST below `directory`, with its corpus beside it (made where it is missing)."""
    corpus = directory / "corpus"
    if not corpus.exists():
        make_corpus(directory)
    plan(make_config(corpus, **changes), directory / name)
    return directory / name
