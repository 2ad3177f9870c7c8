"""Saving and loading the weights and the optimizer, at any layout."""

from pathlib import Path
from typing import Any

from megatron_exp.model.build import LanguageModel
from megatron_exp.model.optimizer import Optimizer


def save_checkpoint(directory: Path, model: LanguageModel, optimizer: Optimizer | None, extra: dict[str, Any]) -> None:
    """Write a checkpoint that appears whole under `directory`, or not at all (collective, synchronous).

    Args:
        directory: the final name, see `catalogue.checkpoint_path`; must not exist.
        model: weights.
        optimizer: its state; None writes weights only.
        extra: JSON-able values of the caller (step, fingerprints, ...), equal on every rank, given back by `load_checkpoint`.
    """
    raise NotImplementedError


def load_checkpoint(directory: Path, model: LanguageModel, optimizer: Optimizer | None) -> dict[str, Any]:
    """Check the files, then load weights and, where `optimizer` is given, its state (collective); returns `extra`.

    Raises:
        UserError: where a file is damaged, missing or unlisted, or the checkpoint is of another model, or lacks optimizer state.
    """
    raise NotImplementedError


def read_extra(directory: Path) -> dict[str, Any]:
    """The `extra` of a checkpoint without loading it."""
    raise NotImplementedError
