"""Which questions are asked, and how recorded answers are found again."""

import numpy as np
import pyarrow as pa

from megatron_exp.evaluation.questions import questions
from megatron_exp.evaluation.responses import NOT_RECORDED, UNSCORED_LIVE, live_responses, unanswered
from megatron_exp.manifest.schema import ITEMS, PROBE_DEFINITIONS, PROBES, RESPONSES
from megatron_exp.scoring.probes import ANSWERS
from megatron_exp.scoring.responses import responses_table, stamped

END = 20
BOTH = ["run", "twin"]
PROBE_ROWS = pa.Table.from_pylist(
    [
        {"experiment": "e", "item": item, "arm": "main", "name": name, "states": states, "live": live, "of": of}
        for item, name, states, live, of in [
            (1, "final", [], False, BOTH),
            (1, "early", [5, 10], False, BOTH),
            (2, "live", [3, 20], True, BOTH),
            (3, "live-end", [], True, BOTH),
            (4, "run-only", [], False, ["run"]),
        ]
    ],
    PROBE_DEFINITIONS,
)


def asked(label, final_states=(END,)):
    found = questions(PROBE_ROWS, label, list(final_states), END)
    return sorted(zip(found.probe.tolist(), found.state.tolist(), found.live.tolist(), strict=True))


def test_probes_are_asked_in_their_states_or_in_the_final_one():
    assert asked("run") == [(0, 20, False), (1, 5, False), (1, 10, False), (2, 3, True), (2, 20, True), (3, 20, True), (4, 20, False)]


def test_a_model_is_asked_only_what_is_meant_for_it():
    assert 4 not in {probe for probe, _, _ in asked("twin")}
    assert 4 in {probe for probe, _, _ in asked("external")}


def test_earlier_states_ask_final_probes_there_and_leave_the_future_out():
    assert asked("run", [7, 10]) == [
        (0, 7, False),
        (0, 10, False),
        (1, 5, False),
        (1, 10, False),
        (2, 3, True),
        (4, 7, False),
        (4, 10, False),
    ]


def recorded(*rows):
    columns = ("attempt", "step", "item", "name", "value")
    plain = [dict(zip(columns, row, strict=True)) | {"experiment": "e", "arm": "main", "num_tokens": 8} for row in rows]
    return pa.Table.from_pylist(plain, PROBES)


def live(*rows):
    table = live_responses(PROBE_ROWS, questions(PROBE_ROWS, "run", [END], END), recorded(*rows), "run")
    return {(row["name"], row["step"]): (row["value"], row["reason"]) for row in table.to_pylist()}


def test_the_last_attempt_at_a_state_counts():
    found = live((1, 3, 2, "live", 1.0), (2, 20, 2, "live", 2.5), (1, 20, 2, "live", 2.0), (1, 20, 3, "live-end", 9.0))
    assert found["live", 3] == (1.0, "") and found["live", 20] == (2.5, "")
    assert found["live-end", 20] == (None, NOT_RECORDED)  # attempt 2 reached state 20 and did not answer


def test_answers_that_are_missing_or_empty_have_a_reason():
    found = live((1, 3, 2, "live", None), (1, 20, 2, "another", 1.0))
    assert found == {("live", 3): (None, UNSCORED_LIVE), ("live", 20): (None, NOT_RECORDED), ("live-end", 20): (None, NOT_RECORDED)}


def answers(*rows):
    plain = [{"experiment": "e", "arm": "main", "reason": "", "item": item, "name": name, "value": value} for item, name, value in rows]
    return pa.Table.from_pylist(plain, ANSWERS)


ITEM_ROWS = pa.Table.from_pylist(
    [{"experiment": "e", "item": item, "arm": "main", "condition": f"c{item}"} for item in (1, 2, 3, 4)], ITEMS
)


def test_responses_carry_the_condition_of_their_item():
    table = responses_table([stamped(answers((2, "final", 0.5)), "run", END)], ITEM_ROWS)
    assert table.schema == RESPONSES
    (row,) = table.to_pylist()
    assert (row["condition"], row["probe"], row["model"], row["step"], row["value"]) == ("c2", "final", "run", END, 0.5)


def test_responses_do_not_depend_on_the_order_in_which_they_were_asked():
    parts = [
        stamped(answers((2, "final", 0.5), (1, "final", 0.25)), "twin", END),
        stamped(answers((1, "final", 1.5), (2, "final", 0.0)), "run", END),
        unanswered(PROBE_ROWS, np.array([1]), "run", 5, "no checkpoint"),
    ]
    assert responses_table(parts, ITEM_ROWS).equals(responses_table(parts[::-1], ITEM_ROWS))
    lost = [row for row in responses_table(parts, ITEM_ROWS).to_pylist() if row["reason"]]
    assert [(row["step"], row["value"], row["reason"]) for row in lost] == [(5, None, "no checkpoint")]
