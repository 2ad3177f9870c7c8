"""The index that a stock Megatron trainer finds in its cache: it makes GPTDataset read document k as sample k.

megatron-core 0.16.1 describes a dataset by a JSON text (class, path, number of samples, seed, split, tokenizer) and looks in its cache for
`<md5 of the text>-GPTDataset-train-{description.txt,document_index.npy,sample_index.npy,shuffle_index.npy}`. Documents have S + 1 tokens. Sample 2k
of `sample_index` goes from token 0 of document k to its token S, which the dataset counts inclusively; the odd ones lie between two documents and are
never asked for, because `shuffle_index` is 0, 2, 4, ....
"""

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_exp.errors import UserError
from megatron_exp.files import durable_file, require_file, write_file

_CLASS, _SPLIT = "GPTDataset", "train"
_PIECE = 1 << 20


def null_tokenizer(vocabulary_size: int) -> dict[str, Any]:
    """What megatron-core's `null` tokenizer, for text that is tokenised already, says of itself.

    `MegatronTokenizer.from_pretrained(metadata_path={"library": "null"}, vocab_size=vocabulary_size - 1)`; it adds one id by itself.
    """
    return {
        "class": "megatron.core.tokenizers.text.models.default_tokenizer.DefaultTokenizerText",
        "tokenizer_path": None,
        "vocab_size": str(vocabulary_size - 1),
    }


def describe(prefix: Path, num_slots: int, sequence_length: int, tokenizer: dict[str, Any], seed: int) -> str:
    """The description of PREFIX as the only path of the train split (`blend_per_split`, Megatron's --train-data-path)."""
    description = {
        "class": _CLASS,
        "dataset_path": str(prefix),
        "num_samples": num_slots,
        "index_split": _SPLIT,
        "random_seed": seed,
        "sequence_length": sequence_length,
        "split": None,
        "split_matrix": None,
        "tokenizer": tokenizer,
    }
    return json.dumps(description, indent=4)  # byte for byte as Megatron does it: the file's name is a digest of this text


def read_description(path: Path, prefix: Path, num_slots: int, sequence_length: int) -> str:
    """A description that a trainer wrote; UserError where it is not one of these slots, all of them for training."""
    text = require_file(path, "a description that Megatron wrote into its index cache").read_text(encoding="utf-8")
    try:
        found = json.loads(text)
        matrix, num_samples = found["split_matrix"], found["num_samples"]
        wrong = {
            "class": found["class"] != _CLASS,
            "index_split": found["index_split"] != _SPLIT,
            "sequence_length": found["sequence_length"] != sequence_length,
            "num_samples": num_samples is None or num_samples > num_slots,
            "dataset_path": Path(found["dataset_path"]).absolute() != prefix,
            "split_matrix": matrix is not None and matrix[0] != [0.0, 1.0],
        }
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not the description of a Megatron dataset ({error!r}). Give the file ...-{_CLASS}-{_SPLIT}-description.txt of the trainer's cache."
        ) from error
    name = next((name for name, bad in wrong.items() if bad), None)
    if name:
        raise UserError(
            f"{path} describes another dataset: its {name} is {found[name]!r}. Expected are class {_CLASS}, all of it in the split {_SPLIT}, "
            f"sequence_length {sequence_length}, at most {num_slots} samples, and the path {prefix}."
        )
    return text


def write_stock_index(cache: Path, description: str, num_slots: int, sequence_length: int) -> None:
    """Write the four files; the description, without which the others are not found, comes last."""
    digest = hashlib.md5(description.encode("utf-8"), usedforsecurity=False).hexdigest()
    stem = f"{digest}-{_CLASS}-{_SPLIT}"
    cache.mkdir(parents=True, exist_ok=True)

    def sample_rows(slots: np.ndarray) -> np.ndarray:
        begin = np.stack([slots, np.zeros_like(slots)], axis=1)
        end = np.stack([slots, np.full_like(slots, sequence_length)], axis=1)
        return np.stack([begin, end], axis=1).reshape(-1, 2)

    _write_rows(cache / f"{stem}-document_index.npy", (num_slots,), np.dtype("<i4"), lambda slots: slots)
    _write_rows(cache / f"{stem}-sample_index.npy", (2 * num_slots, 2), np.dtype("<i4"), sample_rows)
    _write_rows(cache / f"{stem}-shuffle_index.npy", (num_slots,), np.dtype("<u4"), lambda slots: 2 * slots)
    write_file(cache / f"{stem}-description.txt", description.encode("utf-8"))


def _write_rows(path: Path, shape: tuple[int, ...], dtype: np.dtype, rows_of: Callable[[np.ndarray], np.ndarray]) -> None:
    """Write a .npy file in pieces; `rows_of` makes the rows of some slots (int64)."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape})
    num_slots = shape[0] if len(shape) == 1 else shape[0] // 2
    with durable_file(path) as writer:
        writer.write(header.getvalue())
        for start in range(0, num_slots, _PIECE):
            slots = np.arange(start, min(start + _PIECE, num_slots), dtype=np.int64)
            writer.write(np.ascontiguousarray(rows_of(slots), dtype=dtype).tobytes())
