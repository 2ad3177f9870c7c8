"""Single tensors of a torch_dist directory, read and written one after the other by one process: without a model, and without room for one.

megatron's own entry points want the whole state in memory and a process group. The format underneath is PyTorch's, whose planners decide
what is read and made when.
"""

import io
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader, FileSystemWriter, save
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_exp.checkpoint.storage import Through, write_common


class Place(NamedTuple):
    """Where a tensor of `size` lies: under a name of its own, or as one layer of the stack that a checkpoint makes of all layers."""

    name: str
    size: tuple[int, ...]
    layer: int | None = None
    num_layers: int = 1

    @property
    def stored_size(self) -> torch.Size:
        """The size of what is stored under the name."""
        return torch.Size(self.size if self.layer is None else (self.num_layers, *self.size))

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """This tensor's part of it."""
        first, ones = ((), ()) if self.layer is None else ((self.layer,), (1,))
        return ChunkStorageMetadata(torch.Size([*first, *(0 for _ in self.size)]), torch.Size([*ones, *self.size]))


class StoredTensors:
    """The tensors of a checkpoint directory, whatever layout wrote them. Open only what `catalogue.require_sound` has passed."""

    def __init__(self, directory: Path):
        self._reader = FileSystemReader(directory)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._stored = {name: stored for name, stored in metadata.state_dict_metadata.items() if isinstance(stored, TensorStorageMetadata)}

    @property
    def sizes(self) -> dict[str, torch.Size]:
        """Stored size by name, layers stacked."""
        return {name: stored.size for name, stored in self._stored.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self._stored[name].properties.dtype

    def read(self, place: Place) -> torch.Tensor:
        """The tensor at a place, on CPU, in its stored type; takes memory for itself and one stored piece of it."""
        chunk = place.chunk
        tensor = torch.empty(chunk.sizes, dtype=self.dtype(place.name))
        items = create_read_items_for_chunk_list(place.name, self._stored[place.name], [chunk])
        assert sum(math.prod(item.lengths) for item in items) == tensor.numel(), f"{place.name} is stored with gaps"
        self._reader.read_data(LoadPlan(items), _Into(tensor)).wait()
        return tensor.view(place.size)


class _Into(DefaultLoadPlanner):
    """Puts everything that is read into one tensor."""

    def __init__(self, tensor: torch.Tensor):
        super().__init__()
        self._tensor = tensor

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        starts = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self._tensor[tuple(slice(start, start + length) for start, length in starts)]

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """What was read is in place already."""


def write_tensors(
    directory: Path, tensors: Mapping[Place, Callable[[], torch.Tensor]], dtype: torch.dtype, empty: Iterable[str], common: dict[str, Any]
) -> None:
    """Write a torch_dist directory that megatron loads at any layout.

    Args:
        directory: exists and is empty.
        tensors: what makes the tensor of each place; called when its turn comes, and what it made is dropped when written.
        dtype: of all of them.
        empty: names of objects without content.
        common: what belongs to no tensor.
    """
    writer = FileSystemWriter(directory, sync_files=False)  # `files` syncs
    writer.fs = Through()
    try:
        save({}, storage_writer=writer, planner=_OneByOne(tensors, dtype, empty), no_dist=True)
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise cause from error
    write_common(directory, common)


class _OneByOne(DefaultSavePlanner):
    """Announces tensors that do not exist yet, and makes each when it is to be written."""

    def __init__(self, tensors: Mapping[Place, Callable[[], torch.Tensor]], dtype: torch.dtype, empty: Iterable[str]):
        super().__init__(flatten_state_dict=False)
        self._made_by = {MetadataIndex(place.name, place.chunk.offsets): make for place, make in tensors.items()}
        shards = [_announced(place, dtype) for place in tensors]
        self._items = [*shards, *(WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in empty)]

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(self._items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.tensor_data:
            return self._made_by[write_item.index]().view(write_item.tensor_data.chunk.sizes)
        content = io.BytesIO()
        torch.save([None], content)  # megatron stores a list with one entry for each part of an object
        return content


def _announced(place: Place, dtype: torch.dtype) -> WriteItem:
    data = TensorWriteData(place.chunk, TensorProperties(dtype=dtype), place.stored_size)
    return WriteItem(MetadataIndex(place.name, place.chunk.offsets), WriteItemType.SHARD, tensor_data=data)
