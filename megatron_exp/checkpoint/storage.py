"""megatron-core's torch_dist format, written by this process alone and through `files`.

megatron's own writer forks one process per file and starts a manager process that imports the main script again: seconds at the
first save, and a hang of all ranks where the script has no main guard, psutil is missing or a fork dies. Here megatron plans which rank
writes what, and a thread of each rank writes its file, hashes it meanwhile and reads it back. No process is ever forked.
"""

import contextlib
import io
import queue
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import orjson
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.filesystem import FileSystem, SerializationFormat, _write_item

from megatron_exp import files

_BACKEND, _VERSION = "torch_dist", 1


class Outcome(NamedTuple):
    """What one rank wrote: SHA-256 by file name, and where each item lies; or the error it met, as text, and whether that was a full disk."""

    hashes: dict[str, str]
    items: list[Any]
    error: str | None
    is_full: bool = False


class PartialCheckpoint:
    """The files of a checkpoint being written by all ranks: `start` on a thread of each, then `gather`, then `complete` on the main rank."""

    def __init__(self, directory: Path, state: dict[str, Any], spread_over: dist.ProcessGroup | None, in_background: bool):
        """Plan the files (collective).

        Args:
            directory: exists and is empty; all ranks see it.
            state: megatron's sharded state dict, with everything that is no tensor.
            spread_over: the ranks that hold equal weights divide the writing of them; None leaves it to the first.
            in_background: copy what this rank writes into host memory now, so that training may go on meanwhile.
        """
        self._directory = directory
        sharded, self._common = save_preprocess(state)
        strategy = _Planning()
        if spread_over is not None:
            FullyParallelSaveStrategyWrapper(strategy, spread_over).apply_saving_parallelization(sharded)
        # The writer asks for its queue while it plans; one of this process will do, and an own one for every save.
        filesystem_async._results_queue = queue.SimpleQueue()
        self._writer, self._metadata = strategy.async_save(sharded, directory)
        self._buckets = [_copied(bucket) for bucket in self._writer.write_buckets] if in_background else self._writer.write_buckets
        self._writing: Future[Outcome] | None = None

    def start(self) -> None:
        """Let a thread write this rank's part."""
        worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing = worker.submit(self._write)
        worker.shutdown(wait=False)

    def is_written(self) -> bool:
        """Whether this rank's part is written, or has failed."""
        assert self._writing is not None
        return self._writing.done()

    def gather(self) -> list[Outcome]:
        """Wait for all ranks (collective): what each wrote, in order of ranks."""
        assert self._writing is not None
        error = self._writing.exception()
        mine = Outcome({}, [], f"{type(error).__name__}: {error}", files.is_full(error)) if error else self._writing.result()
        outcomes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, mine)
        if error and not isinstance(error, OSError):
            raise error
        return outcomes

    def complete(self, outcomes: list[Outcome]) -> dict[str, str]:
        """Write what belongs to no rank, on the main one; returns the SHA-256 of every file written here."""
        through = Through()
        self._writer.fs, self._writer.sync_files = through, False  # `files` syncs
        self._writer.finish(self._metadata, [outcome.items for outcome in outcomes])
        return through.hashes | write_common(self._directory, self._common)

    def _write(self) -> Outcome:
        hashes, items = {}, []
        for path, name, (objects, tensors) in self._buckets:
            with files.hashed_file(Path(path)) as file:
                for item, content in chain(objects, tensors):
                    data = content.cpu() if isinstance(content, torch.Tensor) else content
                    items.append(_write_item(self._writer.transforms, cast(io.IOBase, file), data, item, name, SerializationFormat.TORCH_SAVE))
            files.require_written(Path(path), file.sha256)
            hashes[name] = file.sha256
        return Outcome(hashes, items, None)


class _Planning(TorchDistSaveShardedStrategy):
    """megatron's plan of one file per rank, without its way of writing it."""

    def __init__(self) -> None:
        super().__init__(_BACKEND, _VERSION, thread_count=1)

    def _get_save_and_finalize_callbacks(self, writer: FileSystemWriterAsync, planned: Any) -> tuple[FileSystemWriterAsync, Any]:
        return writer, planned[1]


def write_common(directory: Path, common: dict[str, Any]) -> dict[str, str]:
    """Write what belongs to no tensor, and the name of the format; returns the SHA-256 of both files."""
    with files.hashed_file(directory / COMMON_STATE_FNAME) as state:
        torch.save(common, cast(IO[bytes], state))
    with files.hashed_file(directory / CONFIG_FNAME) as config:
        config.write(orjson.dumps(asdict(CheckpointingConfig(_BACKEND, _VERSION))))
    return {COMMON_STATE_FNAME: state.sha256, CONFIG_FNAME: config.sha256}


class Through(FileSystem):
    """PyTorch's file system for what it writes itself: through `files`, and hashed."""

    def __init__(self) -> None:
        self.hashes: dict[str, str] = {}

    @contextlib.contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        assert mode == "wb", mode
        with files.hashed_file(Path(path)) as file:
            yield file
        self.hashes[Path(path).name] = file.sha256

    def rename(self, path: Any, new_path: Any) -> None:
        files.rename_file(Path(path), Path(new_path))
        self.hashes[Path(new_path).name] = self.hashes.pop(Path(path).name)


def _copied(bucket: Any) -> Any:
    path, name, (objects, tensors) = bucket
    return path, name, (objects, [(item, tensor.detach().to("cpu", copy=True)) for item, tensor in tensors])
