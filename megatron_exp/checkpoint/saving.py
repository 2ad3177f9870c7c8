"""Writing checkpoints: now, or by a thread while training goes on. Every function here is collective."""

import contextlib
import dataclasses
import math
from pathlib import Path
from typing import Any

from megatron_exp import files
from megatron_exp.checkpoint import catalogue
from megatron_exp.checkpoint.state import content_metadata, division_of, state_of
from megatron_exp.checkpoint.storage import Outcome, PartialCheckpoint
from megatron_exp.display.numbers import size
from megatron_exp.errors import InterruptedRunError, UserError
from megatron_exp.model.build import LanguageModel
from megatron_exp.model.optimizer import Optimizer, OptimizerSummary, data_parallel_group
from megatron_exp.parallel.agreement import on_main


def save_checkpoint(
    directory: Path, model: LanguageModel, optimizer: Optimizer | None, extra: dict[str, Any], *, is_portable: bool = True
) -> None:
    """Write a checkpoint that appears whole under `directory`, or not at all; arguments as for `SavingCheckpoint`."""
    SavingCheckpoint(directory, model, optimizer, extra, is_portable=is_portable).finish()


class SavingCheckpoint:
    """A checkpoint that is being written. It exists from the end of `finish` on, and until then there is nothing under its name."""

    def __init__(
        self,
        directory: Path,
        model: LanguageModel,
        optimizer: Optimizer | None,
        extra: dict[str, Any],
        *,
        is_portable: bool = True,
        in_background: bool = False,
    ):
        """Take the state as it is now and begin to write it.

        Args:
            directory: the final name, see `catalogue.checkpoint_path`; must not exist.
            model: weights.
            optimizer: its state; None writes weights only.
            extra: JSON-able values of the caller (step, fingerprints, ...), equal on every rank, given back by `load_checkpoint`.
            is_portable: write optimizer state so that any layout can load it, through the first replica; else every replica writes its
                own part, which only this division of the model loads again.
            in_background: the caller may change the weights before `finish`, so a copy of the state is written.

        Raises:
            UserError: where the directory exists, the state is not finite, or the disk is full.
            InterruptedRunError: where the disk is faulty.
        """
        self.directory = Path(directory)
        self._layout = layout = model.layout
        summary = optimizer.summary() if optimizer else None
        _require_finite(self.directory, summary)
        division = None if is_portable or not optimizer else division_of(optimizer, layout)
        self._record = catalogue.record_bytes(
            dataclasses.asdict(model.shape), model.precision, summary._asdict() if summary else None, extra, division
        )
        with contextlib.ExitStack() as stack:
            self._partial = Path(on_main(layout, lambda: self._begin(stack)))
            state = state_of(model, optimizer, division is None, is_loading=False)
            spread_over = None if division is None else data_parallel_group()
            self._files = PartialCheckpoint(
                self._partial, {**state, "content_metadata": content_metadata(division is None)}, spread_over, in_background
            )
            self._files.start()
            self._stack = stack.pop_all()

    def is_written(self) -> bool:
        """Whether `finish` would not have to wait for this rank's part. Not collective: ranks must agree before they act on it."""
        return self._files.is_written()

    def finish(self) -> None:
        """Wait until every part is written and read back, then seal the checkpoint and give it its name.

        Raises:
            UserError: where a disk or quota is full, on any rank; nothing of the checkpoint remains then.
            InterruptedRunError: likewise, where a disk is faulty.
        """
        with self._stack:
            outcomes = self._files.gather()
            failed = {f"rank {rank}: {outcome.error}": outcome.is_full for rank, outcome in enumerate(outcomes) if outcome.error}
            if failed:
                raise self._failure("; ".join(failed), all(failed.values()))
            on_main(self._layout, lambda: self._complete(outcomes))

    def _begin(self, stack: contextlib.ExitStack) -> str:
        try:
            return str(stack.enter_context(files.durable_directory(self.directory)))
        except OSError as error:
            raise self._failure(str(error), files.is_full(error)) from error

    def _complete(self, outcomes: list[Outcome]) -> None:
        try:
            with self._stack:
                ranks = {name: sha256 for outcome in outcomes for name, sha256 in outcome.hashes.items()}  # read back by then
                here = self._files.complete(outcomes)
                with files.hashed_file(self._partial / catalogue.RECORD) as record:
                    record.write(self._record)
                here[catalogue.RECORD] = record.sha256
                here |= catalogue.seal(self._partial, ranks | here)
                for name, sha256 in here.items():
                    files.require_written(self._partial / name, sha256)
        except OSError as error:
            raise self._failure(str(error), files.is_full(error)) from error

    def _failure(self, what: str, is_full: bool) -> UserError | InterruptedRunError:
        """The user makes room; a disk that fails otherwise is no mistake of theirs, and another start, perhaps on another node, goes on."""
        told = (
            f"The checkpoint {self.directory} could not be written ({what}); {size(files.free_bytes(self.directory))} are free on its disk. Nothing of it "
            "remains, and the checkpoints before it are as they were."
        )
        again = "give the same command again: it goes on from the newest one."
        return UserError(f"{told} Free space, then {again}") if is_full else InterruptedRunError(f"{told} If the disk is in order, {again}")


def _require_finite(directory: Path, summary: OptimizerSummary | None) -> None:
    if summary and not all(math.isfinite(value) for value in summary):
        raise UserError(
            f"The checkpoint {directory} is not written: weights or moments of the optimizer are no longer finite numbers ({summary}). The run has diverged: "
            "begin again from an older checkpoint with a lower learning rate or another precision."
        )
