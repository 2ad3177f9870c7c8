"""How a controller answers what it measured: small rules, found by name, pure functions of recorded numbers.

A rule of your own is a subclass of `Rule` in any importable module, named `package.module:Class` in the experiment's `rule`.
"""

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megatron_exp.errors import UserError

Positive = Annotated[float, Field(gt=0)]


class Situation(NamedTuple):
    """What a rule decides on.

    number: copies in the interval that ends now. value: what was measured. aim: what was to be measured now, > 0. share: of the run that
    is done, in (0, 1). largest: most copies in an interval. memory: what the rule itself returned the last time, empty at first.
    """

    number: int
    value: float
    aim: float
    share: float
    largest: int
    memory: tuple[float, ...]


class Answer(NamedTuple):
    """The copies wanted in the next interval, before they are limited to [1, largest], and numbers to remember."""

    number: int
    memory: tuple[float, ...] = ()


class Rule(BaseModel):
    """The fields are the parameters. Subclasses give `answer`; most leave `measure` and `aim` alone."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def measure(self, nats: Sequence[float]) -> float:
        """What is controlled: the mean probability of all queries, whose log-likelihoods in nats are given."""
        return math.fsum(math.exp(value) for value in nats) / len(nats)

    def aim(self, target: float, share: float) -> float:
        """What is to be measured when `share` of the run is done: a straight line from 0 to `target`."""
        return target * share

    def answer(self, now: Situation) -> Answer:
        """How many copies next. A pure function: no file, no clock, no draw."""
        raise NotImplementedError


class HalveOrDouble(Rule):
    """The rule of arXiv 2509.23383 (Algorithm 1): half as many copies where too much was measured, twice as many where too little.

    upper, lower: factors of the aim between which the number stays. caps: (share of the run, largest change of the number after it), so that the
    rule stops to oscillate; None is no limit. The paper's are 256 after step 19,000 and 64 after step 59,000 of 100,000.
    """

    upper: Positive = 1.05
    lower: Positive = 0.95
    caps: tuple[tuple[Annotated[float, Field(ge=0, le=1)], Annotated[int, Field(gt=0)] | None], ...] = (
        (0.0, None),
        (0.19, 256),
        (0.59, 64),
    )

    @model_validator(mode="after")
    def _check(self) -> "HalveOrDouble":
        starts = [start for start, _ in self.caps]
        if not starts or starts[0] != 0 or sorted(set(starts)) != starts:
            raise ValueError(f"caps must begin at 0 and rise, got {starts}")
        if self.lower > self.upper:
            raise ValueError(f"lower {self.lower} is above upper {self.upper}")
        return self

    def answer(self, now: Situation) -> Answer:
        """Halved is rounded down."""
        wanted = now.number
        if now.value > self.upper * now.aim:
            wanted = now.number // 2
        elif now.value < self.lower * now.aim:
            wanted = 2 * now.number
        cap = [change for start, change in self.caps if start == 0 or now.share > start][-1]
        if cap is not None:
            wanted = min(max(wanted, now.number - cap), now.number + cap)
        return Answer(wanted)


class ProportionalIntegral(Rule):
    """A PI controller on the log scale: log n changes by `proportional` x (e - e before) + `integral` x e, with e = log(aim / value).

    In this form nothing winds up while the number is at a limit. |e| counts up to `largest_error`, because a model that knows nothing yet measures
    many orders of magnitude below its aim. It remembers log n, which rounding would otherwise hold at 1, and e.
    """

    proportional: Annotated[float, Field(ge=0)] = 0.5
    integral: Positive = 0.25
    largest_error: Positive = 3.0

    def answer(self, now: Situation) -> Answer:
        """Rounded to the nearest whole number."""
        known, before = now.memory or (math.log(now.number), 0.0)
        error = math.log(now.aim / now.value) if now.value > 0 else self.largest_error
        error = min(max(error, -self.largest_error), self.largest_error)
        change = self.proportional * (error - before) if now.memory else 0.0
        level = min(max(known + change + self.integral * error, 0.0), math.log(now.largest))
        return Answer(round(math.exp(level)), (level, error))


RULES: dict[str, type[Rule]] = {"halve_or_double": HalveOrDouble, "proportional_integral": ProportionalIntegral}
"""The rules of this package."""


def find_rule(name: str, parameters: Mapping[str, Any]) -> Rule:
    """The rule of a name with its parameters; UserError for an unknown name and for parameters it refuses."""
    found = _class_of(name)
    try:
        return found(**parameters)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, one['loc'])) or 'it'}: {one['msg']}" for one in error.errors())
        raise UserError(
            f"The rule {name} refuses its parameters {dict(parameters)}: {problems}. It takes {', '.join(found.model_fields) or 'none'}."
        ) from error


def _class_of(name: str) -> type[Rule]:
    if name in RULES:
        return RULES[name]
    module_name, separator, class_name = name.partition(":")
    if not separator:
        raise UserError(f"There is no rule {name!r}. There are {', '.join(RULES)}; one of your own is named package.module:Class.")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise UserError(
            f"The rule {name!r} is in a module that cannot be imported. Install its package, or put its folder on PYTHONPATH."
        ) from error
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, Rule)):
        raise UserError(f"The rule {name!r}: {module_name} defines no subclass of {Rule.__module__}.Rule of that name. Correct the name.")
    return found
