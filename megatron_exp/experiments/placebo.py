"""Placebo: the whole path with an effect that cannot exist. Whatever it detects is a fault of the run, of the scoring or of a test.

Question: does a run show effects on sequences that no insertion touched?
Design: pool sequences replace whole slots, exclusively, as in `iid_replacements`. None of these is ever scored. Scored are others: two equal
    sets of pool sequences, neither of them inserted; the key deals every sequence to one of the sets. They are cut into `num_tests`
    small placebo experiments of `sequences_per_test` in each set, and every one of them is tested as a real one would be.
Conditions: swapped (inserted, not scored), placebo (scored in the role of treated ones), never-inserted (their controls).
Metric: gain in nats per token: loss of the twin minus loss of the run on the sequence. Primary: mean gain of the placebo set minus that of the
    controls, two-sided, by a rank sum within the small experiments. Beside it the rejection rate: the share of the small experiments with p at most 5%,
    against the 5% that chance allows. Both are named `control:...`: they belong to no family of hypotheses, and where one of them
    has p < 0.001 the verdict is `control failed`. Then distrust the results of all experiments of the run.
Source: our own; placebo tests after Athey and Imbens, "The State of Applied Econometrics", J. Econ. Perspect. 31 (2017).
Licence: the training data's own; nothing is added.
Traps: it finds faults that treat scored sequences differently by their label: a pool slot that leaked into training, answers joined to the wrong
    item, a test that is not calibrated. A fault that hits both sets alike, or inserted text only, shows elsewhere (`verify`, `control:twin`).
Parameters: num_tests small experiments; sequences_per_test in each of their two sets; num_swapped slots replaced.
Example: test 7, placebo 2.81 2.81 (run, twin), never-inserted 2.84 2.83; p = 0.62. Rejected: 1 of 20.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from megatron_exp.experiments.context import Context
from megatron_exp.experiments.contrasts import contrast_score
from megatron_exp.experiments.dependence import Dependence
from megatron_exp.experiments.frames import Frame, asked, joined
from megatron_exp.experiments.protocol import Analysis, Experiment, Item, Outcome, Probe, Request, Score, SlotLoss, Window
from megatron_exp.seeding import Words
from megatron_exp.statistics.proportions import binomial_p, wilson_interval
from megatron_exp.stream.slot import POOL

_PROBE = "loss"
_ALPHA = 0.05
_SWAPPED_ITEMS = 1 << 48
"""Item numbers of swapped sequences start here, those of scored ones at 0."""


class Placebo(Experiment):
    """Swaps whose scored sequences are others: it must find nothing."""

    title: ClassVar[str] = "Placebo"
    question: ClassVar[str] = "Does the run show effects where there can be none?"
    citation: ClassVar[str] = "a check of this package's own"
    needs: ClassVar[frozenset[str]] = frozenset({"pool"})

    num_tests: Annotated[int, Field(ge=2, le=10_000)] = 20
    sequences_per_test: Annotated[int, Field(ge=4)] = 5
    num_swapped: Annotated[int, Field(gt=0)] = 20

    # ---- planning ----

    def items(self, context: Context) -> Iterator[Item]:
        """The scored sequences of every small experiment, then the swapped ones."""
        shared: dict[str, Any] = {"source": "training data, from the pool", "licence": "that of the training data"}
        size = 2 * self.sequences_per_test
        units = range(self.num_tests * size)
        slots = context.take_pool("scored", len(units)).tolist()
        stratum = {unit: f"test-{unit // size:04d}" for unit in units}
        half = len(units) // 2
        assigned = context.assign(units, {"placebo": half, "never-inserted": half}, stratum)
        for unit, slot in enumerate(slots):
            yield Item(
                item=unit,
                condition=assigned[unit],
                role="probe-only" if assigned[unit] == "placebo" else "control",
                stratum=stratum[unit],
                metadata={"pool_place": slot - POOL},
                **shared,
            )
        for index, slot in enumerate(context.take_pool("swapped", self.num_swapped).tolist()):
            yield Item(item=_SWAPPED_ITEMS + index, condition="swapped", role="treated", metadata={"pool_place": slot - POOL}, **shared)

    def requests(self, items: Sequence[Item], context: Context) -> Iterator[Request]:
        """Every swapped sequence replaces one slot, anywhere in training, exclusively."""
        for item in items:
            if item.role == "treated":
                source = np.array([POOL + item.metadata["pool_place"]], dtype=np.uint64)
                window = Window(0, context.geometry.steps)
                yield Request(item=item.item, kind="swap", where=window, copies=1, exclusive=True, source_slots=source)

    def probes(self, items: Sequence[Item], placed: pa.Table, context: Context) -> Iterator[Probe]:
        """The loss of every scored sequence in the final state; the swapped ones are not asked about."""
        del placed, context
        for item in items:
            if item.role != "treated":
                yield Probe(item=item.item, name=_PROBE, ask=SlotLoss(POOL + item.metadata["pool_place"]))

    @property
    def dependence(self) -> Dependence:
        """None: what it inserts is not what it asks about."""
        return Dependence(untestable="a placebo has no effect of its own that could change")

    # ---- analysis ----

    @property
    def analysis(self) -> Analysis:
        """Two checks, and the p-values of the small experiments as description."""
        return Analysis(
            (
                Outcome(
                    name="control:placebo",
                    estimand="mean gain of the placebo set minus that of its controls; nothing can have caused one",
                    unit="nats per token",
                    test="rank sum within small experiments",
                    side="two-sided",
                    family="primary",
                    margin=0.001,
                    smallest_effect=0.005,
                ),
                Outcome(
                    name="control:rejection-rate",
                    estimand="share of the small placebo experiments with p at most 5%",
                    unit="fraction",
                    test="exact binomial test against 5%",
                    side="greater",
                    family="secondary",
                    null=_ALPHA,
                    margin=0.05,
                    smallest_effect=0.2,
                ),
                Outcome(
                    name="gain-of-test",
                    estimand="the first check's contrast in one small experiment",
                    unit="nats per token",
                    test="rank sum",
                    side="two-sided",
                    family="descriptive",
                    margin=0.001,
                    smallest_effect=0.005,
                ),
            )
        )

    def score(self, items: pa.Table, responses: pa.Table) -> Iterator[Score]:
        """Both checks at every state there are responses for, and every small experiment."""
        losses = joined(items, responses).of_probe(_PROBE)
        gains = losses.filled(-losses.run, -losses.twin)
        for step in gains.steps:
            now = gains.at(step)
            tests = [
                contrast_score(now.where(now.stratum == name), "gain-of-test", name, step, "two-sided") for name in sorted(set(now.stratum))
            ]
            yield contrast_score(now, "control:placebo", "placebo", step, "two-sided")
            yield _rejection_rate(now, tests, step)
            yield from tests

    def simulate(self, items: pa.Table, probes: pa.Table, effect: float, words: Words) -> pa.Table:
        """Sequences differ by 0.2 nats, run and twin by 0.01 a sequence; the placebo set gains `effect`, as only a fault could make it."""
        frame = asked(items, probes)
        level = 2.8 + 0.2 * words.child("sequences").normals(len(frame))
        twin = level + 0.01 * words.child("twin").normals(len(frame))
        run = level + 0.01 * words.child("run").normals(len(frame)) - effect * (frame.role == "probe-only")
        return frame.filled(run, twin).responses()


def _rejection_rate(frame: Frame, tests: Sequence[Score], step: int) -> Score:
    """How many of the small experiments would have reported an effect at 5%."""
    p_values = np.array([test.p for test in tests if np.isfinite(test.p)])
    rejected = int((p_values <= _ALPHA).sum())
    rate = rejected / len(p_values) if len(p_values) else float("nan")
    low, high = wilson_interval(rejected, len(p_values))
    return Score(
        outcome="control:rejection-rate",
        condition=f"{rejected} of {len(p_values)} tests",
        step=step,
        n=int(np.isfinite(frame.change).sum()),
        num_clusters=len(p_values),
        num_unscored=int((~np.isfinite(frame.change)).sum()),
        estimate=rate,
        low=low,
        high=high,
        control=_ALPHA,
        difference=rate - _ALPHA,
        p=binomial_p(rejected, len(p_values), _ALPHA, "greater") if len(p_values) else float("nan"),
        test=f"exact binomial test, {frame.compared}",
        reason="" if len(p_values) else "no small experiment had scored sequences of both sets",
    )
