"""Which files are read, in which order, as what, and how they become units of work. Nothing here depends on workers."""

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

from megatron_exp import fingerprint
from megatron_exp.errors import UserError
from megatron_exp.preparation.input_paths import files_below, is_directory, matching, refuse_undecodable_name
from megatron_exp.preparation.preprocess_bytes import Codec, codec_of, first_bytes

Format = Literal["jsonl", "parquet", "text"]

UNIT_VERSION = 1
"""Part of every unit's key: raise it when the tokens or the document map of a unit change meaning."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
_CODEC_SUFFIXES = (".gz", ".zst", ".zstd")
_PEEK_BYTES = 1 << 20
_PEEK_LINES = 20
_BOM = b"\xef\xbb\xbf"
_BEGINS_JSON = re.compile(rb"""\s*(\{\s*(["'}]|$)|\[\s*(["'{\]]|$))""")

# Text files are often small and many (a source tree). Neighbours of one source share a unit, so that a unit's fixed cost (two
# files made durable) is paid once per group. The grouping follows from the order and sizes of the files alone.
_SMALL_TEXT_BYTES = 8 << 20
_GROUP_BYTES = 64 << 20
_GROUP_FILES = 10_000


class StoredFile(Protocol):
    """A file as it was found. modified_ns is only used to notice that it has not been touched since it was read."""

    @property
    def path(self) -> str: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def modified_ns(self) -> int: ...


@dataclass(frozen=True)
class InputFile:
    """One input file (a `StoredFile`)."""

    path: str
    source: str
    format: Format
    codec: Codec
    num_bytes: int
    modified_ns: int


@dataclass(frozen=True)
class Unit:
    """Input files that are tokenised together: one file, or neighbouring small text files of one source.

    key: names the unit's files; it covers the paths, how they are read, the tokenizer and the policy for special strings.
    """

    key: str
    source: str
    files: tuple[InputFile, ...]

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)


def find_inputs(inputs: Sequence[str]) -> list[InputFile]:
    """The files that the inputs name, in the order given; a glob or directory gives its files in the order of their paths.

    An input is a file, a directory (all files below it, without hidden ones and `__pycache__`) or a glob (with `**` for files at any depth),
    each with an optional `NAME=` before it that names the source. Otherwise a file's source is its parent directory's name. What one input
    matches in several ways is read once.

    Raises:
        UserError: An input matches nothing, something in it cannot be read, two inputs name one file, or its codec is not supported.
    """
    if not inputs:
        raise UserError("No input was given. Name at least one file, directory or glob of JSON lines, Parquet or text.")
    files: list[InputFile] = []
    seen: dict[Path, str] = {}
    for item in inputs:
        for path, resolved, source in _matches(item):
            if resolved in seen:
                raise UserError(
                    f"{path} is named twice, by {seen[resolved]!r} and by {item!r}. Its documents would be in the corpus twice: name it once."
                )
            seen[resolved] = item
            files.append(_describe(path, source))
    return files


def _matches(item: str) -> Iterator[tuple[Path, Path, str]]:
    """(path, the same without links, source) of the files of an input, each file once."""
    named, pattern = split_source(item)
    paths = [Path(pattern)] if os.path.exists(pattern) else matching(pattern)
    found: dict[Path, Path] = {}
    for path in (file for match in paths for file in (files_below(match) if is_directory(match) else [match])):
        found.setdefault(path.resolve(), path)
    if not found:
        raise UserError(
            f"The input {item!r} matches no file. Check the path; a glob must be quoted so that the shell passes it on, and with `**` it stands for files only."
        )
    for resolved, path in found.items():
        yield path, resolved, named or source_of(path)


def split_source(item: str) -> tuple[str | None, str]:
    """The name before the `=` of an input, if it has one, and the rest; UserError where the rest is empty."""
    name, sign, pattern = item.partition("=")
    named = bool(sign) and not os.path.exists(item) and _NAME.fullmatch(name) is not None
    if not (pattern if named else item):
        raise UserError(
            f"The input {item!r} names no path, and an empty one would mean the current directory. Perhaps a variable of the shell is not set: "
            "give the path, or `.` for the current directory."
        )
    return (name, pattern) if named else (None, item)


def source_of(path: Path) -> str:
    """The source of a file whose input names none: its directory's name, other characters as `-`."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", path.absolute().parent.name).lstrip("._-")[:64] or "source"


def _describe(path: Path, source: str) -> InputFile:
    if not path.is_file():
        raise UserError(f"{path} is not a regular file. Name files, directories or globs of files.")
    refuse_undecodable_name(path)
    try:
        status = path.stat()
        codec, head = codec_of(path)
        shape: Format = "parquet" if head[:4] == b"PAR1" else _text_shape(path, codec)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). Make it readable, or name inputs without it.") from error
    return InputFile(str(path), source, shape, codec, status.st_size, status.st_mtime_ns)


def _text_shape(path: Path, codec: Codec) -> Format:
    """JSON lines by name, or where the first lines say so; a JSON-lines file must never pass as one long text.

    The first line alone decides nothing: it may be the one that is odd.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in _CODEC_SUFFIXES:
        suffixes.pop()
    name = suffixes[-1] if suffixes else ""
    if name in _JSON_SUFFIXES:
        return "jsonl"
    head = first_bytes(path, codec, _PEEK_BYTES)
    every_line = head.removeprefix(_BOM).split(b"\n")
    last = every_line[-1] if len(head) >= _PEEK_BYTES else None
    lines = list(islice((line for line in every_line if line and not line.isspace()), _PEEK_LINES))
    found = [_json_of(line, cut=line is last) for line in lines]
    num_objects = sum(isinstance(value, dict) for value in found)
    if num_objects and (lines[0].lstrip()[:1] in (b"{", b"[") or 2 * num_objects >= len(lines)):
        return "jsonl"
    # Prose, source code and wiki markup begin with a bracket too, and may quote an object; what remains could be either.
    if (
        name != ".txt"
        and lines
        and (_BEGINS_JSON.match(lines[0]) or found[0] is not None or any(isinstance(value, dict) and "text" in value for value in found))
    ):
        raise UserError(
            f"{path} could be JSON lines or one plain text: it looks like JSON, but not as JSON lines do. Give it a name that ends in .jsonl if every line "
            "is a document, or in .txt if the whole file is one."
        )
    return "text"


def _json_of(line: bytes, *, cut: bool) -> dict[str, Any] | list[Any] | None:
    """The object or list that a line holds, read as leniently as Python does. cut: more of it follows, so how it begins must do."""
    if cut:
        return {} if re.match(rb'\s*\{\s*"', line) else None
    if line.lstrip()[:1] not in (b"{", b"["):
        return None
    try:
        value = json.loads(line.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, (dict, list)) else None


def make_units(files: Iterable[InputFile], tokenizer_fingerprint: str, special_in_text: str) -> list[Unit]:
    """The units of work, in input order."""
    groups: list[list[InputFile]] = []
    for file in files:
        if groups and _joins(groups[-1], file):
            groups[-1].append(file)
        else:
            groups.append([file])
    return [_unit(tuple(group), tokenizer_fingerprint, special_in_text) for group in groups]


def _joins(group: list[InputFile], file: InputFile) -> bool:
    if not all(_is_small_text(member) for member in (group[0], file)) or group[0].source != file.source:
        return False
    return len(group) < _GROUP_FILES and sum(member.num_bytes for member in group) + file.num_bytes <= _GROUP_BYTES


def _is_small_text(file: InputFile) -> bool:
    return file.format == "text" and file.num_bytes <= _SMALL_TEXT_BYTES


def _unit(files: tuple[InputFile, ...], tokenizer_fingerprint: str, special_in_text: str) -> Unit:
    reading = [[file.path, file.format, file.codec] for file in files]
    key = fingerprint.of_json([UNIT_VERSION, tokenizer_fingerprint, special_in_text, files[0].source, reading])
    return Unit(key, files[0].source, files)
