"""Stops this attempt where another one has taken the run directory over (see `training.ownership`)."""

from typing import Any

from megatron_exp.parallel.agreement import on_main
from megatron_exp.parallel.layout import Layout
from megatron_exp.training.hooks.base import Hook
from megatron_exp.training.ownership import Ownership
from megatron_exp.training.run import Run


def require_owned(layout: Layout, ownership: Ownership | None) -> None:
    """UserError on every process where another one has taken the directory over (collective)."""
    on_main(layout, lambda: ownership.require() if ownership else None)


class OwnerHook(Hook):
    """First of the hooks: it looks before the others write. `ownership` is None on all processes but the main one."""

    def __init__(self, ownership: Ownership | None):
        self._ownership = ownership

    def on_start(self, run: Run, state: Any) -> None:
        del state
        self._require(run)

    def on_checkpoint(self, run: Run) -> None:
        self._require(run)

    def _require(self, run: Run) -> None:
        require_owned(run.layout, self._ownership)
