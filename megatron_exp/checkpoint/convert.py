"""Checkpoints to and from directories of transformers' Olmo2ForCausalLM: exactly, tensor by tensor, in one process without a model."""

import contextlib
import functools
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import orjson
import torch

from megatron_exp import files
from megatron_exp.checkpoint import catalogue, convert_tokenizer
from megatron_exp.checkpoint.convert_config import CONFIG_NAME, OURS, TOKEN_IDS, config_of, read_config, shape_of
from megatron_exp.checkpoint.convert_names import Correspondence, correspondences, empty_states
from megatron_exp.checkpoint.convert_safetensors import WeightFiles, write_weights
from megatron_exp.checkpoint.state import content_metadata
from megatron_exp.checkpoint.stored import StoredTensors, write_tensors
from megatron_exp.errors import UserError
from megatron_exp.model.presets import ModelShape
from megatron_exp.shards.tokenizer import Tokenizer

Precision = Literal["fp32", "bf16"]

DEFAULT_SHARD_BYTES = 4 << 30
"""A file is written from memory: with this size a 7B model in fp32 is converted in less than 16 GB."""

_DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
_ALSO_READ = {"float16"}


class Converted(NamedTuple):
    """What was made of what. vocabulary_size: of the tokenizer, None where nothing says it."""

    source: Path
    target: Path
    shape: ModelShape
    precision: Precision
    vocabulary_size: int | None
    has_tokenizer: bool


def to_huggingface(
    source: Path,
    target: Path,
    *,
    precision: Precision | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    tokenizer: Path | None = None,
) -> Converted:
    """Write the weights of a checkpoint as a directory that transformers loads.

    Args:
        source: a checkpoint directory of any layout, or a run: its last checkpoint.
        target: the directory to make.
        precision: of the weights written; default as stored.
        shard_bytes: largest safetensors file; what is larger is divided, with an index.
        tokenizer: to be put beside the weights. Default: what the checkpoint brought along, else that of the run's corpus.

    Raises:
        UserError: where the checkpoint is damaged or holds other tensors than its record says, or the target exists.
    """
    files.refuse_existing(target)
    checkpoint = catalogue.find_checkpoint(source)
    catalogue.require_sound(checkpoint)
    record = catalogue.read_record(checkpoint)
    shape, extra = ModelShape(**record["shape"]), record["extra"]
    weights = list(correspondences(shape))
    stored = StoredTensors(checkpoint)
    _check_stored(checkpoint, stored.sizes, weights)
    chosen = precision or _common_precision({_name(stored.dtype(one.place.name)) for one in weights}, checkpoint)
    known = convert_tokenizer.tokenizer_of(checkpoint, tokenizer)
    if known:
        convert_tokenizer.check_fits(known, shape.vocabulary_size)
        extra = {**extra, "vocabulary_size": known.vocabulary_size, "token_ids": {"eos_token_id": known.eos_id}}
    with files.durable_directory(target) as partial:
        sizes = {name: size for one in weights for name, size in one.theirs.items()}
        write_weights(partial, sizes, _DTYPES[chosen], _their_tensors(stored, weights, _DTYPES[chosen]), shard_bytes)
        _write_config(partial / CONFIG_NAME, shape, chosen, extra)
        if known:
            convert_tokenizer.write_for_transformers(known, partial)
        else:
            convert_tokenizer.copy_files(checkpoint / convert_tokenizer.CARRIED, partial)
        has_tokenizer = convert_tokenizer.is_in(partial)
    return Converted(checkpoint, Path(target), shape, chosen, extra.get("vocabulary_size"), has_tokenizer)


def from_huggingface(source: Path, target: Path, *, precision: Precision | None = None) -> Converted:
    """Write the weights of an Olmo2ForCausalLM directory as a checkpoint without optimizer state, which loads at any layout.

    Args:
        source: a directory with config.json and safetensors weights.
        target: the checkpoint directory to make.
        precision: of the weights written; default as stored.

    Raises:
        UserError: where the model is of another architecture, its files do not hold exactly the tensors that config.json describes, or
            the target exists.
    """
    source = Path(source)
    files.refuse_existing(target)
    config = read_config(source)
    shape = shape_of(config, source)
    vocabulary_size = _true_vocabulary_size(source, config, shape)
    with contextlib.ExitStack() as stack:
        theirs = WeightFiles(source, stack)
        theirs.check({name: size for one in correspondences(shape) for name, size in one.theirs.items()})
        chosen = precision or _common_precision(theirs.dtypes, source)
        _require_convertible(theirs.dtypes, source)
        with files.durable_directory(target) as partial:
            _write_checkpoint_tensors(partial, theirs, shape, _DTYPES[chosen])
            convert_tokenizer.copy_files(source, partial / convert_tokenizer.CARRIED)
            extra = {
                "step": _recorded(config, "step") or 0,
                "identity": {},  # of no run, so none goes on from here
                "hooks": {},
                "vocabulary_size": vocabulary_size,
                "token_ids": {name: config.get(name) for name in TOKEN_IDS},
            }
            files.write_file(partial / catalogue.RECORD, catalogue.record_bytes(vars(shape), chosen, None, extra))
            names = sorted(str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file())
            catalogue.seal(partial, {name: files.sha256_file(partial / name) for name in names})
    has_tokenizer = convert_tokenizer.is_in(Path(target) / convert_tokenizer.CARRIED)
    return Converted(source, Path(target), shape, chosen, vocabulary_size, has_tokenizer)


def _their_tensors(stored: StoredTensors, weights: list[Correspondence], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    for one in weights:
        yield from one.split(stored.read(one.place).to(dtype)).items()


def _write_checkpoint_tensors(directory: Path, theirs: WeightFiles, shape: ModelShape, dtype: torch.dtype) -> None:
    def make(one: Correspondence) -> torch.Tensor:
        return one.join([theirs.read(name).to(dtype) for name in one.theirs])

    made_by = {one.place: functools.partial(make, one) for one in correspondences(shape)}
    write_tensors(directory, made_by, dtype, empty_states(shape), {"content_metadata": content_metadata()})


def _write_config(path: Path, shape: ModelShape, precision: Precision, extra: dict[str, Any]) -> None:
    ours = {"vocabulary_size": extra.get("vocabulary_size"), "step": extra.get("step")}
    config = config_of(shape, _name(_DTYPES[precision]), extra.get("token_ids", {}), ours)
    files.write_file(path, orjson.dumps(config, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def _true_vocabulary_size(source: Path, config: dict[str, Any], shape: ModelShape) -> int | None:
    """Ids of the tokenizer, which are fewer than the rows of the embedding where these were padded."""
    if not convert_tokenizer.is_in(source):
        return _recorded(config, "vocabulary_size")
    tokenizer = Tokenizer.load(source)
    convert_tokenizer.check_fits(tokenizer, shape.vocabulary_size)
    return tokenizer.vocabulary_size


def _recorded(config: dict[str, Any], name: str) -> int | None:
    """A number that `to_huggingface` left in config.json, None where another program wrote it."""
    ours = config.get(OURS)
    value = ours.get(name) if isinstance(ours, dict) else None
    return value if isinstance(value, int) else None


def _check_stored(checkpoint: Path, found: dict[str, torch.Size], weights: list[Correspondence]) -> None:
    expected = {one.place.name: one.place.stored_size for one in weights}
    actual = {name: size for name, size in found.items() if not name.startswith("optimizer.")}
    differing = sorted(name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name))
    if differing:
        raise UserError(
            f"{checkpoint} does not hold the model that its {catalogue.RECORD} describes: {', '.join(differing[:5])} is missing, unexpected or of "
            "another size. It is not converted."
        )


def _common_precision(names: Collection[str], where: Path) -> Precision:
    for precision, dtype in _DTYPES.items():
        if set(names) == {_name(dtype)}:
            return precision
    raise UserError(
        f"{where} holds weights as {', '.join(sorted(names))}, and a converted model has one type. Choose it with --dtype: fp32 keeps every value, bf16 rounds."
    )


def _require_convertible(names: Collection[str], where: Path) -> None:
    unknown = sorted(set(names) - _ALSO_READ - {_name(dtype) for dtype in _DTYPES.values()})
    if unknown:
        raise UserError(
            f"{where} holds weights as {', '.join(unknown)}, which are quantised or not weights at all. Take the model as it was trained."
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
