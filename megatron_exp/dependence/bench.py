"""Where the runs of a test are made: a directory, a loaded checkpoint, and the blocks and cells that are there already."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from megatron_exp.config.schema import Config
from megatron_exp.dependence.block import block_config, rearranged
from megatron_exp.dependence.cells import Block, Trainer, read_cell, run_cell, write_cell
from megatron_exp.errors import UserError
from megatron_exp.manifest.reader import Manifest
from megatron_exp.parallel.agreement import on_main
from megatron_exp.parallel.layout import Layout
from megatron_exp.shards.corpus import Corpus

logger = logging.getLogger(__name__)

Planner = Callable[..., Manifest]
"""`preparation.plan`."""


@dataclass(eq=False, kw_only=True)
class Bench:
    """All processes of `layout` call the same methods in the same order; the main one writes.

    fractions: experiment to its share of a run's tokens. slots: replicate to its first base slot. plan: fingerprint of the plan that the cells belong to.
    """

    directory: Path
    manifest: Manifest
    corpus: Corpus
    layout: Layout
    trainer: Trainer
    planner: Planner
    fractions: Mapping[str, float]
    columns: Sequence[str]
    slots: Sequence[int]
    steps: int
    plan: str
    _blocks: dict[int, Block] = field(default_factory=dict)

    @property
    def experiments(self) -> list[str]:
        """Names of what is tested, in the manifest's order."""
        return list(self.fractions)

    def block(self, seed: int) -> Block:
        """A replicate; its manifest is planned where it is not there yet."""
        if seed not in self._blocks:
            config = block_config(self.manifest, self.fractions, seed, self.slots[seed], self.steps)
            path = self.directory / "blocks" / str(seed)
            on_main(self.layout, partial(self._plan, config, path))
            manifest = Manifest.open(path)
            self._blocks = {seed: Block(seed, manifest, manifest.open_stream(self.corpus))}  # one is open at a time
        return self._blocks[seed]

    def _plan(self, config: Config, path: Path) -> None:
        if not path.exists():
            logger.info("planning block %s", path.name)
            try:
                self.planner(config, path, rearrange=partial(rearranged, fractions=self.fractions))
            except OSError:
                if not path.is_dir():  # else another task of an array was faster, with the same content
                    raise
        if Manifest.open(path).record["config"] != config.model_dump(mode="json"):
            raise UserError(
                f"{path} is the block of another test: its configuration is not what this manifest, intensity and seed give. Use another --out, or remove it."
            )

    def cell(self, row: str, seed: int) -> tuple[pa.Table, dict[str, Any]]:
        """A cell: read where it is there, else run and written."""
        found = on_main(self.layout, partial(read_cell, self.directory, row, seed, self.plan))
        if found is None:
            began = time.perf_counter()
            block = self.block(seed)
            opened = time.perf_counter() - began
            found = run_cell(self.trainer, block, row, self.columns, self.experiments)
            found[1]["block_seconds"] = opened
            on_main(self.layout, partial(write_cell, self.directory, row, seed, found[0], self.plan, found[1]))
            logger.info("%s, seed %d: %.0f s training, %.0f s scoring", row, seed, found[1]["train_seconds"], found[1]["score_seconds"])
        return found
