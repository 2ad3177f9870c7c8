"""Closed loops: what the controllers of the manifest decide on the live model, durable before the first slot it touches is read."""

import logging
from typing import Any

from megatron_exp.control.chain import Chain
from megatron_exp.control.loop import State
from megatron_exp.control.segments import Segment, decode, read_segments, segment_path
from megatron_exp.errors import UserError
from megatron_exp.files import make_directory, write_file
from megatron_exp.parallel.agreement import on_main
from megatron_exp.training.hooks.base import Hook
from megatron_exp.training.hooks.probes import ProbeHook
from megatron_exp.training.metrics_log import MetricsLog
from megatron_exp.training.run import Run

logger = logging.getLogger(__name__)


class ControlHook(Hook):
    """Decides on the main process: answers of the probes, then the segment, are written durably, and its bytes go to all processes.

    A segment found at the start counts, whoever wrote it: slots may have been read by it. So an attempt that comes to a decision of an earlier one
    again takes the recorded one, and what its own probes say changes nothing. A checkpoint holds the decisions made so far: where the files are
    gone (another directory), they are written again.
    """

    name = "control"

    def __init__(self, probes: ProbeHook, log: MetricsLog | None):
        self._probes = probes
        self._log = log
        self._chain: Chain | None = None

    def on_start(self, run: Run, state: Any) -> None:
        self._chain = run.plan.chain
        if self._chain is None:
            return
        covered = state["decisions"] if state else []
        for data in on_main(run.layout, lambda: self._settled(run, covered)):
            self._take(run, data)
        if run.step == 0:
            self.on_step(run)

    def on_step(self, run: Run) -> None:
        if self._chain is None:
            return
        if not self._chain.is_complete and run.step == self._chain.next_step:
            self._probes.write(run)
            self._take(run, on_main(run.layout, lambda: self._decided(run)))
        for segment in self._chain.segments:
            if segment.step == run.step:  # also one taken over from an earlier attempt, whose measurements no longer count
                self._report(run, segment)

    def on_checkpoint(self, run: Run) -> Any:
        if self._chain is None:
            return None
        return {
            "decisions": [
                {name: one.record() for name, one in sorted(segment.decisions.items())}
                for segment in self._chain.segments
                if segment.step <= run.step
            ]
        }

    def _settled(self, run: Run, covered: list[dict[str, Any]]) -> list[bytes]:
        """The contents of all segments that count, which are files of this run afterwards."""
        found = read_segments(run.plan.directory, run.plan.manifest.fingerprint)
        chain = Chain(run.plan.manifest, run.plan.masked)
        for number, decisions in enumerate(covered):
            segment = chain.made_of({name: State.of(one) for name, one in decisions.items()})
            if number == len(found):
                self._write(run, number, segment.encode())
                found.append(segment)
            elif found[number].fingerprint != segment.fingerprint:
                raise UserError(
                    f"{segment_path(run.plan.directory, number)} is not the decision that the checkpoint of step {run.step} was trained with. The directory "
                    "holds segments of another run: move its segments away, or train into another directory."
                )
            chain.add(segment)
        return [segment.encode() for segment in found]

    def _decided(self, run: Run) -> bytes:
        """The content of the next segment, which is a file afterwards; on the main process."""
        assert self._chain is not None
        asked = {name: self._probes.answers(name, loop.probe, loop.arm) for name, loop in self._chain.loops.items()}
        segment = self._chain.decide(asked)
        data = segment.encode()
        self._write(run, segment.number, data)
        return data

    def _write(self, run: Run, number: int, data: bytes) -> None:
        path = segment_path(run.plan.directory, number)
        make_directory(path.parent)
        write_file(path, data)

    def _take(self, run: Run, data: bytes) -> None:
        assert self._chain is not None
        self._chain.add(decode(data, segment_path(run.plan.directory, len(self._chain.segments))))

    def _report(self, run: Run, segment: Segment) -> None:
        if not run.layout.is_main:
            return
        for name, state in segment.decisions.items():
            numbers = {"copies": state.number, "handed_out": state.handed, "aim": state.aim}
            if self._log:
                self._log.write(run.step, {f"control/{name}": numbers | ({} if state.value is None else {"value": state.value})})
            measured = "nothing was measured" if state.value is None else f"{state.value:.3g} measured, {state.aim:.3g} wanted"
            logger.info("Controller of %s in state %d: %s; %d copies next.", name, run.step, measured, state.number)
