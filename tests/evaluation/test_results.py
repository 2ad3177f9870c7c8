"""Families, corrections and the rows of results."""

import math

import pyarrow as pa
import pytest

from megatron_exp.evaluation.results import Results, correct, experiment_rows, judge, last_state, unscored_counts
from megatron_exp.experiments.protocol import Outcome, Score
from megatron_exp.manifest.schema import RESPONSES, RESULTS
from megatron_exp.statistics.multiplicity import holm

STATE = 100


def outcome(name, family, **values):
    return Outcome(
        **{
            "name": name,
            "estimand": "",
            "unit": "",
            "test": "",
            "side": "greater",
            "family": family,
            "margin": 0.1,
            "smallest_effect": 0.1,
            **values,
        }
    )


def score(name, p, **values):
    return Score(**{"outcome": name, "condition": "c", "step": STATE, "n": 9, "num_clusters": 9, "estimate": 1.0, "p": p, **values})


OUTCOMES = [outcome("main", "primary"), outcome("side", "secondary"), outcome("curve", "descriptive"), outcome("control:twin", "secondary")]


def rows(name, *scores, outcomes=OUTCOMES):
    return experiment_rows(name, outcomes, list(scores), STATE)


def judged(*parts, num_left_out=0):
    every = [row for part in parts for row in part]
    sizes = correct(every, num_left_out)
    judge(every)
    return Results(every, sizes)


def test_primaries_of_all_experiments_are_one_family_and_secondaries_one_each():
    results = judged(
        rows("a", score("main", 0.01), score("side", 0.02), score("side", 0.9, condition="d")),
        rows("b", score("main", 0.03), score("side", 0.04)),
    )
    assert results.family_sizes == {"primary": 2, "secondary of a": 2, "secondary of b": 1}
    corrected = {(row.experiment, row.score.outcome, row.score.condition): row.p_corrected for row in results.rows}
    assert corrected["a", "main", "c"] == pytest.approx(holm([0.01, 0.03])[0]) == 0.02
    assert corrected["a", "side", "c"] == 0.04 and corrected["b", "side", "c"] == 0.04


def test_descriptions_and_controls_are_in_no_family():
    results = judged(
        rows("a", score("main", 0.01), score("side", 0.5), score("curve", 1e-9), score("control:twin", 0.5), score("new", 1e-9))
    )
    assert results.family_sizes == {"primary": 1, "secondary of a": 1}
    verdicts = {row.score.outcome: row.verdict for row in results.rows}
    assert verdicts == {"main": "detected", "side": "not detected", "curve": None, "control:twin": "not detected", "new": None}


def test_a_failed_control_voids_its_experiment_and_no_other():
    results = judged(
        rows("a", score("main", 1e-9), score("side", 1e-9), score("control:twin", 1e-4)), rows("b", score("main", 1e-9), score("side", 0.2))
    )
    assert results.verdict("a") == "control failed" and results.verdict("b") == "detected"
    assert {row.verdict for row in results.rows if row.experiment == "a"} == {"control failed"}


def test_a_test_that_could_not_be_done_keeps_its_place_in_the_family():
    with_lost = judged(
        rows("a", score("main", 0.03), score("side", 0.5)), rows("b", score("main", math.nan, reason="no answers"), score("side", 0.5))
    )
    assert with_lost.family_sizes["primary"] == 2
    assert with_lost.verdict("a") == "not detected" and with_lost.verdict("b") == "not scorable: no answers"


def test_looking_at_fewer_experiments_makes_no_p_value_smaller():
    assert judged(rows("a", score("main", 0.03)), num_left_out=0).verdict("a") == "detected"
    assert judged(rows("a", score("main", 0.03)), num_left_out=1).verdict("a") == "not detected"


def test_a_pre_registered_test_without_a_score_is_reported_missing():
    results = judged(rows("a", score("side", 0.5), score("main", 0.001, step=50)))
    assert results.verdict("a") == "not scorable: there were no answers to score"
    assert results.family_sizes["primary"] == 1


def test_rows_come_in_the_same_order_whatever_the_order_of_scores():
    scores = [score("side", 0.5, condition=c, step=s) for c in "ba" for s in (100, 50)] + [score("main", 0.2)]
    assert [row.score for row in rows("a", *scores)] == [row.score for row in rows("a", *scores[::-1])]


def test_the_table_holds_the_scores_and_json_has_no_nan():
    results = judged(rows("a", score("main", 0.01, low=0.5, high=math.inf), score("side", 0.5), score("new", math.nan)))
    table = results.table()
    assert table.schema == RESULTS
    assert table["primary"].to_pylist() == [True, False, False] and table["side"].to_pylist() == ["greater", None, "greater"]
    (main, *_) = results.outcomes("a")
    assert main["high"] is None and main["family"] == "primary" and main["reason"] == "" and main["verdict"] == "detected"


def responses(*rows):
    return pa.Table.from_pylist([{"experiment": "a", "reason": "", "model": "run", "step": 5, **row} for row in rows], RESPONSES)


def test_the_final_state_of_an_experiment_is_the_last_it_asked_about():
    assert last_state(responses({"step": 7}, {"step": 90}, {"step": 99, "model": "external"}), STATE) == 90
    assert last_state(responses(), STATE) == STATE


def test_what_was_not_scored_is_counted_by_reason():
    table = responses(
        {"reason": "too long"},
        {"reason": "too long"},
        {"value": 1.0},
        {"model": "twin", "reason": "lost"},
        {"experiment": "b", "reason": "x"},
    )
    assert unscored_counts(table, "a") == {"run": {"too long": 2}, "twin": {"lost": 1}}
