"""One process group trains into a run directory. Others are refused.

Lock files and locks of the file system are not to be relied on over NFS; a whole file that replaces another is. RUN/owner.json names
the process that trains (machine, process, start), and while it lives a thread of it rewrites the file with a higher beat. Whoever comes
to a directory with an owner looks whether that process exists, where it runs on the same machine, or else whether the beat moves. The claim is
made before the model is loaded, which takes minutes. An owner reads the file again before it writes its record, the ledger or a checkpoint, so
that of two who came at the same moment only the last one goes on.

A job that SLURM has started again takes the directory over from its own earlier start without a look: a node that SLURM has lost may still
reach the disk, and what is left there ends when it finds the claim gone.
"""

import contextlib
import logging
import socket
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson
import psutil

from megatron_exp.errors import UserError
from megatron_exp.files import write_file
from megatron_exp.parallel.launched import read_job

OWNER_NAME = "owner.json"
SCHEMA_VERSION = 1
BEAT_SECONDS = 15.0
PATIENCE_BEATS = 4
"""An owner on another machine that does not beat for this long is taken for dead."""

logger = logging.getLogger(__name__)


def refuse_if_owned(directory: Path) -> None:
    """UserError where a living process trains into DIRECTORY; waits for a sign of life of one on another machine."""
    found = _read(directory)
    if found and found["state"] == "training" and not _is_earlier_start(found) and _is_alive(directory, found):
        raise UserError(
            f"{directory} is being trained into by process {found['process']} on {found['host']} (attempt {found['attempt']}, since {found['since']}). Two at "
            "a time would destroy the run. Wait until it ends, stop it, or train into another directory."
        )


class Ownership:
    """This process's claim to a run directory: made by `claim`, kept up by a thread, given up at the end of the `with` block."""

    def __init__(self, directory: Path):
        self._path = Path(directory) / OWNER_NAME
        self._record: dict[str, Any] = {}
        self._made_directory = False
        self._over = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="owner", daemon=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.release()

    def claim(self, attempt: int) -> int:
        """Claim the directory; call `refuse_if_owned` before. Returns the attempt's number: ATTEMPT, or a later one where that may still be at work."""
        directory = self._path.parent
        self._made_directory = not directory.exists()
        directory.mkdir(parents=True, exist_ok=True)
        found = _read(directory)
        if found and _is_earlier_start(found):
            attempt = max(attempt, found["attempt"] + 1)
        self._record = {
            "schema_version": SCHEMA_VERSION,
            "state": "training",
            **_process(psutil.Process()),
            "claim": time.monotonic_ns(),
            "host": socket.gethostname(),
            **read_job()._asdict(),
            "attempt": attempt,
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            "beat": 0,
        }
        self._write()
        self._beating.start()
        return attempt

    def require(self) -> None:
        """UserError where another process has taken the directory over."""
        if not self.is_ours:
            found = _read(self._path.parent)
            by = f"process {found['process']} on {found['host']}" if found else "another process, which has ended since, or owner.json was removed"
            raise UserError(
                f"{self._path.parent} was taken over by {by}. This process stops here and writes no more into it. Start only one `train` per run directory."
            )

    @property
    def is_ours(self) -> bool:
        """Whether no other process has taken the directory over."""
        found = _read(self._path.parent)
        return found is not None and _claim(found) == _claim(self._record)

    def release(self) -> None:
        """Let the next one in at once; leaves the file alone where it is another's by now, and nothing where nothing else was written.

        Raises nothing: it is called on the way out, mostly with an error that says more.
        """
        if not self._record:
            return
        self._over.set()
        if self._beating.is_alive():
            self._beating.join()
        try:
            if self.is_ours:
                self._path.unlink()
        except (OSError, UserError) as error:
            logger.warning("%s stays (%s); the next `train` sees that this process has ended.", self._path, error)
        if self._made_directory:
            with contextlib.suppress(OSError):  # it holds a run
                self._path.parent.rmdir()

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            try:
                if not self.is_ours:
                    return  # `require` says so where it can be said
                self._record["beat"] += 1
                self._write()
            except OSError as error:
                logger.warning("%s could not be renewed (%s); it is tried again in %.0f s.", self._path, error, BEAT_SECONDS)

    def _write(self) -> None:
        write_file(self._path, orjson.dumps(self._record, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def _read(directory: Path) -> dict[str, Any] | None:
    path = Path(directory) / OWNER_NAME
    try:
        return orjson.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except orjson.JSONDecodeError as error:
        raise UserError(f"{path} is no JSON ({error}). If nobody trains into this directory, remove the file.") from error


def _claim(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record[name] for name in ("machine", "process", "process_start", "claim"))


def _is_earlier_start(found: dict[str, Any]) -> bool:
    """Whether the job of this process, started again by SLURM, is the one that claimed the directory."""
    now = read_job()
    return now.job is not None and found.get("job") == now.job and found["restart"] < now.restart


def _process(process: psutil.Process) -> dict[str, Any]:
    """Which process, on which start of which machine; containers that share a machine do not share process numbers."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    numbers = Path("/proc/self/ns/pid").readlink()
    return {"machine": f"{boot} {numbers}", "process": process.pid, "process_start": process.create_time()}


def _is_alive(directory: Path, found: dict[str, Any]) -> bool:
    if found["machine"] == _process(psutil.Process())["machine"]:
        try:
            return psutil.Process(found["process"]).create_time() == found["process_start"] and found["process"] != psutil.Process().pid
        except psutil.NoSuchProcess:
            return False
    seconds = PATIENCE_BEATS * BEAT_SECONDS
    logger.info("%s was claimed by %s; waiting up to %.0f s for a sign of life.", directory, found["host"], seconds)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(min(1.0, BEAT_SECONDS / 20))
        now = _read(directory)
        if now is None or now["state"] != "training":
            return False
        if now != found:
            return True
    return False
