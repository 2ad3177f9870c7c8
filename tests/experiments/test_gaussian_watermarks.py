import numpy as np
import pytest

from megatron_exp.errors import UserError
from megatron_exp.experiments.conformance import toy_context
from megatron_exp.experiments.draft import draft
from megatron_exp.experiments.frames import asked
from megatron_exp.experiments.gaussian_watermarks import GaussianWatermarks
from megatron_exp.seeding import Words, key
from tests.experiments.small import SMALL

EXPERIMENT = SMALL["watermarks"]
CONTEXT = toy_context("watermarks")
WORDS = Words.of(0, "tests", "watermarks")


@pytest.fixture(scope="module")
def planned():
    return draft(EXPERIMENT, CONTEXT)


def asks(planned, name, role):
    role_of = {item.item: item.role for item in planned.items}
    return {probe.item: probe.ask for probe in planned.probes if probe.name == name and role_of[probe.item] == role}


def test_the_stated_fraction_of_slots_is_watermarked_exclusively_and_once(planned):
    slots = planned.insertions["slot"].to_pylist()
    assert len(set(slots)) == len(slots) == round(0.05 * 4800)
    assert all(planned.insertions["exclusive"].to_pylist())


def test_watermarks_are_spread_evenly_over_training(planned):
    counts = np.histogram(planned.insertions["step"].to_numpy(), bins=10, range=(0, 600))[0]
    assert counts.tolist() == [24] * 10


def test_the_papers_design_takes_whole_batches_at_even_distances():
    insertions = draft(SMALL["watermarks-paper"], CONTEXT).insertions
    steps, counts = np.unique(insertions["step"].to_numpy(), return_counts=True)
    assert len(steps) == 30 and set(counts) == {8} and set(np.diff(steps)) == {20}


@pytest.mark.parametrize(
    ("parameters", "steps"),
    [({"schedule": "rows", "rows_per_step": 1, "fraction": 0.2}, 960), ({"schedule": "batches", "fraction": 0.2, "window": (0, 0.1)}, 120)],
)
def test_more_watermarks_than_the_window_has_steps_for_are_refused(parameters, steps):
    with pytest.raises(UserError, match=rf"need {steps} steps, but the window .* has \d+\. Lower fraction to"):
        list(GaussianWatermarks(**parameters).items(CONTEXT))


def test_the_probe_asks_for_the_noise_that_was_placed_in_that_slot(planned):
    placed = {row["item"]: row for row in planned.insertions.to_pylist()}
    own = asks(planned, "score", "treated")
    assert len(own) == 240
    for item, ask in own.items():
        assert (ask.slot, ask.noise_slot, ask.noise_key) == (placed[item]["slot"], placed[item]["slot"], placed[item]["key"])
        assert ask.scale == 0.075


def test_fresh_noise_has_a_key_that_was_never_placed(planned):
    fresh = key(CONTEXT.seeds.placement, "noise", "watermarks", "control")
    assert fresh not in set(planned.insertions["key"].to_pylist())
    used = [*asks(planned, "fresh-noise", "treated").values(), *asks(planned, "score", "control").values()]
    assert {ask.noise_key for ask in used} == {fresh} and len(used) == 480


def test_control_slots_are_distinct_and_untouched(planned):
    slots = [ask.slot for ask in asks(planned, "score", "control").values()]
    assert len(set(slots)) == len(slots) == 240
    assert not set(slots) & set(planned.insertions["slot"].to_pylist())


def test_only_the_evaluated_part_is_probed():
    planned = draft(GaussianWatermarks(fraction=0.05, evaluated=30), CONTEXT)
    assert [len(asks(planned, *which)) for which in (("score", "treated"), ("score", "control"))] == [30, 30]
    assert len(planned.insertions) == 240


def scores_of(planned, run, twin):
    frame = asked(planned.item_table, planned.probe_table)
    return {score.outcome: score for score in EXPERIMENT.score(planned.item_table, frame.filled(run(frame), twin(frame)).responses())}


def test_the_primary_is_the_z_test_of_the_mean(planned):
    scores = scores_of(planned, lambda frame: np.full(len(frame), 0.25), lambda frame: np.zeros(len(frame)))
    primary = scores["mean-score"]
    assert primary.estimate == 0.25 and primary.n == 240
    assert primary.p == pytest.approx(5.35e-5, rel=0.01)  # z = 0.25 sqrt(240) = 3.873


def test_the_rate_counts_scores_above_the_exact_threshold(planned):
    def run(frame):
        return np.where(np.arange(len(frame)) % 4 == 0, 2.33, 2.32)

    rate = scores_of(planned, run, lambda frame: np.zeros(len(frame)))["tpr-at-1pct-fpr"]
    assert 0.2 < rate.estimate < 0.3 and rate.p < 1e-20


def test_noise_that_shows_where_it_was_never_added_fails_the_controls(planned):
    def leaking(frame):
        return np.where(frame.probe == "fresh-noise", 0.5, 0.0)

    scores = scores_of(planned, leaking, lambda frame: np.full(len(frame), 0.5))
    assert scores["control:fresh-noise"].p < 0.001 and scores["control:twin"].p < 0.001
    assert scores["control:untouched"].p == pytest.approx(1.0)


def test_simulated_effects_are_recovered(planned):
    responses = EXPERIMENT.simulate(planned.item_table, planned.probe_table, 0.6, WORDS)
    scores = {score.outcome: score for score in EXPERIMENT.score(planned.item_table, responses)}
    assert scores["mean-score"].estimate == pytest.approx(0.6, abs=4.5 / np.sqrt(240))
    assert scores["mean-score"].twin == pytest.approx(0.0, abs=4.5 / np.sqrt(240))


def test_the_mean_is_reported_by_slice_of_training(planned):
    responses = EXPERIMENT.simulate(planned.item_table, planned.probe_table, 0.0, WORDS)
    slices = [score for score in EXPERIMENT.score(planned.item_table, responses) if score.outcome == "mean-score-by-slice"]
    assert [score.condition for score in slices] == [f"slice-{number}" for number in range(10)]
    assert all(score.n == 24 and np.isnan(score.p) for score in slices)
