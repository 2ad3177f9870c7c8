"""Where measurements go: one JSON object a line in metrics.jsonl, and the same numbers for TensorBoard."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from megatron_exp.run_record import METRICS_NAME
from megatron_exp.training.json_log import JsonLog
from megatron_exp.training.trackers import Detached

TENSORBOARD_NAME = "tensorboard"


class MetricsLog:
    """Appends to the metrics of a run directory. Lines of earlier attempts stay; each line names its attempt and its state."""

    def __init__(self, directory: Path, attempt: int, step: int, trackers: Sequence[Detached] = ()):
        """`attempt` goes into every line; TensorBoard forgets what an earlier attempt showed after state `step`. `trackers` get all numbers."""
        self._trackers = trackers
        self._log = JsonLog(directory / METRICS_NAME)
        self._attempt = attempt
        self._board = SummaryWriter(directory / TENSORBOARD_NAME, purge_step=step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Record what was measured in the state after `step` updates. Values are numbers, or objects of numbers."""
        self._log.write({"step": step, "attempt": self._attempt, **values})
        # One event for the whole line: an event for each number costs as much as everything else here together.
        flat = dict(_flat(values))
        numbers = [Summary.Value(tag=tag, simple_value=number) for tag, number in flat.items()]
        self._board._get_file_writer().add_summary(Summary(value=numbers), step)
        for tracker in self._trackers:
            tracker.write(step, flat)

    def sync(self) -> None:
        """Make all lines so far durable."""
        self._log.sync()
        self._board.flush()

    def close(self) -> None:
        """Make all lines durable and end."""
        self._log.close()
        self._board.close()
        for tracker in self._trackers:
            tracker.close()


def _flat(values: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{key}", number) for key, number in value.items())
        else:
            yield name, value
