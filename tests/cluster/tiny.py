"""A whole run, tiny, as the files a user would write: text, config and cluster profile."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import yaml

from megatron_exp.preparation.bpe import train_bpe
from tests.training.toy import EXPERIMENTS, make_config, write_texts

ROOT = Path(__file__).parents[2]
MINUTES = "0:20:00"
CANARIES, _, WATERMARKS = EXPERIMENTS
CHOSEN_BY_THE_TWIN = CANARIES | {"name": "chosen-canaries", "suffix_types": ["model-based"]}


def write_inputs(
    directory: Path, *, steps: int, checkpoint_every: int, experiments: Sequence[dict[str, Any]] = (CANARIES,), **profile: object
) -> tuple[Path, Path]:
    """config.yaml and cluster.yaml with the text and the tokenizer they name; `profile` replaces keys of the profile."""
    directory.mkdir(parents=True, exist_ok=True)
    texts = write_texts(directory / "texts.jsonl")
    train_bpe([orjson.loads(line)["text"] for line in texts.read_bytes().splitlines()], 320, directory / "tokenizer.json")
    training = {
        "micro_batch_size": 2,
        "schedule": {"peak_lr": 1e-2, "warmup_steps": 3},
        "checkpoint": {"every": checkpoint_every},
        "validation": {"every": steps, "slots": 4},
    }
    config = make_config(Path("corpus"), steps=steps, training=training, experiments=list(experiments)).model_dump(mode="json")
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    cluster = {
        "partition": "main",
        "time": MINUTES,
        "nodes": 2,
        "cpus_per_node": 1,
        "python": sys.executable,
        "signal_seconds": 30,
        "environment": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        "preprocess": {"inputs": ["toy=texts.jsonl"], "tokenizer": "tokenizer.json", "tasks": 2},
        **profile,
    }
    (directory / "cluster.yaml").write_text(yaml.safe_dump(cluster))
    return directory / "config.yaml", directory / "cluster.yaml"
