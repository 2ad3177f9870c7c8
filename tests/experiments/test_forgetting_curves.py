from dataclasses import replace

import numpy as np
import pytest

from megatron_exp.errors import UserError
from megatron_exp.experiments.conformance import ToyPool, toy_context
from megatron_exp.experiments.draft import draft
from megatron_exp.experiments.forgetting_curves import ForgettingCurves
from megatron_exp.experiments.frames import asked
from megatron_exp.seeding import Words
from megatron_exp.stream.slot import POOL

EXPERIMENT = ForgettingCurves()
WORDS = Words.of(0, "tests", "forgetting")


@pytest.fixture(scope="module")
def planned():
    return draft(EXPERIMENT, toy_context("forgetting"))


def scores_of(planned, run, twin):
    frame = asked(planned.item_table, planned.probe_table)
    return list(EXPERIMENT.score(planned.item_table, frame.filled(run(frame), twin(frame)).responses()))


def one(scores, outcome, condition=None):
    return next(score for score in scores if score.outcome == outcome and condition in (None, score.condition))


def test_nine_whole_batches_at_ten_to_ninety_percent_are_replaced(planned):
    steps = np.unique(planned.insertions["step"].to_numpy())
    assert steps.tolist() == [60, 120, 180, 240, 300, 360, 420, 480, 540]
    assert len(planned.insertions) == 9 * 8 and all(planned.insertions["exclusive"].to_pylist())


def test_every_row_comes_from_a_pool_slot_of_its_own_and_goes_to_its_row(planned):
    sources = planned.insertions["source_slot"].to_pylist()
    assert len(set(sources)) == 72 and min(sources) >= POOL
    row_of = {item.item: item.metadata["row"] for item in planned.items}
    rows = zip(planned.insertions["item"].to_pylist(), planned.insertions["row"].to_pylist(), strict=True)
    assert all(row_of[item] == row for item, row in rows)


def test_the_coin_injects_exactly_one_batch_of_each_pair(planned):
    for pair in range(9):
        conditions = {item.assignment_unit: item.condition for item in planned.items if item.cluster == pair}
        assert sorted(conditions.values()) == ["injected", "never-injected"]


def test_the_coins_are_fair():
    heads = []
    for seed in range(60):
        items = ForgettingCurves().items(toy_context("coins", batch=1, assignment=seed))
        heads += [item.assignment_unit % 2 for item in items if item.condition == "injected"]
    assert abs(np.mean(heads) - 0.5) < 4.5 * 0.5 / np.sqrt(len(heads))


def test_both_batches_are_measured_live_before_the_step_and_right_after_it(planned):
    step_of = {item.item: item.metadata["step"] for item in planned.items}
    assert len(planned.probes) == 2 * 9 * 8
    for probe in planned.probes:
        assert probe.live and {step_of[probe.item], step_of[probe.item] + 1, 600} <= set(probe.states)
        assert min(probe.states) == step_of[probe.item] and max(probe.states) <= 600


def test_the_primary_is_the_difference_in_differences_one_step_later(planned):
    def run(frame):
        injected = (frame.role == "treated") & (frame.step == frame.meta("step") + 1)
        return 3.0 - 0.5 * injected - 0.1  # 0.1 is a difference between run and twin that has nothing to do with the injection

    score = one(scores_of(planned, run, lambda frame: np.full(len(frame), 3.0)), "gain-after-one-step")
    assert score.estimate == pytest.approx(0.5) and score.control == pytest.approx(0.1)
    assert score.p == pytest.approx(1 / 512) and score.num_clusters == 9
    assert score.step == 600


def test_without_a_twin_the_fall_since_just_before_the_injection_is_compared(planned):
    def run(frame):
        learnt = frame.step > frame.meta("step")
        return 3.0 - 0.2 * learnt - 0.5 * (learnt & (frame.role == "treated"))

    score = one(scores_of(planned, run, lambda frame: np.full(len(frame), np.nan)), "gain-after-one-step")
    assert score.estimate == pytest.approx(0.5) and score.control == pytest.approx(0.2)
    assert "run alone" in score.test


def test_a_pair_without_scored_rows_is_left_out_and_counted(planned):
    def run(frame):
        return np.where(frame.cluster == 0, np.nan, 3.0 - 0.5 * (frame.role == "treated"))

    score = one(scores_of(planned, run, lambda frame: np.full(len(frame), 3.0)), "gain-after-one-step")
    assert score.num_clusters == 8 and score.num_unscored == 16 and score.p == pytest.approx(1 / 256)


def test_the_curve_shows_the_peak_after_the_batch_has_gone_and_its_decay(planned):
    def run(frame):
        elapsed = frame.step - frame.meta("step")
        gain = np.where(elapsed <= 0, 0.0, np.where(elapsed < 20, 0.01 * elapsed, 0.2 * (1 + (elapsed - 20) / 30.0) ** -1.0))
        return 3.0 - gain * (frame.role == "treated")

    scores = scores_of(planned, run, lambda frame: np.full(len(frame), 3.0))
    assert one(scores, "gain", "+1").estimate == pytest.approx(0.01)
    assert one(scores, "retention", "+20").estimate == pytest.approx(1.0)
    assert one(scores, "retention", "+50").estimate == pytest.approx(0.5)
    fit = one(scores, "decay-exponent")
    assert fit.estimate == pytest.approx(1.0, abs=0.15) and "peak at +20" in fit.condition


def test_a_twin_that_falls_on_the_injected_batches_too_raises_the_alarm():
    experiment = ForgettingCurves(num_batches=14, offsets=(0, 1), grid_points=0)
    planned = draft(experiment, toy_context("alarm"))
    frame = asked(planned.item_table, planned.probe_table)
    twin = 3.0 - 0.3 * ((frame.role == "treated") & (frame.step > frame.meta("step")))
    scores = experiment.score(planned.item_table, frame.filled(np.full(len(frame), 3.0), twin).responses())
    assert next(score for score in scores if score.outcome == "control:twin").p < 0.001


def test_steps_that_fall_together_are_refused():
    with pytest.raises(UserError, match="do not fit into the window"):
        list(ForgettingCurves(num_batches=9).items(toy_context("short", steps=8)))


def test_a_pool_that_is_too_small_is_refused():
    with pytest.raises(UserError, match="pool.slots"):
        list(EXPERIMENT.items(replace(toy_context("pool"), pool=ToyPool(100))))
