"""Loading weights and optimizer state, at any layout where the checkpoint allows it. Every function here but `read_extra` is collective."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling

from megatron_exp import fingerprint
from megatron_exp.checkpoint import catalogue
from megatron_exp.checkpoint.convert_names import is_empty_state
from megatron_exp.errors import UserError
from megatron_exp.model.build import LanguageModel
from megatron_exp.model.optimizer import Optimizer, OptimizerSummary, data_parallel_group
from megatron_exp.parallel.agreement import on_main
from megatron_exp.parallel.layout import Layout

_NORM_TOLERANCE = 1e-9
"""Norms are sums in float64 whose order depends on the layout."""


def load_checkpoint(directory: Path, model: LanguageModel, optimizer: Optimizer | None, *, is_checked: bool = False) -> dict[str, Any]:
    """Check the files, then load weights and, where `optimizer` is given, its state; returns the `extra` that was saved.

    Weights alone are for a model without an optimizer: one that exists keeps masters of its own, which would win at the next step.

    Args:
        directory: a checkpoint.
        model: the weights are put into it.
        optimizer: its state too.
        is_checked: `catalogue.verify_checkpoint` has just found it sound, so its files are not read a second time.

    Raises:
        UserError: where a file is damaged, missing or unlisted, or the checkpoint is of another model, holds no optimizer state, or
            holds it in a form that this layout cannot load.
    """
    assert optimizer or not model.training_chunks, "load weights before the optimizer is built"
    directory = Path(directory)
    if not is_checked:
        on_main(model.layout, lambda: catalogue.require_sound(directory))
    record = catalogue.read_record(directory)
    _check_model(directory, record, model)
    if optimizer:
        _check_optimizer(directory, record, optimizer, model.layout)
    is_portable = record.get("division") is None
    loaded, unread, absent = dist_checkpointing.load(
        state_of(model, optimizer, is_portable, is_loading=True), str(directory), strict=StrictHandling.RETURN_ALL
    )
    differing = {key for key in absent | unread if not is_empty_state(key) and (optimizer or not key.startswith("optimizer."))}
    if differing:
        names = ", ".join(sorted(differing)[:5])
        raise UserError(
            f"{directory} is not a checkpoint of this model: only one of them has {names}. Use the model configuration it was saved with."
        )
    for part, chunk in enumerate(model.chunks):
        _take(chunk, loaded["model"][str(part)])
    if optimizer:
        optimizer.load_sharded_state(loaded["optimizer"])
        _check_restored(directory, OptimizerSummary(**record["optimizer"]), optimizer.summary())
    return record["extra"]


def _take(chunk: torch.nn.Module, state: dict[str, Any]) -> None:
    """Load one part's weights, all of them; a layer without stored extra state keeps the one that it has."""
    result = chunk.load_state_dict(state, strict=False)
    wrong = [name for name in (*result.missing_keys, *result.unexpected_keys) if not name.endswith("_extra_state")]
    assert not wrong, f"weights that one side lacks were not found before: {wrong}"


def read_extra(directory: Path) -> dict[str, Any]:
    """The `extra` of a checkpoint, without loading or checking anything else."""
    return catalogue.read_record(directory)["extra"]


def content_metadata(is_portable: bool = True) -> dict[str, Any]:
    """The form in which megatron stores optimizer state.

    Portable: tensors per parameter, which any layout can load, gathered through host memory on the first replica. Else each replica
    writes its part of the gradient buckets as it lies in memory.
    """
    return {
        "distrib_optim_sharding_type": "fully_reshardable" if is_portable else "dp_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }


def state_of(model: LanguageModel, optimizer: Optimizer | None, is_portable: bool, is_loading: bool) -> dict[str, Any]:
    """What megatron saves, or loads into, for this rank."""
    metadata = {**content_metadata(is_portable), "dp_cp_group": data_parallel_group()}
    model.complete_weights()
    # The bare model's: inside its gradient buffers every name would begin with `module.`. Tensors are stored under names of their own,
    # which count layers over the whole model, so it does not matter under which part of this rank they stand here.
    state: dict[str, Any] = {"model": {str(part): chunk.sharded_state_dict(metadata=metadata) for part, chunk in enumerate(model.chunks)}}
    if optimizer:
        state["optimizer"] = optimizer.sharded_state(state["model"], is_loading, metadata)
    return state


def division_of(optimizer: Optimizer, layout: Layout) -> dict[str, Any]:
    """To what optimizer state is bound that is not portable: the division of the model, and the buckets of every part of it."""
    parts: list[Any] = [None] * layout.world_size
    dist.all_gather_object(parts, (layout.pp_rank, layout.tp_rank, optimizer.buckets))
    distinct = sorted({(pp, tp): buckets for pp, tp, buckets in parts}.items())
    degrees = {"tp": layout.tp_size, "pp": layout.pp_size, "virtual": layout.virtual_size}
    return {**degrees, "buckets": fingerprint.of_json([[*place, buckets] for place, buckets in distinct])}


def _check_optimizer(directory: Path, record: dict[str, Any], optimizer: Optimizer, layout: Layout) -> None:
    if record["optimizer"] is None:
        raise UserError(
            f"{directory} holds weights only, so training cannot go on from it. Resume from a checkpoint that has optimizer state, or begin a new run "
            "with its weights: `train MANIFEST --from CHECKPOINT --out RUN`."
        )
    stored, here = record.get("division"), division_of(optimizer, layout)
    if stored is None or all(here[name] == value for name, value in stored.items()):
        return
    portable = catalogue.newest_portable(directory.parent.parent)
    there = [path for _, path in catalogue.list_directories(directory.parent.parent)]
    newer = [path.name for path in there[there.index(portable) + 1 :]] if portable else []
    here_too = f", or here after you have moved {', '.join(newer)} out of {directory.parent}" if newer else ""
    remedy = (
        f"The newest checkpoint that any layout can load is {portable}: go on from it in a new directory (--resume {portable} --out NEW){here_too}. "
        "Or use the old layout"
        if portable
        else "The run has none that any layout can load. Use the old layout"
    )
    raise UserError(
        f"The optimizer state in {directory} was written in parallel at {_degrees(stored)} and loads only there (with any number of "
        f"replicas whose gradient buckets agree); here are {_degrees(here)}. {remedy}: a stop by SIGTERM "
        "then leaves a portable one, and so does every training.checkpoint.portable_every. Weights alone (eval, convert) load anywhere."
    )


def _degrees(division: dict[str, Any]) -> str:
    return ", ".join(f"{name} {division[name]}" for name in division if name != "buckets")


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
