"""Token files on a node's own disk, for clusters whose shared file system is slow at many small reads. Optional, and checked."""

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from megatron_exp.errors import UserError
from megatron_exp.shards.checksums import BLOCK_BYTES, SummedWriter, root_of, sums_of_file
from megatron_exp.shards.corpus import Corpus

_ROOM_BYTES = 1 << 30
"""What is left free on the disk."""


def cache_folder(corpus: Corpus, root: Path) -> Path:
    """Where a corpus is cached below ROOT: named by content, so that another corpus is never taken for it."""
    return Path(root) / corpus.fingerprint


def fill_cache(corpus: Corpus, root: Path, progress: Callable[[str], None] | None = None) -> tuple[int, int]:
    """Copy the token files of all shards below ROOT; what is there already is read and compared instead. Run it once on each node.

    Every byte is compared with corpus.json's hash of its file. A killed copy continues with the shard it was at.

    Returns:
        Bytes copied, and bytes found.

    Raises:
        UserError: where the disk has no room, or a shard of the corpus itself is damaged.
    """
    folder = cache_folder(corpus, root)
    folder.mkdir(parents=True, exist_ok=True)
    missing = [shard for shard in range(len(corpus.shards)) if not _is_whole(corpus, shard, folder)]
    _check_room(corpus, missing, folder)
    for number, shard in enumerate(missing, start=1):
        if progress:
            progress(f"copying {corpus.shards[shard].name}, {number} of {len(missing)}")
        _copy(corpus, shard, folder)
    copied = sum(_num_bytes(corpus, shard) for shard in missing)
    return copied, sum(_num_bytes(corpus, shard) for shard in range(len(corpus.shards))) - copied


def with_cache(corpus: Corpus, root: Path) -> Corpus:
    """The corpus with its tokens read from the cache below ROOT; UserError where `fill_cache` has not been run on this node."""
    folder = cache_folder(corpus, root)
    for shard in range(len(corpus.shards)):
        path = _cached(corpus, shard, folder)
        if not path.is_file() or path.stat().st_size != _num_bytes(corpus, shard):
            raise UserError(
                f"{path} is missing or has another length than corpus.json says, so the cache on this node is not complete. Fill it on every node first: "
                f"megatron-exp cache {corpus.path} --to {root}"
            )
    return dataclasses.replace(corpus, cache=folder, _tokens={})  # what is open already lies elsewhere


def _cached(corpus: Corpus, shard: int, folder: Path) -> Path:
    return folder / f"{corpus.shards[shard].name}.bin"


def _num_bytes(corpus: Corpus, shard: int) -> int:
    return corpus.record["shards"][shard]["files"]["bin"]["bytes"]


def _root(corpus: Corpus, shard: int) -> str:
    return corpus.record["shards"][shard]["files"]["bin"]["root"]


def _is_whole(corpus: Corpus, shard: int, folder: Path) -> bool:
    path = _cached(corpus, shard, folder)
    if not path.is_file() or path.stat().st_size != _num_bytes(corpus, shard):
        return False
    return root_of(sums_of_file(path, threads=len(os.sched_getaffinity(0)))) == _root(corpus, shard)


def _check_room(corpus: Corpus, missing: list[int], folder: Path) -> None:
    needed, free = sum(_num_bytes(corpus, shard) for shard in missing), shutil.disk_usage(folder).free
    if missing and needed + _ROOM_BYTES > free:
        raise UserError(
            f"The cache {folder} needs {needed / 2**30:.1f} GiB more (and 1 GiB to spare), but its disk has {free / 2**30:.1f} GiB free. Make room, or leave "
            "`scratch` out of the cluster profile: training then reads the shards where they lie."
        )


def _copy(corpus: Corpus, shard: int, folder: Path) -> None:
    source, target = corpus.file(shard, "bin"), _cached(corpus, shard, folder)
    writer = SummedWriter(target)
    try:
        with open(source, "rb", buffering=0) as file:
            while block := file.read(BLOCK_BYTES):
                writer.write(block)
        summed = writer.finish()
    finally:
        writer.abandon()
    if summed.root != _root(corpus, shard):
        target.unlink()
        raise UserError(
            f"{source} is not what corpus.json says it is: its content was changed or damaged. `megatron-exp verify {corpus.path}` names the place."
        )
