"""What is worth an alert while a run trains: pure rules over numbers, nothing that an experiment asks about.

The rules see the training loss, the gradient norm and the validation loss. Outcomes of experiments are never looked at while the run
goes on: whoever stops a run because of its results no longer has the test that was pre-registered.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megatron_exp import fingerprint
from megatron_exp.manifest.reader import Manifest
from megatron_exp.run_record import Series

Kind = Literal["not_finite", "loss_spike", "gradient_spike", "drift", "data_wait", "stall"]

WINDOW = 128
"""Updates that are remembered."""
_FEWEST = 32
"""Updates before which nothing is called unusual."""
_DEVIATIONS = 8.0
"""Robust standard deviations from the median. Training loss has fat tails: at 8, a healthy run of 100,000 steps has few alerts."""
_SPIKE_NATS, _SPIKE_FACTOR = 0.1, 10.0
_DRIFT_POINTS = 8
_DRIFT_NATS, _DRIFT_NATS_FIRST = 0.01, 0.1
"""Differences below which a drift from the twins is of no interest; the second until there are `_DRIFT_POINTS` to compare with."""
_WAIT_SHARE, _WAIT_SECONDS = 0.05, 1.0
"""Data is late where the last `WINDOW` updates waited for it longer than both, as a share and together."""
PLANNED_SHARE = 0.1
"""A step is a planned exception from this share of its slots on."""


@dataclass(frozen=True)
class Alert:
    """kind: which rule. step: state after the update. value: what was seen; low, high: what was expected (None: no such bound)."""

    kind: Kind
    step: int
    value: float
    low: float | None
    high: float | None
    message: str


@dataclass
class Recent:
    """The newest values of one quantity, and what is usual among them."""

    values: list[float] = field(default_factory=list)

    def add(self, value: float) -> None:
        self.values = [*self.values, value][-WINDOW:]

    def median(self) -> float:
        return float(np.median(self.values))

    def spread(self) -> float:
        """Robust standard deviation."""
        return 1.4826 * float(np.median(np.abs(np.asarray(self.values) - self.median())))

    def __len__(self) -> int:
        return len(self.values)


class Spikes:
    """Notices updates that are far from those before; planned exceptions are passed over and not remembered.

    An alert opens an episode, and the next one of its kind comes only after a usual update has closed it.
    """

    def __init__(self, planned: dict[int, str], state: dict[str, Any] | None = None):
        """`planned`: from step to the experiments that rewrite it. `state`: what `state` gave."""
        state = state or {"loss": [], "gradient": [], "open": []}
        self._planned = planned
        self._loss, self._gradient = Recent(state["loss"]), Recent(state["gradient"])
        self._open: set[str] = set(state["open"])

    @property
    def state(self) -> dict[str, Any]:
        """JSON-able."""
        return {"loss": self._loss.values, "gradient": self._gradient.values, "open": sorted(self._open)}

    def look(self, step: int, loss: float, gradient_norm: float) -> Iterator[Alert]:
        """Alerts about the update that led to state `step`."""
        if step - 1 in self._planned:
            return
        if len(self._loss) >= _FEWEST:
            high = self._loss.median() + max(_SPIKE_NATS, _DEVIATIONS * self._loss.spread())
            yield from self._judge("loss_spike", step, loss, high, "the loss")
            yield from self._judge("gradient_spike", step, gradient_norm, _SPIKE_FACTOR * self._gradient.median(), "the gradient norm")
        self._loss.add(loss)
        self._gradient.add(gradient_norm)

    def _judge(self, kind: Kind, step: int, value: float, high: float, what: str) -> Iterator[Alert]:
        if value <= high:
            self._open.discard(kind)
        elif kind not in self._open:
            self._open.add(kind)
            yield Alert(kind, step, value, None, high, f"{what} of step {step - 1} is {value:.4g}; up to {high:.4g} would be usual after the steps before")


class Drift:
    """Notices that run and twins part: their difference leaves the band of the differences before.

    With several twins, the band is at least three times their own spread. The level of the difference is not judged: what the
    experiments insert raises or lowers the training loss by an amount of its own.
    """

    def __init__(self, what: str, twins: Sequence[Series], points_per_look: int, state: dict[str, Any] | None = None):
        """`what`: for messages. `twins`: their values by state. `points_per_look`: states whose mean is judged as one.

        `state`: what `state` gave; differences from other twins say nothing about these, and are forgotten.
        """
        self._what, self._points_per_look = what, points_per_look
        self._twins = twins
        self._by_state = [dict(zip(twin.steps.tolist(), twin.values.tolist(), strict=True)) for twin in twins]
        if state is None or state.get("twins") != self._compared(state.get("step", -1)):
            state = {"step": -1, "waiting": [], "past": [], "is_open": False}
        self._step: int = state["step"]
        self._waiting: list[list[float]] = state["waiting"]
        self._past = Recent(state["past"])
        self._is_open: bool = state["is_open"]

    @property
    def state(self) -> dict[str, Any]:
        """JSON-able."""
        compared = {"step": self._step, "twins": self._compared(self._step)}
        return {**compared, "waiting": self._waiting, "past": self._past.values, "is_open": self._is_open}

    def _compared(self, step: int) -> list[str]:
        """Fingerprints of what was seen of each twin up to state STEP; later a twin that is still trained may have more."""
        return [fingerprint.of_array(twin.values[twin.steps <= step]) for twin in self._twins]

    def look(self, step: int, value: float) -> Iterator[Alert]:
        """An alert about state `step`, where the twins have it."""
        twins = [values[step] for values in self._by_state if step in values]
        if not twins or len(twins) < len(self._by_state) or not all(map(math.isfinite, [*twins, value])):
            return
        self._step = step
        self._waiting.append([value, *twins])
        if len(self._waiting) < self._points_per_look:
            return
        mine, *theirs = np.mean(self._waiting, axis=0)
        self._waiting = []
        difference = float(mine - np.mean(theirs))
        middle, half = self._band(np.asarray(theirs))
        is_outside = abs(difference - middle) > half
        if is_outside and not self._is_open:
            low, high = middle - half, middle + half
            yield Alert(
                "drift", step, difference, low, high, f"{self._what} minus the twin's is {difference:.4g}; {low:.4g} to {high:.4g} would be as before"
            )
        self._is_open = is_outside
        self._past.add(difference)

    def _band(self, theirs: np.ndarray) -> tuple[float, float]:
        among_twins = 3.0 * float(np.abs(theirs - theirs.mean()).max())
        if len(self._past) < _DRIFT_POINTS:
            return 0.0, max(_DRIFT_NATS_FIRST, among_twins)
        return self._past.median(), max(_DRIFT_NATS, among_twins, _DEVIATIONS * self._past.spread())


class Waits:
    """Notices that the updates of an attempt wait for their data. The first one always does: nothing was read ahead for it."""

    def __init__(self) -> None:
        self._recent: list[tuple[float, float]] = []
        self._is_first, self._is_late = True, False

    def look(self, step: int, waited_seconds: float, seconds: float) -> Iterator[Alert]:
        """An alert about the update that led to state `step`, which took `seconds`, waiting included."""
        if self._is_first:
            self._is_first = False
            return
        self._recent = [*self._recent, (waited_seconds, seconds)][-WINDOW:]
        waited, took = (sum(column) for column in zip(*self._recent, strict=True))
        was_late = self._is_late
        self._is_late = len(self._recent) >= _FEWEST and waited > max(_WAIT_SECONDS, _WAIT_SHARE * took)
        if self._is_late and not was_late:
            message = f"{waited / took:.0%} of the last {len(self._recent)} updates was waiting for data, more than {_WAIT_SHARE:.0%}"
            yield Alert("data_wait", step, waited / took, None, _WAIT_SHARE, message)


def planned_exceptions(manifest: Manifest, masked: frozenset[str]) -> dict[int, str]:
    """From step to the experiments, comma-separated, that give it other content on purpose: exclusive swaps and noise over much of a batch."""
    table = manifest.insertions().select(["experiment", "step", "slot", "exclusive"])
    table = table.filter(table["exclusive"])
    experiments = table["experiment"].cast(pa.string())
    table = table.set_column(0, "experiment", experiments).filter(pc.invert(pc.is_in(experiments, pa.array(sorted(masked), pa.string()))))
    counted = table.group_by("step").aggregate([("slot", "count_distinct"), ("experiment", "distinct")])
    most = manifest.geometry.global_batch_size * PLANNED_SHARE
    return {row["step"]: ", ".join(sorted(row["experiment_distinct"])) for row in counted.to_pylist() if row["slot_count_distinct"] >= most}
