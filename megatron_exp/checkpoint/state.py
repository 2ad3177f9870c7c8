"""Saving and loading the weights and the optimizer, at any layout. Every function here but `read_extra` is collective."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling

from megatron_exp import files
from megatron_exp.checkpoint import catalogue
from megatron_exp.checkpoint.storage import InProcessSave
from megatron_exp.errors import UserError
from megatron_exp.model.build import LanguageModel
from megatron_exp.model.optimizer import Optimizer, OptimizerSummary, data_parallel_group
from megatron_exp.parallel.layout import Layout

_NORM_TOLERANCE = 1e-9
"""Norms are sums in float64 whose order depends on the layout."""


def save_checkpoint(directory: Path, model: LanguageModel, optimizer: Optimizer | None, extra: dict[str, Any]) -> None:
    """Write a checkpoint that appears whole under `directory`, or not at all.

    Args:
        directory: the final name, see `catalogue.checkpoint_path`; must not exist.
        model: weights.
        optimizer: its state; None writes weights only.
        extra: JSON-able values of the caller (step, fingerprints, ...), equal on every rank, given back by `load_checkpoint`.
    """
    with _shared_directory(Path(directory), model.layout) as partial:
        dist_checkpointing.save(
            _state(model, optimizer, is_loading=False), str(partial), InProcessSave(), content_metadata=content_metadata()
        )
        summary = optimizer.summary() if optimizer else None
        if model.layout.is_main:
            optimizer_summary = summary._asdict() if summary else None
            catalogue.write_record(partial, dataclasses.asdict(model.shape), model.precision, optimizer_summary, extra)
        hashes = _hash_files(partial, model.layout)
        if model.layout.is_main:
            catalogue.seal(partial, hashes)


def load_checkpoint(directory: Path, model: LanguageModel, optimizer: Optimizer | None) -> dict[str, Any]:
    """Check the files, then load weights and, where `optimizer` is given, its state; returns the `extra` of `save_checkpoint`.

    Weights alone are for a model without an optimizer: one that exists keeps masters of its own, which would win at the next step.

    Raises:
        UserError: where a file is damaged, missing or unlisted, or the checkpoint is of another model, or holds no optimizer state.
    """
    assert optimizer or not model.training_chunks, "load weights before the optimizer is built"
    directory = Path(directory)
    _require_sound_everywhere(directory, model.layout)
    record = catalogue.read_record(directory)
    _check_model(directory, record, model)
    if optimizer and record["optimizer"] is None:
        raise UserError(
            f"{directory} holds weights only, so training cannot go on from it. Resume from a checkpoint that has optimizer state."
        )
    loaded, unread, absent = dist_checkpointing.load(
        _state(model, optimizer, is_loading=True), str(directory), strict=StrictHandling.RETURN_ALL
    )
    differing = absent | (unread if optimizer else {key for key in unread if not key.startswith("optimizer.")})
    if differing:
        names = ", ".join(sorted(differing)[:5])
        raise UserError(
            f"{directory} is not a checkpoint of this model: only one of them has {names}. Use the model configuration it was saved with."
        )
    for part, chunk in enumerate(model.chunks):
        chunk.load_state_dict(loaded["model"][str(part)], strict=True)
    if optimizer:
        optimizer.load_sharded_state(loaded["optimizer"])
        _check_restored(directory, OptimizerSummary(**record["optimizer"]), optimizer.summary())
    return record["extra"]


def read_extra(directory: Path) -> dict[str, Any]:
    """The `extra` of a checkpoint, without loading or checking anything else."""
    return catalogue.read_record(directory)["extra"]


def content_metadata() -> dict[str, Any]:
    """The form in which megatron stores state: optimizer tensors per parameter, which any layout can load."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": True,  # gathered through host memory, on the first replica
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }


def _state(model: LanguageModel, optimizer: Optimizer | None, is_loading: bool) -> dict[str, Any]:
    metadata = {**content_metadata(), "dp_cp_group": data_parallel_group()}
    model.complete_weights()
    # The bare model's: inside its gradient buffers every name would begin with `module.`. Tensors are stored under names of their own,
    # which count layers over the whole model, so it does not matter under which part of this rank they stand here.
    state: dict[str, Any] = {"model": {str(part): chunk.sharded_state_dict(metadata=metadata) for part, chunk in enumerate(model.chunks)}}
    if optimizer:
        state["optimizer"] = optimizer.sharded_state(state["model"], is_loading, metadata)
    return state


@contextlib.contextmanager
def _shared_directory(directory: Path, layout: Layout) -> Iterator[Path]:
    """`files.durable_directory` of the main rank, in which all ranks write; it gets its name when all of them are done."""
    if not layout.is_main:
        partial = Path(_agreed(layout, None))
        yield partial
        layout.barrier()
        return
    with contextlib.ExitStack() as stack:
        try:
            partial = stack.enter_context(files.durable_directory(directory))
        except UserError as mistake:
            _agreed(layout, mistake)
        _agreed(layout, str(partial))
        yield partial
    layout.barrier()


def _agreed(layout: Layout, answer: Any) -> Any:
    """The main rank's answer on every rank; where it is a user's mistake, it is raised on every rank."""
    answer = layout.broadcast(answer)
    if isinstance(answer, UserError):
        raise answer
    return answer


def _require_sound_everywhere(directory: Path, layout: Layout) -> None:
    answer = None
    if layout.is_main:
        try:
            catalogue.require_sound(directory)
        except UserError as mistake:
            answer = mistake
    _agreed(layout, answer)


def _hash_files(directory: Path, layout: Layout) -> dict[str, str]:
    """SHA-256 of every file by relative name; every rank reads its share."""
    layout.barrier()
    names = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    mine = {name: files.sha256_file(directory / name) for name in names[layout.rank :: layout.world_size]}
    shares: list[dict[str, str]] = [{} for _ in range(layout.world_size)]
    dist.all_gather_object(shares, mine)
    return {name: sha256 for share in shares for name, sha256 in share.items()}


def _check_model(directory: Path, record: dict[str, Any], model: LanguageModel) -> None:
    ours = dataclasses.asdict(model.shape)
    ignored = {"preset", "sequence_length"}  # neither changes a weight
    differing = [
        f"{name} {record['shape'][name]} (here {ours[name]})"
        for name in ours
        if name not in ignored and record["shape"][name] != ours[name]
    ]
    if differing:
        raise UserError(
            f"{directory} is a checkpoint of another model: {', '.join(differing)}. Use the model configuration it was saved with."
        )


def _check_restored(directory: Path, saved: OptimizerSummary, restored: OptimizerSummary) -> None:
    """A wrong step count or stale moments train on silently and wrongly, so they are compared with what was saved."""
    same = all(math.isclose(a, b, rel_tol=_NORM_TOLERANCE, abs_tol=1e-30) for a, b in zip(saved, restored, strict=True))
    if not same:
        raise RuntimeError(f"the optimizer restored from {directory} is not the one saved: {restored} instead of {saved}")
