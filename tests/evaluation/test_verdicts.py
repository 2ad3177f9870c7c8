"""Verdicts as functions of numbers."""

import dataclasses
import math

import pytest

from megatron_exp.evaluation.verdicts import (
    CONTROL_FAILED,
    DETECTED,
    EQUIVALENT,
    NOT_DETECTED,
    control_failed,
    experiment_verdict,
    is_equivalent,
    is_tested,
    row_verdict,
)
from megatron_exp.experiments.protocol import Outcome, Score

OUTCOME = Outcome(
    name="auc", estimand="", unit="AUC", test="", side="greater", family="primary", margin=0.02, smallest_effect=0.05, null=0.5
)
SCORE = Score(outcome="auc", condition="x16", step=100, n=40, num_clusters=40, estimate=0.51, low=0.4, high=0.6, p=0.3)


def changed(**values):
    return dataclasses.replace(SCORE, **values)


def test_a_small_corrected_p_is_a_detection_however_narrow_the_interval():
    assert row_verdict(changed(low=0.501, high=0.502), OUTCOME, 0.04) == DETECTED
    assert row_verdict(SCORE, OUTCOME, 0.05) == NOT_DETECTED


def test_the_level_of_the_interval_sets_the_level_of_the_test():
    assert row_verdict(changed(level=0.99), OUTCOME, 0.04) == NOT_DETECTED


def test_an_interval_inside_the_margin_around_the_null_shows_that_there_is_nothing():
    assert row_verdict(changed(low=0.481, high=0.519), OUTCOME, 0.3) == EQUIVALENT
    assert row_verdict(changed(low=0.479, high=0.519), OUTCOME, 0.3) == NOT_DETECTED
    assert row_verdict(changed(low=-0.01, high=0.01), OUTCOME, 0.3) == NOT_DETECTED  # inside the margin of 0, but the null is 0.5


def test_nothing_is_equivalent_without_an_interval_or_a_margin():
    assert not is_equivalent(changed(low=math.nan, high=math.nan), OUTCOME)
    assert not is_equivalent(changed(low=0.5, high=0.5), dataclasses.replace(OUTCOME, margin=0.0))


def test_what_could_not_be_scored_says_why_and_is_never_a_result():
    assert row_verdict(changed(reason="no slot was scored", estimate=math.nan), OUTCOME, math.nan) == "not scorable: no slot was scored"
    assert row_verdict(changed(p=math.nan, low=0.5, high=0.5), OUTCOME, math.nan) == "not scorable: no test was possible"


@pytest.mark.parametrize(
    ("score", "outcome", "tested"),
    [
        (SCORE, OUTCOME, True),
        (changed(step=50), OUTCOME, False),
        (changed(exploratory=True), OUTCOME, False),
        (SCORE, None, False),
        (SCORE, dataclasses.replace(OUTCOME, family="descriptive"), False),
        (SCORE, dataclasses.replace(OUTCOME, state="50"), False),
        (changed(step=50), dataclasses.replace(OUTCOME, state="50"), True),
        (changed(outcome="control:twin"), dataclasses.replace(OUTCOME, name="control:twin", family="secondary"), False),
        (changed(p=math.nan), OUTCOME, True),
    ],
)
def test_only_pre_registered_outcomes_in_their_state_are_tested(score, outcome, tested):
    assert is_tested(score, outcome, 100) is tested


def test_only_controls_with_tiny_p_in_the_tested_state_fail():
    control = changed(outcome="control:twin", p=0.0009)
    assert control_failed(control, None, 100)
    assert not control_failed(dataclasses.replace(control, p=0.001), None, 100)
    assert not control_failed(dataclasses.replace(control, step=50), None, 100)
    assert not control_failed(dataclasses.replace(control, p=math.nan), None, 100)
    assert not control_failed(changed(p=0.0), OUTCOME, 100)


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        ([NOT_DETECTED, DETECTED], DETECTED),
        ([DETECTED, CONTROL_FAILED], CONTROL_FAILED),
        ([EQUIVALENT, NOT_DETECTED], NOT_DETECTED),
        ([EQUIVALENT, "not scorable: a"], EQUIVALENT),
        (["not scorable: a"], "not scorable: a"),
        ([], None),
    ],
)
def test_an_experiment_is_judged_by_its_primary_rows(found, verdict):
    assert experiment_verdict(found) == verdict
