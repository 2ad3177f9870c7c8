"""The decisions of a run made again from what its probes said, by the rules that the manifest names."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_exp import fingerprint
from megatron_exp.control.answers import recorded_answers
from megatron_exp.control.chain import Chain
from megatron_exp.control.segments import Segment, segment_path
from megatron_exp.errors import UserError
from megatron_exp.inspection.findings import Finding
from megatron_exp.inspection.targets import Target
from megatron_exp.manifest.schema import PROBES

_PROBES_NAME = "probes.parquet"
_SAME = 1e-12
"""Means of exponentials may differ in the last digits from one C library to another; the numbers of copies may not."""


def verify_segments(target: Target, steps_done: int) -> Iterator[Finding]:
    """Every decision is there, follows from recorded answers, and hands out what the manifest says. `steps_done`: by the ledger."""
    run = target.run
    assert run is not None
    try:
        found = target.segments
        chain = Chain(target.manifest, run.masked)
        recorded = _recorded(target) if found else PROBES.empty_table()
    except UserError as error:
        yield Finding(str(run.path), str(error))
        return
    if run.baseline:
        return
    for segment in found:
        place = str(segment_path(run.path, segment.number))
        try:
            yield from _problems(chain, segment, recorded, run.first_state, place)
            chain.add(segment)
        except UserError as error:
            yield Finding(place, str(error))
            return
    if not chain.is_complete and chain.next_step < steps_done:
        path = segment_path(run.path, len(found))
        yield Finding(str(path), f"it is missing, but steps were made from {chain.next_step} on, where it decides")


def _problems(chain: Chain, segment: Segment, recorded: pa.Table, first_state: int, place: str) -> Iterator[Finding]:
    """What is wrong with the next segment of the chain. `first_state`: of the run."""
    if chain.is_complete or segment.step != chain.next_step:
        return  # `Chain.add` says so
    answers = recorded_answers(recorded, chain.loops.values(), segment.step) if segment.number else [{}]
    if not answers:
        is_earlier = segment.step <= first_state
        where = ": they were given in the directory of the checkpoint that this run began with" if is_earlier else ""
        yield Finding(place, f"{_PROBES_NAME} has no answers of state {segment.step}, from which it was decided{where}", normal=is_earlier)
    elif not any(_same_decisions(chain.decide(one), segment) for one in answers):
        again = chain.decide(answers[-1]).decisions
        told = "; ".join(
            f"{name}: {state.number} copies after {state.value} was measured, recorded are {recorded_state.number} after {recorded_state.value}"
            for name, state in again.items()
            if (recorded_state := segment.decisions.get(name)) and state != recorded_state
        )
        found = f"the rules decide otherwise on the answers that {_PROBES_NAME} has of state {segment.step} ({told or 'other experiments'})"
        yield Finding(place, found)
    made = chain.made_of(segment.decisions)
    if fingerprint.of_table(made.rows) != fingerprint.of_table(segment.rows):
        yield Finding(place, "its rows are not what its decisions hand out by the bank and the reserve of the manifest")


def _same_decisions(made: Segment, found: Segment) -> bool:
    if made.decisions.keys() != found.decisions.keys():
        return False
    pairs = [(made.decisions[name], found.decisions[name]) for name in made.decisions]
    whole = all((a.step, a.number, a.handed, a.index) == (b.step, b.number, b.handed, b.index) for a, b in pairs)
    return whole and all(
        len(a.memory) == len(b.memory)
        and (a.value is None) == (b.value is None)
        and np.allclose([a.value or 0.0, a.aim, *a.memory], [b.value or 0.0, b.aim, *b.memory], rtol=_SAME, atol=0)
        for a, b in pairs
    )


def _recorded(target: Target) -> pa.Table:
    path = target.path / _PROBES_NAME
    if not path.exists():
        return PROBES.empty_table()
    try:
        return pq.read_table(path).cast(PROBES)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}). It is damaged: restore it from a copy.") from error
