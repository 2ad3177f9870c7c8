import numpy as np
import pyarrow as pa
import pytest

from megatron_exp.experiments.conformance import toy_context
from megatron_exp.experiments.draft import draft
from megatron_exp.experiments.frames import asked, joined
from tests.experiments.small import SMALL
from tests.experiments.stubs import Passages


@pytest.fixture(scope="module")
def planned():
    return draft(Passages(), toy_context("passages", steps=60, length=256))


@pytest.fixture(scope="module")
def questions(planned):
    return asked(planned.item_table, planned.probe_table)


def test_answers_survive_the_way_through_a_responses_table(planned, questions):
    run, twin = np.arange(len(questions), dtype=float), -np.arange(len(questions), dtype=float)
    back = joined(planned.item_table, questions.filled(run, twin).responses())
    np.testing.assert_array_equal(back.run, run)
    np.testing.assert_array_equal(back.twin, twin)
    for name in ("item", "arm", "probe", "condition", "role", "cluster"):
        np.testing.assert_array_equal(getattr(back, name), getattr(questions, name))


def test_the_order_of_responses_does_not_matter(planned, questions):
    table = questions.filled(np.arange(len(questions)), np.zeros(len(questions))).responses()
    backwards = table.take(pa.array(np.arange(len(table))[::-1]))
    np.testing.assert_array_equal(joined(planned.item_table, backwards).run, joined(planned.item_table, table).run)


def test_unscored_is_null_with_a_reason_in_the_table_and_nan_in_the_frame(planned, questions):
    run = np.ones(len(questions))
    run[3] = np.nan
    table = questions.filled(run, np.full(len(questions), np.nan)).responses()
    assert table["value"].null_count == 1 and table["reason"][3].as_py() == "not scored"
    assert np.isnan(joined(planned.item_table, table).run[3])


def test_change_is_run_minus_twin_and_the_run_alone_without_a_twin(planned, questions):
    ones, threes = np.ones(len(questions)), np.full(len(questions), 3.0)
    assert set(questions.filled(threes, ones).change) == {2.0}
    assert set(questions.filled(threes, np.full(len(questions), np.nan)).change) == {3.0}


def test_a_part_without_twin_answers_does_not_fall_back_to_the_run_alone(questions):
    twin = np.ones(len(questions))
    twin[:5] = np.nan
    part = questions.filled(np.ones(len(questions)), twin).where(np.arange(len(questions)) < 5)
    assert np.isnan(part.change).all()


def test_two_answers_to_one_question_are_a_bug(planned, questions):
    table = questions.filled(np.ones(len(questions)), np.ones(len(questions))).responses()
    with pytest.raises(ValueError, match="two responses of the run"):
        joined(planned.item_table, pa.concat_tables([table, table.slice(0, 1)]))


def test_a_response_about_an_unknown_item_is_a_bug(planned, questions):
    table = questions.filled(np.ones(len(questions)), np.ones(len(questions))).responses()
    with pytest.raises(ValueError, match="not among the items"):
        joined(planned.item_table.slice(1), table)


def test_answers_of_an_external_model_are_left_out(planned, questions):
    table = questions.filled(np.ones(len(questions)), np.full(len(questions), np.nan)).responses()
    external = table.set_column(table.schema.get_field_index("model"), "model", pa.array(["external"] * len(table)).dictionary_encode())
    both = pa.concat_tables([table.cast(external.schema), external])
    frame = joined(planned.item_table, both)
    assert not frame.has_twin and np.isfinite(frame.run).all()


def test_every_state_of_a_probe_is_a_question_of_its_own():
    planned = draft(SMALL["forgetting"], toy_context("forgetting"))
    frame = asked(planned.item_table, planned.probe_table)
    assert len(frame) == sum(len(row["states"]) for row in planned.probe_table.to_pylist())
