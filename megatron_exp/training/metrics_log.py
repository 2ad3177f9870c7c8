"""Where measurements go: one JSON object a line in metrics.jsonl, and the same numbers for TensorBoard."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from megatron_exp.files import sync_file, write_file
from megatron_exp.run_record import METRICS_NAME

TENSORBOARD_NAME = "tensorboard"


class MetricsLog:
    """Appends to the metrics of a run directory. Lines of earlier attempts stay; each line names its attempt and its state.

    A line is with the operating system after `write` and on disk after `sync`. A last line torn by a kill is cut off at the next start.
    """

    def __init__(self, directory: Path, attempt: int, step: int):
        """`attempt` goes into every line; TensorBoard forgets what an earlier attempt showed after state `step`."""
        self._path = directory / METRICS_NAME
        self._attempt = attempt
        if self._path.exists():
            _cut_torn_line(self._path)
        else:
            write_file(self._path, b"")
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 - open as long as the run
        self._board = SummaryWriter(directory / TENSORBOARD_NAME, purge_step=step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Record what was measured in the state after `step` updates. Values are numbers, or objects of numbers."""
        line = {"step": step, "attempt": self._attempt, **values}
        self._file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
        # One event for the whole line: an event for each number costs as much as everything else here together.
        numbers = [Summary.Value(tag=tag, simple_value=number) for tag, number in _flat(values)]
        self._board._get_file_writer().add_summary(Summary(value=numbers), step)

    def sync(self) -> None:
        """Make all lines so far durable."""
        sync_file(self._path)
        self._board.flush()

    def close(self) -> None:
        """Make all lines durable and end."""
        self.sync()
        self._file.close()
        self._board.close()


def _flat(values: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{key}", number) for key, number in value.items())
        else:
            yield name, value


def _cut_torn_line(path: Path) -> None:
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with open(path, "r+b") as file:
            file.truncate(whole)
