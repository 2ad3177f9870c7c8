"""Durable files: everything that must survive a crash is written through this module.

A reader sees the old content or the new one, never a mixture: a temporary name in the same directory, fsync, rename,
fsync of the directory. Nothing needs a lock, which network file systems may lack: every temporary name has one writer, on whatever machine, and says
whose it is. The four system calls stand alone (`_write`, `_fsync`, `_rename`, `_fsync_directory`) so that
tests can enumerate them, fail the k-th and kill the process at any.
"""

import contextlib
import errno
import functools
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from io import RawIOBase
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import orjson

from megatron_exp.errors import UserError

_PARTIAL_SUFFIX = ".partial"
_BLOCK_BYTES = 1 << 20
_CANNOT_LINK = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP}


def partial_name(path: Path) -> Path:
    """A temporary name for PATH that no other writer has, be it on another machine: NAME.MACHINE-PROCESS-NUMBER.partial."""
    return path.with_name(f"{path.name}.{_machine()}-{os.getpid()}-{secrets.token_hex(4)}{_PARTIAL_SUFFIX}")


def remove_partials(directory: Path, *, all_writers: bool = False) -> None:
    """Remove the temporary files that killed processes of this machine left in a directory, or those of all writers, who then fail."""
    for path in directory.glob(f"*{_PARTIAL_SUFFIX}"):
        machine, _, rest = path.name.removesuffix(_PARTIAL_SUFFIX).rpartition(".")[2].partition("-")
        process = rest.partition("-")[0]
        if all_writers or (machine == _machine() and not Path(f"/proc/{process}").exists()):
            path.unlink(missing_ok=True)


@functools.cache
def _machine() -> str:
    """Names the running system, and where it has several spaces of process numbers (containers), this one."""
    known = [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256("".join(known).encode()).hexdigest()[:12]


def _write(file: BinaryIO, data: bytes | memoryview) -> None:
    file.write(data)


def _fsync(descriptor: int) -> None:
    os.fsync(descriptor)


def _rename(source: Path, target: Path) -> None:
    os.rename(source, target)


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable, where whoever changed them may have failed to."""
    _fsync_directory(path)


def append_whole(file: RawIOBase, data: bytes) -> None:
    """Write all of DATA to an unbuffered file, whose `write` may take a part of it without an error (a full disk, a quota, NFS)."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) or 0 :]


def sync_file(path: Path) -> None:
    """Make the content of an already written file durable (used for files that a library wrote)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _fsync(descriptor)
    finally:
        os.close(descriptor)


class DurableWriter:
    """A file under construction: `write` bytes, `close` makes them durable and visible under the final name."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self._partial = partial_name(self.path)
        self._file: BinaryIO = open(self._partial, "wb", buffering=_BLOCK_BYTES)  # noqa: SIM115 - closed by `close` or `abandon`

    def write(self, data: bytes | memoryview) -> None:
        _write(self._file, data)

    def close(self) -> None:
        if self._file.closed:
            return  # some libraries close the stream they are given
        try:
            self._file.flush()
            _fsync(self._file.fileno())
        finally:
            self._file.close()
        _rename(self._partial, self.path)
        _fsync_directory(self.path.parent)

    def abandon(self) -> None:
        """Drop what was written; the old file, if any, stays."""
        with contextlib.suppress(OSError):  # a full disk refuses what is still in the buffer
            self._file.close()
        self._partial.unlink(missing_ok=True)


class HashedWriter(DurableWriter):
    """A file under construction that is hashed while it is written: a stream for libraries, which write in many small pieces.

    failure: the first error of the disk. Libraries raise others in its place.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        self._hash = hashlib.sha256()
        self._gathered = bytearray()
        self._num_bytes = 0
        self.failure: OSError | None = None

    @property
    def sha256(self) -> str:
        """Of everything written so far, in hex."""
        return self._hash.hexdigest()

    def write(self, data: bytes | memoryview) -> int:  # type: ignore[override]
        view = memoryview(data).cast("B")
        self._hash.update(view)
        self._num_bytes += len(view)
        if len(view) < _BLOCK_BYTES:
            self._gathered += view
        if len(view) >= _BLOCK_BYTES or len(self._gathered) >= _BLOCK_BYTES:
            self._pass_on()
        if len(view) >= _BLOCK_BYTES:
            self._put(view)
        return len(view)

    def tell(self) -> int:
        return self._num_bytes

    def flush(self) -> None:
        """A stream must have it; `close` alone makes anything durable."""

    def close(self) -> None:
        self._pass_on()
        super().close()

    def _pass_on(self) -> None:
        if self._gathered:
            self._put(bytes(self._gathered))
            self._gathered.clear()

    def _put(self, data: bytes | memoryview) -> None:
        try:
            super().write(data)
        except OSError as error:
            self.failure = self.failure or error
            raise


@contextlib.contextmanager
def durable_file(path: Path) -> Iterator[DurableWriter]:
    """Open PATH for a whole new content that appears at the end of the block, or not at all."""
    with _whole(DurableWriter(path)) as writer:
        yield writer


@contextlib.contextmanager
def hashed_file(path: Path) -> Iterator[HashedWriter]:
    """Like `durable_file`; afterwards the writer's `sha256` is that of the file. An error of the disk is raised whatever a library made of it."""
    with _whole(HashedWriter(path)) as writer:
        try:
            yield writer
        except Exception as error:
            if writer.failure is None or error is writer.failure:
                raise
            raise writer.failure from error


_Writer = TypeVar("_Writer", bound=DurableWriter)


@contextlib.contextmanager
def _whole(writer: _Writer) -> Iterator[_Writer]:
    try:
        yield writer
        writer.close()
    except BaseException:
        writer.abandon()
        raise


def write_file(path: Path, data: bytes) -> None:
    """Replace the content of PATH durably."""
    with durable_file(Path(path)) as writer:
        writer.write(data)


def create_file(path: Path, data: bytes) -> bool:
    """Write a new file durably; False, and nothing changed, where PATH exists. Of several writers, on any machines, one succeeds."""
    prepared = partial_name(Path(path))
    with open(prepared, "xb") as file:
        try:
            _write(file, data)
            file.flush()
            _fsync(file.fileno())
            _link_new(prepared, path, data)
        except FileExistsError:
            return False
        finally:
            prepared.unlink()
    _fsync_directory(prepared.parent)
    return True


def _link_new(prepared: Path, path: Path, data: bytes) -> None:
    """FileExistsError where PATH exists. A disk without hard links gets the content a moment after the name."""
    try:
        os.link(prepared, path)
    except OSError as error:
        if error.errno not in _CANNOT_LINK:
            raise
        with open(path, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def link_file(source: Path, target: Path) -> bool:
    """Give an existing file the second name `target` (a hard link), durably; False where the system cannot: another disk, no such right."""
    partial = partial_name(target)
    try:
        os.link(Path(source).resolve(), partial)
    except OSError as error:
        if error.errno in _CANNOT_LINK:
            return False
        raise
    sync_file(partial)
    _rename(partial, target)
    partial.unlink(missing_ok=True)  # a rename to another name of the same file leaves both
    _fsync_directory(target.parent)
    return True


def rename_file(path: Path, new_path: Path) -> None:
    """Give a durable file another name in its directory, durably."""
    _rename(path, new_path)
    _fsync_directory(new_path.parent)


@contextlib.contextmanager
def durable_directory(path: Path) -> Iterator[Path]:
    """Build a directory under a temporary name and give it its final name when the block ends without an error.

    Raises UserError where PATH already exists: results are never overwritten.
    """
    path = Path(path)
    refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_name(path)
    partial.mkdir()
    try:
        yield partial
        for file in sorted(partial.rglob("*")):
            if file.is_file():
                sync_file(file)
        for directory in sorted(partial.rglob("*"), reverse=True):
            if directory.is_dir():
                _fsync_directory(directory)
        _fsync_directory(partial)
        _rename(partial, path)
        _fsync_directory(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def make_directory(path: Path) -> None:
    """Make a directory durably; one that is there stays as it is."""
    if not path.is_dir():
        path.mkdir(parents=True)
        _fsync_directory(path.parent)


def refuse_existing(path: Path) -> None:
    """Raise UserError where PATH exists and is not an empty directory."""
    path = Path(path)
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()
    if path.exists():
        raise UserError(f"{path} already exists. Results are never overwritten: choose another name, or remove it first.")


def safe_join(root: Path, name: str) -> Path:
    """The path of NAME below ROOT; raises UserError where NAME is absolute or leads out of ROOT."""
    root = Path(root)
    joined = root / name
    if Path(name).is_absolute() or not joined.resolve().is_relative_to(root.resolve()):
        raise UserError(f"The file name {name!r} leads out of {root}. The record that names it is damaged or not ours: do not use it.")
    return joined


def require_file(path: Path, what: str) -> Path:
    """PATH, if it is a file; else a UserError that says what was expected there."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist or is not a file; {what} was expected there. Check the path.")
    return path


def read_object(path: Path, what: str, remedy: str) -> dict[str, Any]:
    """The object in a JSON file; a UserError that ends in REMEDY where there is no file, no JSON or no object in it."""
    path = require_file(path, what)
    try:
        content = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error}). It is damaged: {remedy}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no object, so it is not {what}. It is damaged: {remedy}.")
    return content


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_written(path: Path, sha256: str) -> None:
    """OSError where the disk gives back other bytes of a durable file than those with this SHA-256."""
    if reread_sha256(path) != sha256:
        raise OSError(errno.EIO, "the disk gives back other bytes than were written", str(path))


def reread_sha256(path: Path) -> str:
    """Hex SHA-256 of a durable file as its disk gives it back: what memory holds of it is dropped first."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk or a quota is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def free_bytes(path: Path) -> int:
    """What may still be written to the file system of PATH, which need not exist yet. Quotas are not seen."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
