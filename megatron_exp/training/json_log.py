"""Files to which one JSON object a line is appended for as long as a run lasts, over all its attempts."""

import threading
from pathlib import Path
from typing import Any

import orjson

from megatron_exp.files import append_whole, sync_file, write_file


class JsonLog:
    """Appends lines. Each is with the operating system after `write` and on disk after `sync`.

    A last line torn by a kill is cut off at the next start. Several threads may write.
    """

    def __init__(self, path: Path):
        self._path = Path(path)
        if self._path.exists():
            _cut_torn_line(self._path)
        else:
            write_file(self._path, b"")
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 - open as long as the run
        self._writing = threading.Lock()

    def write(self, line: dict[str, Any]) -> None:
        """Add one line."""
        with self._writing:
            append_whole(self._file, orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))

    def sync(self) -> None:
        """Make all lines so far durable."""
        sync_file(self._path)

    def close(self) -> None:
        """Make all lines durable and end."""
        self.sync()
        self._file.close()


def _cut_torn_line(path: Path) -> None:
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with open(path, "r+b") as file:
            file.truncate(whole)
