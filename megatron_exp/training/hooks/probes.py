"""Live probes: what the manifest asks of the model in certain states, answered by the weights in memory."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megatron_exp.control.answers import answers_of
from megatron_exp.errors import UserError
from megatron_exp.files import write_file
from megatron_exp.manifest.schema import PROBES, SCHEMA_VERSION
from megatron_exp.parallel.agreement import on_main
from megatron_exp.scoring.probes import score_probes
from megatron_exp.training.hooks.base import Hook
from megatron_exp.training.run import Run

logger = logging.getLogger(__name__)

PROBES_NAME = "probes.parquet"


class ProbeHook(Hook):
    """Asks the live probes due in each state. Answers become durable with the checkpoint of that state or a later one.

    Answers that no checkpoint covers are lost with the attempt, which is right: the next attempt reaches those states again.
    """

    def __init__(self) -> None:
        self._probes = pa.table({})
        self._due: dict[int, list[int]] = {}
        self._written = PROBES.empty_table()
        self._new: list[pa.Table] = []
        self._latest = PROBES.empty_table()

    def on_start(self, run: Run, state: Any) -> None:
        del state
        self._probes = live_probes(run.plan.manifest.probes(), "twin" if run.plan.baseline else "run")
        self._due = due_states(self._probes, run.plan.num_steps)
        on_main(run.layout, lambda: self._recall(run))
        if run.step == 0:
            self.on_step(run)

    def _recall(self, run: Run) -> None:
        """What was answered before this attempt, on the main process."""
        self._written = read_answers(self._path(run))
        if run.resumed_from and run.step and not self._path(run).exists():  # state 0 is asked again
            self._take_over(run, run.resumed_from.parent.parent / PROBES_NAME)

    def _take_over(self, run: Run, path: Path) -> None:
        """Make the answers up to the checkpoint, which another run directory has at PATH, this one's: nobody asks them again."""
        answers = read_answers(path)
        earlier = answers.filter(pc.less_equal(answers["step"], run.step))
        if len(earlier):
            self._new.append(earlier)
            self.write(run)
        elif any(state <= run.step for state in self._due):
            logger.warning(
                "%s has no answers of the live probes up to step %d, and nobody asks them again: eval calls them not scorable. Put the file that training "
                "wrote with the checkpoint there, and begin again in an empty directory.",
                path,
                run.step,
            )

    def on_step(self, run: Run) -> None:
        due = self._due.get(run.step)
        self._latest = PROBES.empty_table()
        if not due:
            return
        answers = score_probes(run.scorer, self._probes.take(due), run.plan.manifest, run.plan.base)
        stamps = {"attempt": np.full(len(answers), run.attempt, np.uint16), "step": np.full(len(answers), run.step, np.uint32)}
        columns = [stamps[name] if name in stamps else answers[name] for name in PROBES.names]
        self._latest = pa.table(columns, schema=PROBES)
        self._new.append(self._latest)

    def answers(self, experiment: str, name: str, arm: str) -> dict[int, float | None]:
        """{item: value} of one experiment's probes of this name, as just answered in this state."""
        return answers_of(self._latest, experiment, name, arm)

    def on_checkpoint(self, run: Run) -> None:
        self.write(run)

    def on_end(self, run: Run) -> None:
        self.write(run)

    def write(self, run: Run) -> None:
        """Make all answers so far durable."""
        if self._new and run.layout.is_main:
            self._written = pa.concat_tables([self._written, *self._new]).unify_dictionaries()
            buffer = pa.BufferOutputStream()
            pq.write_table(self._written.replace_schema_metadata({"schema_version": str(SCHEMA_VERSION)}), buffer)
            write_file(self._path(run), buffer.getvalue())
        self._new = []

    def _path(self, run: Run) -> Path:
        return run.plan.directory / PROBES_NAME


def live_probes(probes: pa.Table, model: str) -> pa.Table:
    """The rows to be asked while MODEL ("run" or "twin") is trained."""
    asked = [live and model in of for live, of in zip(probes["live"].to_pylist(), probes["of"].to_pylist(), strict=True)]
    return probes.filter(pa.array(asked, pa.bool_()))


def due_states(probes: pa.Table, num_steps: int) -> dict[int, list[int]]:
    """State to row numbers; a probe without states is due in the final one."""
    due: dict[int, list[int]] = {}
    for row, states in enumerate(probes["states"].to_pylist()):
        for state in states or [num_steps]:
            due.setdefault(state, []).append(row)
    return due


def read_answers(path: Path) -> pa.Table:
    """All answers in a probes.parquet, of all attempts; empty where there is none yet."""
    if not path.exists():
        return PROBES.empty_table()
    try:
        return pq.read_table(path).cast(PROBES)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}). Move it away to train on without the answers so far, or restore it.") from error
