"""Weights of a Hugging Face directory: safetensors files, one or several with an index, read and written tensor by tensor."""

import contextlib
import itertools
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_exp import files
from megatron_exp.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_NAMED = 5
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


class WeightFiles:
    """The tensors of a model directory by name. Files are mapped, so a tensor takes memory only when it is read."""

    def __init__(self, directory: Path, stack: contextlib.ExitStack):
        """Open the files, which `stack` closes; UserError where one is missing, damaged or not what the index says."""
        self._directory = Path(directory)
        promised = _promised(self._directory)
        paths = {name: files.require_file(self._directory / _plain(name), "weights named in the index") for name in promised}
        self._files: dict[str, Any] = {}
        for name, path in paths.items():
            opened = stack.enter_context(_opened(path))
            held = set(opened.keys())
            expected = promised[name] or held
            if held != expected:
                raise UserError(
                    f"{path} and {self._directory / INDEX} disagree about {_named(held ^ expected)}. One of them is of another model: copy it again."
                )
            self._files |= dict.fromkeys(held, opened)

    def check(self, sizes: Mapping[str, tuple[int, ...]]) -> None:
        """UserError naming what is missing, what nobody asked for, or what has another size than in `sizes`."""
        missing, unexpected = sizes.keys() - self._files.keys(), self._files.keys() - sizes.keys()
        faults = [f"{what}: {_named(names)}" for what, names in (("missing", missing), ("unexpected", unexpected)) if names]
        for name in sorted(sizes.keys() & self._files.keys()):
            found = tuple(self._files[name].get_slice(name).get_shape())
            if found != sizes[name]:
                faults.append(f"{name} has the size {list(found)}, and config.json asks for {list(sizes[name])}")
        if faults:
            raise UserError(
                f"The weights in {self._directory} are not those of the model that its config.json describes. {'; '.join(faults[:_MAX_NAMED])}. "
                "Nothing is converted in part: copy the whole model again."
            )

    @property
    def dtypes(self) -> set[str]:
        """Names of the types that occur, as PyTorch calls them."""
        found = {opened.get_slice(name).get_dtype() for name, opened in self._files.items()}
        return {str(_DTYPES.get(name, name)).removeprefix("torch.") for name in found}

    def read(self, name: str) -> torch.Tensor:
        return self._files[name].get_tensor(name)


def _promised(directory: Path) -> dict[str, set[str] | None]:
    """File names and the tensors the index promises in each; None for a file without index."""
    if (directory / INDEX).is_file():
        return _read_index(directory / INDEX)
    if (directory / SINGLE).is_file():
        return {SINGLE: None}
    if any(directory.glob("*.bin")):
        raise UserError(
            f"{directory} has its weights in .bin files, which are pickles: reading one runs whatever code it contains. They are not read. "
            "Convert the model to safetensors where you trust it (`save_pretrained` of transformers does), or take a copy that has them."
        )
    raise UserError(f"{directory} has neither {SINGLE} nor {INDEX}. Give the directory of a Hugging Face model with safetensors weights.")


def _read_index(path: Path) -> dict[str, set[str] | None]:
    try:
        places = orjson.loads(path.read_bytes())["weight_map"]
        pairs = sorted((str(file), tensor) for tensor, file in places.items())
        return {file: {tensor for _, tensor in group} for file, group in itertools.groupby(pairs, key=lambda pair: pair[0])}
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is no index of safetensors files: it has no readable `weight_map`. It is damaged: copy the model again."
        ) from error


def _plain(name: str) -> str:
    """NAME where it names a file of the directory itself; a link there may lead elsewhere, as all do in the hub's cache."""
    if Path(name).name != name:
        raise UserError(
            f"The file name {name!r} in {INDEX} leads out of its directory. The index is damaged or hostile: do not use this model."
        )
    return name


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise UserError(f"{path} is not a readable safetensors file ({error}). It is damaged or cut short: copy it again.") from error


def _named(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - _MAX_NAMED} more" if len(ordered) > _MAX_NAMED else ""
    return ", ".join(ordered[:_MAX_NAMED]) + more


def write_weights(
    directory: Path,
    sizes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensors: Iterator[tuple[str, torch.Tensor]],
    shard_bytes: int,
) -> None:
    """Write tensors into one file, or into several of at most `shard_bytes` (or one tensor) with an index.

    Args:
        directory: exists.
        sizes: of every tensor, in the order in which `tensors` gives them.
        dtype: of every tensor.
        tensors: names and tensors; those of one file are held in memory at a time.
        shard_bytes: largest file.
    """
    num_bytes = {name: math.prod(size) * dtype.itemsize for name, size in sizes.items()}
    placed = _place(num_bytes, shard_bytes)
    for file, group in itertools.groupby(tensors, key=lambda pair: placed[pair[0]]):
        _save(dict(group), directory / file)
    if set(placed.values()) != {SINGLE}:
        index = {"metadata": {"total_size": sum(num_bytes.values())}, "weight_map": placed}
        files.write_file(directory / INDEX, orjson.dumps(index, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """One file; an error of the disk is raised as what it is, which the library puts into words."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def _place(num_bytes: Mapping[str, int], shard_bytes: int) -> dict[str, str]:
    """The file of every tensor: filled one after the other."""
    numbers, number, filled = {}, 0, 0
    for name, size in num_bytes.items():
        if filled and filled + size > shard_bytes:
            number, filled = number + 1, 0
        numbers[name], filled = number, filled + size
    if number == 0:
        return dict.fromkeys(num_bytes, SINGLE)
    return {name: f"model-{1 + one:05d}-of-{1 + number:05d}.safetensors" for name, one in numbers.items()}
