"""The files that a directory or a glob stands for: all of them, or an error that names what cannot be read.

The usual shortcuts (`Path.rglob`, `glob.glob`) leave out directories that they may not read, and links that lead nowhere, without a word;
here that is data missing from a corpus.
"""

import fnmatch
import glob
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megatron_exp.errors import UserError

_ANY_DIRECTORIES = "**"


def files_below(directory: Path) -> list[Path]:
    """All files below a directory in the order of their paths, without hidden ones and `__pycache__`.

    Links are followed. A directory that has several paths is listed once, by one without a link where there is such a path.

    Raises:
        UserError: A directory cannot be listed, a link leads nowhere, or something is neither a file nor a directory.
    """
    return sorted((path for _, files in _walk(directory) for path in files), key=str)


def matching(pattern: str) -> list[Path]:
    """The paths that match a glob, in their order and each once; where it holds `**`, only files.

    As in a shell, a part that does not begin with a dot matches no hidden name. `**` stands for any number of directories, those that
    `files_below` goes through; at the end of the pattern, for the files in them.

    Raises:
        UserError: As for `files_below`.
    """
    parts = [part for part in pattern.split("/") if part]
    found = [Path("/" if pattern.startswith("/") else "")]
    for number, part in enumerate(parts, start=1):
        directories = [path for path in found if is_directory(path)]
        found = list(dict.fromkeys(match for path in directories for match in _matches(path, part, last=number == len(parts))))
    if _ANY_DIRECTORIES in parts:
        found = [path for path in found if not is_directory(path)]
    elif pattern.endswith("/"):
        found = [path for path in found if is_directory(path)]
    for path in found:
        _status(path)
    return sorted(found, key=str)


def is_directory(path: Path) -> bool:
    """Whether a path leads to a directory; UserError where it leads nowhere."""
    return stat.S_ISDIR(_status(path).st_mode)


def refuse_undecodable_name(path: Path) -> None:
    """UserError for a name that is not UTF-8, which ledger and document map cannot hold."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"The file name {os.fsencode(path)!r} is not UTF-8, so no record can hold it. Rename the file.") from error


def refuse_output_among(inputs: Iterable[str], files: Iterable[str | Path], output: Path, written: Iterable[str]) -> None:
    """UserError where an input takes in what a job writes, which would be read when the job is continued.

    Args:
        inputs: paths and globs, without names of sources.
        files: what they match now.
        output: the directory to be written.
        written: paths below it, such as a job writes.
    """
    target = output.resolve()
    for pattern in inputs:
        if any(_would_match(pattern, target / name) for name in written):
            raise UserError(
                f"The input {pattern!r} takes in {output}, the directory that is to be written: what is written there would become input when the job is "
                "continued. Give the corpus a directory of its own, outside the inputs."
            )
    for path in files:
        if Path(path).resolve().is_relative_to(target):
            raise UserError(f"{path} lies in the directory that is to be written. Give the corpus a directory of its own.")


def _would_match(pattern: str, path: Path) -> bool:
    """Whether an input would take in a file that need not exist; links are followed in the part of the pattern that is no glob."""
    if os.path.exists(pattern):
        parts = [glob.escape(part) for part in Path(pattern).resolve().parts]
    else:
        given = Path(pattern).absolute().parts
        fixed = next((number for number, part in enumerate(given) if glob.has_magic(part)), len(given))
        parts = [*(glob.escape(part) for part in Path(*given[:fixed]).resolve().parts), *given[fixed:]]
    if _ANY_DIRECTORIES in parts:
        return _fits(path.parts, parts)
    return any(_fits(path.parts[:end], parts) and _is_visible(path.parts[end:]) for end in range(1, len(path.parts) + 1))


def _fits(path: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a glob match the parts of a path, one by one."""
    if not pattern or not path:
        return not path and all(part == _ANY_DIRECTORIES for part in pattern)
    if pattern[0] == _ANY_DIRECTORIES:
        return _fits(path, pattern[1:]) or (_is_visible(path[:1]) and _fits(path[1:], pattern))
    shown = pattern[0].startswith(".") or not (glob.has_magic(pattern[0]) and path[0].startswith("."))
    return shown and fnmatch.fnmatchcase(path[0], pattern[0]) and _fits(path[1:], pattern[1:])


def _is_visible(parts: Iterable[str]) -> bool:
    return not any(part.startswith(".") or part == "__pycache__" for part in parts)


def _status(path: Path) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        what = "is a link that leads nowhere" if path.is_symlink() else "cannot be read"
        raise UserError(
            f"{path} {what} ({error.strerror}), so its documents would be missing from the corpus. Repair or remove it, or name inputs without it."
        ) from error


def _matches(directory: Path, part: str, *, last: bool) -> Iterator[Path]:
    """What one part of a glob matches in a directory; before the last part only directories lead on."""
    if part == _ANY_DIRECTORIES:
        yield from files_below(directory) if last else (folder for folder, _ in _walk(directory))
    elif glob.has_magic(part):
        names = [entry.name for entry in _entries(directory) if part.startswith(".") or not entry.name.startswith(".")]
        yield from (directory / name for name in fnmatch.filter(names, part) if last or is_directory(directory / name))
    elif os.path.lexists(directory / part):
        yield directory / part


def _walk(directory: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Every directory from this one down, with its files. Links come last and no directory twice, so that a circle of links ends."""
    seen: set[tuple[int, int]] = set()
    waiting, links = [directory], list[Path]()
    while waiting or links:
        folder = waiting.pop() if waiting else links.pop(0)
        status = _status(folder)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        files = []
        for entry in _entries(folder):
            path = folder / entry.name
            if not _is_visible([entry.name]):
                continue
            if entry.is_symlink() and is_directory(path):
                links.append(path)
            elif entry.is_dir():
                waiting.append(path)
            elif entry.is_file():
                files.append(path)
            else:
                raise UserError(
                    f"{path} is neither a file nor a directory, but a socket, pipe or device. Remove it, or name inputs without it."
                )
        yield folder, files


def _entries(directory: Path) -> list[os.DirEntry[str]]:
    """What lies in a directory, by name."""
    try:
        with os.scandir(directory) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(
            f"The directory {directory} cannot be listed ({error.strerror}), so its files would be missing from the corpus. Make it readable, or name "
            "inputs without it."
        ) from error
