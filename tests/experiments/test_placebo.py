from collections import Counter

import numpy as np
import pytest

from megatron_exp.evaluation.results import correct, experiment_rows, judge
from megatron_exp.evaluation.verdicts import CONTROL_FAILED, NOT_DETECTED
from megatron_exp.experiments.conformance import toy_context
from megatron_exp.experiments.draft import draft
from megatron_exp.experiments.frames import FINAL
from megatron_exp.experiments.placebo import Placebo
from megatron_exp.seeding import Words
from megatron_exp.stream.slot import POOL

EXPERIMENT = Placebo()
WORDS = Words.of(0, "tests", "placebo")


@pytest.fixture(scope="module")
def planned():
    return draft(EXPERIMENT, toy_context("placebo"))


def rows_of(planned, effect):
    responses = EXPERIMENT.simulate(planned.item_table, planned.probe_table, effect, WORDS)
    rows = experiment_rows("placebo", EXPERIMENT.analysis.outcomes, list(EXPERIMENT.score(planned.item_table, responses)), FINAL)
    sizes = correct(rows, 0)
    judge(rows)
    return {row.score.outcome: row for row in rows}, sizes


def test_nothing_that_is_scored_is_ever_inserted(planned):
    scored = {probe.ask.slot for probe in planned.probes}
    inserted = set(planned.insertions["source_slot"].to_pylist())
    assert len(scored) == 200 and len(inserted) == 20 and not scored & inserted and min(scored | inserted) >= POOL


def test_every_small_experiment_has_as_many_placebos_as_controls(planned):
    counts = Counter((item.stratum, item.condition) for item in planned.items if item.condition != "swapped")
    assert len(counts) == 40 and set(counts.values()) == {5}


def test_labels_are_drawn_by_key(planned):
    other = {item.item: item.condition for item in EXPERIMENT.items(toy_context("placebo", assignment=1))}
    assert any(item.condition != other[item.item] for item in planned.items)


def test_a_sound_run_passes_and_takes_no_place_in_any_family(planned):
    rows, sizes = rows_of(planned, 0.0)
    assert sizes == {}
    assert rows["control:placebo"].verdict == rows["control:rejection-rate"].verdict == NOT_DETECTED


def test_a_run_that_tells_placebos_from_controls_has_failed(planned):
    rows, _ = rows_of(planned, 0.03)
    assert rows["control:placebo"].verdict == rows["control:rejection-rate"].verdict == CONTROL_FAILED
    assert rows["control:placebo"].is_primary


def test_the_rejection_rate_counts_the_small_experiments(planned):
    rows, _ = rows_of(planned, 0.03)
    responses = EXPERIMENT.simulate(planned.item_table, planned.probe_table, 0.03, WORDS)
    tests = [score for score in EXPERIMENT.score(planned.item_table, responses) if score.outcome == "gain-of-test"]
    assert rows["control:rejection-rate"].score.estimate == np.mean([test.p <= 0.05 for test in tests])
    assert all("all 252 assignments" in test.test for test in tests)
