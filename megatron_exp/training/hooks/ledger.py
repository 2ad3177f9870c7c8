"""Records what was fed to the model, step by step (format: `megatron_exp.ledger`)."""

from typing import Any

from megatron_exp.errors import UserError
from megatron_exp.fingerprint import of_json
from megatron_exp.ledger import Entry, LedgerWriter, slot_hash, step_hash
from megatron_exp.parallel.layout import Layout
from megatron_exp.training.hooks.base import Hook
from megatron_exp.training.hooks.owner import require_owned
from megatron_exp.training.ownership import Ownership
from megatron_exp.training.run import Run

LEDGER_NAME = "ledger.bin"
_STEPS_AT_ONCE = 16
"""Hashes travel between replicas in groups of this many steps; a killed attempt repeats more than that anyway."""


class LedgerHook(Hook):
    """Hashes the slots of this process, from the memory the model read, and writes the hash of the whole step on the main process.

    The processes of one replica read the same slots each for itself, perhaps from copies of the shards on different machines. What is written is
    what the first of them read, so all are compared.
    """

    def __init__(self, ownership: Ownership | None) -> None:
        """`ownership`: looked at before each group is written; None on all processes but the main one."""
        self._ownership = ownership
        self._writer: LedgerWriter | None = None
        self._waiting: list[tuple[int, dict[int, int]]] = []

    def on_start(self, run: Run, state: Any) -> None:
        del state
        if run.layout.is_main:
            self._writer = LedgerWriter(run.plan.directory / LEDGER_NAME)

    def on_step(self, run: Run) -> None:
        assert run.last is not None
        batch = run.last.batch
        read = batch.slots if run.layout.reads_data else []
        hashes = {slot: slot_hash(slot, *content) for slot, *content in zip(read, batch.tokens, batch.loss_mask, strict=True)}
        self._waiting.append((batch.step, hashes))
        if len(self._waiting) == _STEPS_AT_ONCE:
            self._write(run)

    def on_checkpoint(self, run: Run) -> None:
        self._write(run)
        if self._writer:
            self._writer.sync()

    def on_end(self, run: Run) -> None:
        self._write(run)
        self._close()

    def on_error(self, run: Run, error: BaseException) -> None:
        del run, error  # other processes may be gone, so what waits is given up; the next attempt does those steps again
        self._close()

    def _write(self, run: Run) -> None:
        if not self._waiting:
            return  # on every process: all have made the same steps
        require_owned(run.layout, self._ownership)
        if run.layout.world_size > run.layout.dp_size:
            refuse_disagreement(run.layout, self._waiting)
        parts = [self._waiting] if run.layout.dp_size == 1 else run.layout.gather_replicas(self._waiting)
        self._waiting = []
        if not self._writer:
            return
        for of_replicas in zip(*parts, strict=True):
            step = of_replicas[0][0]
            hashes = {slot: value for _, part in of_replicas for slot, value in part.items()}
            slots = run.plan.base.geometry.slots_of_step(step)
            digest = step_hash([hashes[slot] for slot in slots])
            self._writer.append(Entry(run.attempt, step, slots[0], len(slots), digest))

    def _close(self) -> None:
        if self._writer:
            self._writer.close()
            self._writer = None


def refuse_disagreement(layout: Layout, waiting: list[tuple[int, dict[int, int]]]) -> None:
    """UserError on every process where two of a replica have read different content (collective)."""
    digest = of_json([[step, sorted(hashes.items())] for step, hashes in waiting])
    found = layout.gather((layout.dp_rank, digest) if layout.reads_data else None)
    first: dict[int, tuple[int, str]] = {}
    for rank, entry in enumerate(found):
        if entry is None:
            continue
        replica, read = entry
        other, expected = first.setdefault(replica, (rank, read))
        if read != expected:
            raise UserError(
                f"In the steps {waiting[0][0]} to {waiting[-1][0]} the processes {other} and {rank} were to read the same slots and read different content. "
                "One of them has a damaged copy of a shard or another manifest. Run `megatron-exp verify` on corpus and manifest on the machines of both; the "
                "run goes on from its last checkpoint."
            )
