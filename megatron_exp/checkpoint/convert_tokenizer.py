"""The tokenizer that goes with converted weights."""

import shutil
from pathlib import Path

import orjson

from megatron_exp import files
from megatron_exp.errors import UserError
from megatron_exp.run_record import RECORD_NAME, RunRecord
from megatron_exp.shards.corpus import Corpus
from megatron_exp.shards.tokenizer import Tokenizer

CARRIED = "tokenizer"
"""Folder of a checkpoint made from a Hugging Face model that holds the model's tokenizer files as they were."""
_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def copy_files(source: Path, target: Path) -> list[str]:
    """Copy the files of a tokenizer that SOURCE has, byte for byte; returns their names."""
    found = [name for name in _FILES if (source / name).is_file()]
    if found:
        target.mkdir(exist_ok=True)
    for name in found:
        shutil.copyfile(source / name, target / name)
    return found


def is_in(directory: Path) -> bool:
    """Whether a directory holds a tokenizer that `Tokenizer.load` could read."""
    return any((directory / name).is_file() for name in _FILES[:2])


def tokenizer_of(checkpoint: Path, given: Path | None) -> Tokenizer | None:
    """The tokenizer GIVEN, else that of the corpus on which the run of RUN/checkpoints/step-... was trained.

    None where the checkpoint brought files of its own along, and where run or corpus are not there any more.
    """
    if given:
        return Tokenizer.load(given)
    run = checkpoint.resolve().parent.parent
    if (checkpoint / CARRIED).is_dir() or not (run / RECORD_NAME).is_file():
        return None
    corpus = Path(RunRecord.open(run).record["corpus"]["path"])
    return Corpus.open(corpus).tokenizer() if corpus.is_dir() else None


def write_for_transformers(tokenizer: Tokenizer, directory: Path) -> None:
    """Write a tokenizer so that transformers reads it as it is.

    Without a class it would be built anew from its vocabulary by the class that usually goes with the architecture, with that class's
    rules for cutting a text into words.
    """
    tokenizer.save_copy(directory)
    path = directory / "tokenizer_config.json"
    if path.is_file():
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **orjson.loads(path.read_bytes())}
        files.write_file(path, orjson.dumps(config, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def check_fits(tokenizer: Tokenizer, vocabulary_size: int) -> None:
    """UserError where the tokenizer has ids for which the model has no row."""
    if tokenizer.vocabulary_size > vocabulary_size:
        raise UserError(
            f"The tokenizer has {tokenizer.vocabulary_size} ids, and the model has embeddings for {vocabulary_size}: it is the tokenizer of another model. "
            "Give the one the model was trained with (--tokenizer)."
        )
