"""megatron-core's torch_dist format, written by this process alone.

megatron's own writer forks one process per file and starts a manager process that imports the main script again: seconds at the
first save, and a hang of all ranks where the script has no main guard, psutil is missing or a fork dies. Saving is synchronous
here, so the same bytes are written without any of it.
"""

import functools
import queue
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy


class InProcessSave(TorchDistSaveShardedStrategy):
    """Writes one file per rank, in the calling process."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1, thread_count=1)

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        """Write this rank's part and wait for the others; an error on any rank is raised on all."""
        # The writer asks for its queue while it plans; one of this process will do, and an own one for every save.
        filesystem_async._results_queue = queue.SimpleQueue()
        request = self.async_save(sharded_state_dict, checkpoint_dir)
        if request.async_fn is not None:
            transforms = request.async_fn.args[0]
            request = request._replace(async_fn=functools.partial(_write, transforms))
        request.execute_sync()


def _write(transforms: list[Any], rank: int, buckets: list[Any], results: queue.SimpleQueue) -> None:
    """What megatron's writer does in its forks, one bucket (file) after the other; `results` gets {bucket: written items} or an exception."""
    del rank
    written: dict[int, Any] = {}
    for index, bucket in enumerate(buckets):
        answers: queue.SimpleQueue = queue.SimpleQueue()
        running: queue.Queue = queue.Queue()
        running.put(index)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(transforms, index, bucket, answers, running, use_fsync=True)
        _, written[index] = answers.get()
    failed = [answer for answer in written.values() if isinstance(answer, Exception)]
    results.put(failed[0] if failed else written)
