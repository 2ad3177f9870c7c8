"""One experiment's closed loop: when it decides, on what, and what follows. A pure function of recorded values."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megatron_exp.control.rules import Rule, Situation, find_rule
from megatron_exp.manifest.reader import Manifest


@dataclass(frozen=True)
class State:
    """What a controller knows after its decision in a model state, and all it needs for the next.

    step: the model state (updates done). number: copies in the interval that begins there. handed: copies handed out in all intervals before it.
    index: the place in the bank of the first of them, handed modulo the size of the bank. value, aim: what was measured, and what was
    to be; value is None in the first interval, which is declared, and where a query could not be scored, which leaves the number as it
    is. memory: the rule's own.
    """

    step: int
    number: int
    handed: int
    index: int
    value: float | None
    aim: float
    memory: tuple[float, ...] = ()

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "State":
        """From what `record` gave."""
        return cls(**{**record, "memory": tuple(record["memory"])})

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self) | {"memory": list(self.memory)}


@dataclass(frozen=True, kw_only=True)
class Loop:
    """A controller as a manifest holds it. interval, num_steps: in steps. asked: items whose answers to `probe` are measured, in this order."""

    experiment: str
    interval: int
    probe: str
    asked: tuple[int, ...]
    arm: str
    bank_size: int
    first: int
    largest: int
    target: float
    rule: Rule
    num_steps: int

    @property
    def states(self) -> range:
        """The model states in which it decides."""
        return range(0, self.num_steps, self.interval)

    def end_of(self, step: int) -> int:
        """Where the interval that begins in `step` ends."""
        return min(step + self.interval, self.num_steps)

    def decide(self, before: State | None, answers: Mapping[int, float | None], step: int) -> State:
        """The state after the decision in model state `step`.

        Args:
            before: the state one interval earlier; None in state 0.
            answers: {item: log-likelihood in nats} of the probe; None where it could not be scored. Not looked at in state 0.
            step: one of `states`.
        """
        aim = self.rule.aim(self.target, step / self.num_steps)
        if before is None:
            return State(step, self.first, 0, 0, None, aim)
        assert before.step == step - self.interval, (before.step, step)
        handed = before.handed + before.number
        index = handed % self.bank_size
        known = [value for item in self.asked if (value := answers.get(item)) is not None]
        if len(known) < len(self.asked):
            return State(step, before.number, handed, index, None, aim, before.memory)
        value = self.rule.measure(known)
        answer = self.rule.answer(Situation(before.number, value, aim, step / self.num_steps, self.largest, before.memory))
        return State(step, min(max(answer.number, 1), self.largest), handed, index, value, aim, tuple(answer.memory))


def loops_of(manifest: Manifest, masked: frozenset[str] = frozenset()) -> dict[str, Loop]:
    """The controllers of a manifest by experiment, without masked ones. UserError where a rule cannot be found any more."""
    return {
        name: Loop(
            experiment=name,
            interval=one["interval"],
            probe=one["probe"],
            asked=tuple(one["asked"]),
            arm=one["arm"],
            bank_size=one["bank_size"],
            first=one["first"],
            largest=one["largest"],
            target=one["target"],
            rule=find_rule(one["rule"], one["parameters"]),
            num_steps=manifest.geometry.steps,
        )
        for name, one in manifest.controllers.items()
        if name not in masked
    }


def control_states(loops: Mapping[str, Loop]) -> list[int]:
    """The model states in which any of the controllers decides; segment number i belongs to the i-th."""
    return sorted({step for loop in loops.values() for step in loop.states})
