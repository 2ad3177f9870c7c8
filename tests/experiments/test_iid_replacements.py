from collections import Counter

import numpy as np
import pytest

from megatron_exp.errors import UserError
from megatron_exp.experiments.conformance import toy_context
from megatron_exp.experiments.draft import draft
from megatron_exp.experiments.frames import asked
from megatron_exp.experiments.iid_replacements import IidReplacements
from megatron_exp.stream.slot import POOL, Geometry

EXPERIMENT = IidReplacements(scale=2)


@pytest.fixture(scope="module")
def planned():
    return draft(EXPERIMENT, toy_context("iid"))


def scores_of(planned, gain, twin=3.0):
    """Scores where the run's loss lies `gain` below a twin's."""
    frame = asked(planned.item_table, planned.probe_table)
    spread = 1e-4 * (frame.item % 7)
    responses = frame.filled(np.full(len(frame), 3.0) - gain(frame) + spread, np.full(len(frame), twin)).responses()
    return {(score.outcome, score.condition): score for score in EXPERIMENT.score(planned.item_table, responses)}


def test_scale_one_has_the_papers_numbers_at_the_papers_size():
    class Paper:
        geometry = Geometry(sequence_length=4096, global_batch_size=512, steps=100_000)

    counts = IidReplacements().counts(Paper())
    assert counts == {"uniform": 201 * 512, "small-set": 10 * 512} | {f"decile-{decile}": 50 * 512 for decile in range(10)}
    assert sum(counts.values()) / Paper.geometry.num_slots == pytest.approx(0.0071, abs=0.0001)


def test_as_many_sequences_stay_out_as_are_inserted(planned):
    counts = Counter(item.role for item in planned.items)
    assert counts["treated"] == counts["control"] == sum(EXPERIMENT.counts(toy_context("iid")).values())


def test_every_sequence_is_a_pool_slot_of_its_own_and_replaces_one_slot(planned):
    sources = planned.insertions["source_slot"].to_pylist()
    place_of = {item.item: POOL + item.metadata["pool_place"] for item in planned.items}
    assert len(set(place_of.values())) == len(planned.items)
    assert sources == [place_of[item] for item in planned.insertions["item"].to_pylist()]
    assert all(planned.insertions["exclusive"].to_pylist()) and set(planned.insertions["kind"].to_pylist()) == {"swap"}


def test_a_decile_stays_in_its_tenth_of_training(planned):
    rows = zip(planned.insertions["condition"].to_pylist(), planned.insertions["step"].to_pylist(), strict=True)
    tenths = {(condition, step // 60) for condition, step in rows if condition.startswith("decile-")}
    assert tenths == {(f"decile-{decile}", decile) for decile in range(10)}


def test_every_sequence_is_asked_about_by_its_pool_slot(planned):
    place_of = {item.item: POOL + item.metadata["pool_place"] for item in planned.items}
    assert {probe.item: probe.ask.slot for probe in planned.probes} == place_of


def test_the_gain_is_that_of_inserted_over_never_inserted_sequences(planned):
    scores = scores_of(planned, lambda frame: 0.01 + 0.05 * (frame.role == "treated"))
    primary = scores["gain", "all inserted"]
    assert primary.estimate == pytest.approx(0.05, abs=1e-4) and primary.control == pytest.approx(0.01, abs=1e-3) and primary.p < 1e-9
    assert scores["gain-by-condition", "uniform"].estimate == pytest.approx(0.05, abs=1e-3)
    assert np.isnan(scores["recency", "all deciles"].p) or scores["recency", "all deciles"].p > 1e-4
    assert scores["control:twin", "all inserted"].p > 0.5


def test_recency_is_the_slope_over_the_deciles(planned):
    scores = scores_of(planned, lambda frame: 0.01 * (1 + frame.meta("decile")))
    recency = scores["recency", "all deciles"]
    assert recency.estimate == pytest.approx(0.01, abs=1e-4) and recency.p < 1e-6
    assert recency.low < recency.estimate < recency.high


def test_a_twin_that_knows_the_inserted_sequences_raises_the_alarm(planned):
    frame = asked(planned.item_table, planned.probe_table)
    twin = 3.0 - 0.1 * (frame.role == "treated") + 1e-4 * (frame.item % 7)
    scores = EXPERIMENT.score(planned.item_table, frame.filled(np.full(len(frame), 3.0), twin).responses())
    assert next(score for score in scores if score.outcome == "control:twin").p < 0.001


def test_a_pool_that_is_too_small_is_refused():
    with pytest.raises(UserError, match="pool.slots"):
        list(EXPERIMENT.items(toy_context("iid", pool_slots=100)))
