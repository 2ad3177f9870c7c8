"""Which tokenised files are imported, in which order: pairs of tokens and index, of Megatron's or of the dolma toolkit's making."""

import os.path
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_exp.errors import UserError
from megatron_exp.files import require_file
from megatron_exp.preparation.input_paths import files_below, matching, refuse_undecodable_name
from megatron_exp.preparation.preprocess_inputs import source_of, split_source
from megatron_exp.shards.indexed import IndexedReader

Layout = Literal["megatron", "dolma"]
"""megatron: NAME.bin and NAME.idx. dolma: headerless uint32 in NAME.npy and NAME.csv.gz, as AI2 publishes its pre-tokenised data."""

_SUFFIXES: dict[str, Layout] = {".bin": "megatron", ".idx": "megatron", ".csv.gz": "dolma", ".npy": "dolma"}
_PAIRS: dict[Layout, tuple[str, str]] = {"megatron": (".bin", ".idx"), "dolma": (".npy", ".csv.gz")}
_OUR_SUMS = ".sums.npy"


@dataclass(frozen=True)
class TokenFile:
    """Tokens on disk and the index beside them. num_bytes, modified_ns, index_bytes, index_modified_ns: as they were found."""

    source: str
    layout: Layout
    data: Path
    index: Path
    num_bytes: int
    modified_ns: int
    index_bytes: int
    index_modified_ns: int

    @property
    def path(self) -> str:
        return str(self.data)

    @property
    def prefix(self) -> Path:
        """The path without its suffix, as Megatron names an indexed dataset."""
        return self.data.with_name(self.data.name.removesuffix(_PAIRS[self.layout][0]))

    def dtype(self) -> np.dtype:
        """How its tokens are stored; a uint32 id is the same four bytes as an int32 one."""
        return IndexedReader(self.prefix).dtype if self.layout == "megatron" else np.dtype("<i4")


def find_token_files(inputs: Sequence[str]) -> list[TokenFile]:
    """The pairs that the inputs name, in the order given; a glob or directory gives its own in the order of their paths.

    An input is a file of a pair, a prefix, a directory or a glob, each with an optional `NAME=` before it that names the source. Otherwise
    the source is the parent directory's name.

    Raises:
        UserError: An input matches nothing or something else, half of a pair is missing, or a pair is named twice.
    """
    if not inputs:
        raise UserError("No shard was given. Name at least one prefix, file, directory or glob of .bin/.idx or .npy/.csv.gz pairs.")
    found: list[TokenFile] = []
    seen: dict[Path, str] = {}
    for item in inputs:
        named, pattern = split_source(item)
        for data, index, layout in _pairs(item, pattern):
            refuse_undecodable_name(data)
            resolved = data.resolve()
            if resolved in seen:
                raise UserError(
                    f"{data} is named twice, by {seen[resolved]!r} and by {item!r}. Its documents would be in the corpus twice: name it once."
                )
            seen[resolved] = item
            status, index_status = data.stat(), index.stat()
            sizes = (status.st_size, status.st_mtime_ns, index_status.st_size, index_status.st_mtime_ns)
            found.append(TokenFile(named or source_of(data), layout, data, index, *sizes))
    return found


def _pairs(item: str, pattern: str) -> Iterator[tuple[Path, Path, Layout]]:
    """(tokens, index, layout) of one input, each pair once however many of its files match."""
    pairs: dict[Path, tuple[Path, Layout]] = {}
    for path in _matches(item, pattern):
        suffix = next((suffix for suffix in _SUFFIXES if path.name.endswith(suffix)), None)
        if suffix is None:
            raise UserError(
                f"{path}, matched by {item!r}, is neither .bin/.idx of an indexed dataset nor .npy/.csv.gz of a tokenised array. Narrow the glob."
            )
        layout = _SUFFIXES[suffix]
        data, index = (path.with_name(path.name.removesuffix(suffix) + wanted) for wanted in _PAIRS[layout])
        pairs[data] = (index, layout)
    for data, (index, layout) in pairs.items():
        yield require_file(data, f"the tokens of {index}"), require_file(index, f"the index of {data}"), layout


def _matches(item: str, pattern: str) -> list[Path]:
    path = Path(pattern)
    if os.path.isdir(path):
        paths = [file for file in files_below(path) if file.name.endswith(tuple(_SUFFIXES))]
    elif os.path.exists(path):
        paths = [path]
    else:
        # A prefix names two files and is none itself.
        paths = [file for file in (Path(f"{pattern}{suffix}") for suffix in _SUFFIXES) if os.path.lexists(file)]
        paths = paths or matching(pattern)
    paths = [path for path in paths if not path.name.endswith(_OUR_SUMS)]
    if not paths:
        raise UserError(
            f"The input {item!r} matches no .bin/.idx or .npy/.csv.gz pair. Check the path; a glob must be quoted so that the shell passes it on."
        )
    return paths
