"""Every experiment conforms, those of others can be expressed, and planted faults are found.

The faulty experiments below share this description, so that each has one fault only. Question: none. Design: of passages in tiers.
Conditions: tiers of copies. Metric: AUC. Source: here. Licence: Apache-2.0. Example: none. Parameters: num, tiers.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from megatron_exp.experiments.benchmark_contamination import BenchmarkContamination
from megatron_exp.experiments.conformance import check_experiment, null_p_values, toy_context
from megatron_exp.experiments.draft import draft
from megatron_exp.experiments.knowledge_acquisition import KnowledgeAcquisition
from megatron_exp.experiments.memorization_patterns import MemorizationPatterns
from megatron_exp.experiments.pretraining_poisoning import PretrainingPoisoning
from megatron_exp.experiments.protocol import LogLikelihood, Probe, Request, Span, Window
from megatron_exp.seeding import Words
from tests.experiments.calibration import REPLICATES, require_no_more_than_nominal, require_nominal, require_stated_power
from tests.experiments.small import CHATS, DIALOGUES, SMALL, SMALLEST, TEXTS
from tests.experiments.stubs import STUBS, Passages
from tests.toy import toy_stream

LARGER = {
    "contamination-paper": BenchmarkContamination(levels=(4,), num_questions=(200,), num_held_out=200, groups=("uniform",), design="paper"),
    "knowledge": KnowledgeAcquisition(**TEXTS | {"num_texts": 24, "num_never": 24}),
    "poisoning": PretrainingPoisoning(**CHATS | {"num_evaluation_prompts": 2, "num_never_trained": 39}, denial_of_service=0),
    "memorization": MemorizationPatterns(
        **DIALOGUES | {"suffix_types": ("plain",), "num_per_condition": 60, "num_held_out": 60}, repetitions=(4,)
    ),
}
"""Where the smallest detectable effect of the smallest design is so large that an AUC nears its end, or the units so few that a rank test has few levels, or
that right answers, whose spread grows with their share, are far more than chance."""
NOT_MEASURED = frozenset({"placebo"})
"""The placebo must find nothing."""


@pytest.mark.parametrize("name", SMALL)
def test_every_experiment_conforms(name):
    assert check_experiment(SMALL[name], toy_context(name)) == []


@pytest.mark.parametrize("stub", STUBS, ids=lambda stub: stub.__name__)
def test_the_protocol_expresses_experiments_of_others(stub):
    context = toy_context("stub", steps=60, length=64 if "corpus" in stub.needs else 256)
    context = replace(context, stream=toy_stream(("a", 40_000), ("b", 20_000), steps=60, batch=8, length=64, pool=32))
    assert check_experiment(stub(), context) == []


@pytest.mark.parametrize("name", SMALLEST)
def test_primaries_are_calibrated_without_an_effect(name):
    planned = draft(SMALLEST[name], toy_context(name))
    require_no_more_than_nominal(null_p_values(SMALLEST[name], planned, REPLICATES, Words.of(0, "calibration", name)))


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_two_thousand_runs_without_an_effect_give_the_nominal_rate_of_false_positives(name, request):
    require_nominal(SMALLEST[name], toy_context(name), Words.of(0, request.node.name))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(SMALLEST) - NOT_MEASURED))
def test_the_smallest_detectable_effect_is_detected_in_four_of_five_runs(name, request):
    require_stated_power(LARGER.get(name, SMALLEST[name]), toy_context(name), Words.of(0, request.node.name))


class Undocumented(Passages):
    """Nothing is said about its parameter."""

    undescribed: int = 0


class WithoutControls(Passages):
    """Every passage is inserted."""

    tiers: tuple[int, ...] = (1, 4)


class SpanOutside(Passages):
    """A span leaves its payload."""

    def items(self, context):
        return (replace(item, spans=(Span("tail", 2, 10_000),)) for item in super().items(context))


class TooLong(Passages):
    """Payloads longer than a slot."""

    def items(self, context):
        return (replace(item, payload=np.ones(10_000, np.int32)) for item in super().items(context))


class Forgetful(Passages):
    """One treated item is never inserted."""

    def requests(self, items, context):
        return (
            request for request in super().requests(items, context) if request.item != max(i.item for i in items if i.role == "treated")
        )


class OrderDependent(Passages):
    """Places depend on the position in a list."""

    def requests(self, items, context) -> Iterator[Request]:
        for position, item in enumerate(items):
            if item.role == "treated":
                yield Request(item=item.item, kind="tokens", where=Window(position, context.geometry.steps), copies=1)


class Unrepeatable(Passages):
    """Remembers how often it was asked."""

    def items(self, context):
        CALLS.append(1)
        return (replace(item, condition=f"call-{len(CALLS)}") for item in super().items(context))


class NothingCompared(Passages):
    """Controls are asked other questions than treated items."""

    def probes(self, items, placed, context):
        for item in items:
            yield Probe(item=item.item, name=item.role, ask=LogLikelihood(item.payload, 1, 3))


class WrongSign(Passages):
    """Its score goes down where the effect goes up."""

    def score(self, items, responses):
        return (replace(score, estimate=1 - score.estimate) for score in super().score(items, responses))


class ZeroForUnscored(Passages):
    """A missing answer becomes a zero."""

    def score(self, items, responses):
        return (replace(score, estimate=float(np.nan_to_num(score.estimate)), reason="") for score in super().score(items, responses))


class TooSmall(Passages):
    """Cannot find ten times its smallest effect of interest."""

    num: int = 4
    tiers: tuple[int, ...] = (0, 1)


CALLS: list[int] = []
FAULTS = {
    Undocumented: "does not explain the parameter undescribed",
    WithoutControls: "has no control item",
    SpanOutside: "span tail [2, 10000) does not lie in its payload",
    TooLong: "cannot be planned",
    Forgetful: "1 treated items are never requested",
    OrderDependent: "requests depend on the order",
    Unrepeatable: "twice gives different items",
    NothingCompared: "nothing to compare",
    WrongSign: "against its declared side",
    ZeroForUnscored: "yet it has an estimate or no reason",
    TooSmall: "too small to find it",
}


@pytest.mark.parametrize("faulty", FAULTS, ids=lambda faulty: faulty.__name__)
def test_a_planted_fault_is_found(faulty):
    findings = check_experiment(faulty(), toy_context("faulty", steps=60, length=256))
    assert any(FAULTS[faulty] in finding for finding in findings), findings
