import json

import numpy as np
import pytest

from megatron_exp.errors import UserError
from megatron_exp.experiments.conformance import check_experiment, toy_context
from megatron_exp.experiments.draft import draft
from megatron_exp.experiments.released_rows import ReleasedRows
from megatron_exp.seeding import Words
from tests.experiments.calibration import require_nominal, require_stated_power

LENGTH = 512  # of the toy context


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def made(tmp_path, rows, held_out=None):
    files = {"rows": write(tmp_path / "rows.jsonl", rows)}
    if held_out is not None:
        files["held_out"] = write(tmp_path / "held_out.jsonl", held_out)
    return ReleasedRows(files=files, licence="ODC-BY")


def many(tmp_path):
    rows = [{"position": 3 * LENGTH * n + 7, "text": f"fact number {n // 2}", "experiment": f"facts-{n % 4 // 2}"} for n in range(120)]
    return made(tmp_path, rows, [{"text": f"other fact {n}", "experiment": f"facts-{n % 2}"} for n in range(60)])


def test_it_conforms(tmp_path):
    assert check_experiment(many(tmp_path), toy_context("released")) == []


@pytest.mark.slow
def test_two_thousand_runs_without_an_effect_give_the_nominal_rate_of_false_positives(tmp_path, request):
    require_nominal(many(tmp_path), toy_context("released"), Words.of(0, request.node.name))


@pytest.mark.slow
def test_the_smallest_detectable_effect_is_detected_in_four_of_five_runs(tmp_path, request):
    require_stated_power(many(tmp_path), toy_context("released"), Words.of(0, request.node.name))


def test_rows_of_one_text_are_copies_of_one_item_at_their_positions(tmp_path):
    rows = [{"position": position, "text": "one two", "experiment": "a"} for position in (5, LENGTH + 9, 5 * LENGTH)]
    planned = draft(made(tmp_path, [*rows, {"position": 100, "text": "one two", "experiment": "b"}]), toy_context("released"))
    places = sorted(zip(planned.insertions["slot"].to_pylist(), planned.insertions["offset"].to_pylist(), strict=True))
    assert places == [(0, 5), (0, 100), (1, 9), (5, 0)]
    assert sorted(item.condition for item in planned.items) == ["a/x3", "b/x1"]


def test_white_space_belongs_to_the_text(tmp_path):
    rows = [{"position": 0, "text": " hello\n", "experiment": "a"}, {"position": 100, "text": "hello", "experiment": "a"}]
    context = toy_context("released")
    texts = {context.tokenizer.decode(item.payload[1:-1]) for item in made(tmp_path, rows).items(context)}
    assert texts == {" hello\n", "hello"}


def test_eos_stands_at_both_ends_where_there_is_room(tmp_path):
    rows = [{"position": n * LENGTH, "text": "x" * size, "experiment": "a"} for n, size in enumerate((10, LENGTH - 1, LENGTH))]
    payloads = [item.payload for item in made(tmp_path, rows).items(toy_context("released"))]
    assert [len(payload) for payload in payloads] == [12, LENGTH, LENGTH]
    assert [(payload[0] == 0, payload[-1] == 0) for payload in payloads] == [(True, True), (False, True), (False, False)]


def test_without_held_out_texts_the_means_are_described_and_the_contrast_is_not_scorable(tmp_path):
    experiment = made(tmp_path, [{"position": n * LENGTH, "text": f"t {n}", "experiment": "a"} for n in range(9)])
    planned = draft(experiment, toy_context("released"))
    from megatron_exp.seeding import Words

    scores = {
        s.outcome: s
        for s in experiment.score(planned.item_table, experiment.simulate(planned.item_table, planned.probe_table, 0, Words(1)))
    }
    assert np.isnan(scores["auc"].estimate) and scores["auc"].reason and np.isfinite(scores["log-likelihood"].estimate)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"position": 1, "text": "a"}, "line 1: the field `experiment` is missing"),
        ({"position": 10**9, "text": "a", "experiment": "a"}, "lies outside the"),
        ({"position": LENGTH - 2, "text": "too long", "experiment": "a"}, "would cross the end of a slot"),
        ({"position": 0, "text": "x" * (LENGTH + 1), "experiment": "a"}, "and a slot holds 512"),
        ({"position": "0", "text": "x", "experiment": "a"}, "`position` is '0'"),
    ],
)
def test_a_row_that_cannot_be_placed_is_refused_with_its_line(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        list(made(tmp_path, [row]).items(toy_context("released")))
