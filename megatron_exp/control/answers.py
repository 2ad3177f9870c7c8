"""Recorded answers to live probes, as a controller reads them."""

from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc

from megatron_exp.control.chain import Answers
from megatron_exp.control.loop import Loop


def answers_of(recorded: pa.Table, experiment: str, name: str, arm: str) -> dict[int, float | None]:
    """{item: value} of the rows (PROBES) of one attempt and state that answer this probe."""
    chosen = recorded
    for column, value in (("experiment", experiment), ("name", name), ("arm", arm)):
        chosen = chosen.filter(pc.equal(chosen[column].cast(pa.string()), value))
    return dict(zip(chosen["item"].to_pylist(), chosen["value"].to_pylist(), strict=True))


def recorded_answers(recorded: pa.Table, loops: Iterable[Loop], step: int) -> list[Answers]:
    """The answers in model state `step`, once for every attempt that recorded any, the first attempt first."""
    here = recorded.filter(pc.equal(recorded["step"], step))
    attempts = sorted(here["attempt"].unique().to_pylist())
    parts = [here.filter(pc.equal(here["attempt"], attempt)) for attempt in attempts]
    asking = list(loops)
    return [{loop.experiment: answers_of(part, loop.experiment, loop.probe, loop.arm) for loop in asking} for part in parts]
