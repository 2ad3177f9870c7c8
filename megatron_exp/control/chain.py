"""The decisions of a run one after the other: what comes next, and what it inserts. Training grows it, `verify` grows it again."""

from collections.abc import Mapping

from megatron_exp.control.hand_out import Dispenser
from megatron_exp.control.loop import State, control_states, loops_of
from megatron_exp.control.segments import Segment
from megatron_exp.errors import UserError
from megatron_exp.manifest.reader import Manifest
from megatron_exp.overlay.decided import Decided

Answers = Mapping[str, Mapping[int, float | None]]
"""{experiment: {item: log-likelihood in nats}}; None where it could not be scored."""


class Chain:
    """All segments so far. `next_step`: the model state in which the next is decided, or the number of steps where all are."""

    def __init__(self, manifest: Manifest, masked: frozenset[str] = frozenset()):
        self.loops = loops_of(manifest, masked)
        self.segments: list[Segment] = []
        self.decided = Decided(manifest.geometry, 0 if self.loops else manifest.geometry.steps)
        self._states = [*control_states(self.loops), manifest.geometry.steps]
        self._latest: dict[str, State] = {}
        self._dispenser = Dispenser(manifest)
        self._origin = manifest.fingerprint

    @property
    def next_step(self) -> int:
        return self._states[len(self.segments)]

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to decide."""
        return len(self.segments) == len(self._states) - 1

    def decide(self, answers: Answers) -> Segment:
        """The next segment, by the rules of the experiments that decide now. It is not added."""
        step = self.next_step
        return self.made_of(
            {
                name: loop.decide(self._latest.get(name), answers.get(name, {}), step)
                for name, loop in self.loops.items()
                if step in loop.states
            }
        )

    def made_of(self, decisions: Mapping[str, State]) -> Segment:
        """The next segment, from decisions that were made before. It is not added."""
        previous = self.segments[-1].fingerprint if self.segments else self._origin
        return Segment(len(self.segments), self.next_step, decisions, self._dispenser.rows(self.loops, decisions), previous)

    def add(self, segment: Segment) -> None:
        """Go on with a segment; UserError where it decides other things than are to be decided now."""
        expected = {name for name, loop in self.loops.items() if self.next_step in loop.states}
        if self.is_complete or segment.step != self.next_step or set(segment.decisions) != expected:
            raise UserError(
                f"Segment {segment.number:04d} was decided in state {segment.step} for {', '.join(segment.decisions) or 'nobody'}; the manifest wants "
                f"{', '.join(sorted(expected)) or 'none'} in state {self.next_step}. It belongs to another run: use that run's directory."
            )
        self._latest.update(segment.decisions)
        self.segments.append(segment)
        self.decided.add(segment.rows, self.next_step)
