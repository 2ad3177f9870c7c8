"""Which plot an outcome gets follows from its rows."""

import numpy as np
import pytest

from megatron_exp.report.effects import MAX_PICTURES, natural, outcome_pictures
from megatron_exp.report.figures import thinned, thinning_note
from megatron_exp.run_record import Series
from tests.report.fabricated import result_row


def rows(conditions, states=(40,), **values):
    return [
        result_row(outcome="o", experiment="e", condition=condition, step=step, **({"estimate": 0.5, "low": 0.1, "high": 0.9} | values))
        for condition in conditions
        for step in states
    ]


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (rows(["a", "b"]), "Estimates of o with intervals for 2 conditions"),
        (rows(["p/x1", "p/x4", "p/x16", "q/x1", "q/x4"]), "Estimates of o against 3 doses"),
        (rows(["+1", "+10"] + [f"+{n}" for n in range(20, 200, 20)]), "Estimates of o against 11 doses"),
        (rows(["a", "b"], states=(10, 20)), "Curves of o over 2 model states"),
        (rows([f"pair-{n}" for n in range(30)], states=range(0, 200, 4)), "Curves of o over 50 model states"),
        (rows(["a"], low=float("-inf"), high=float("nan")), "Estimates of o with intervals for 1 conditions"),
        (rows([f"c{chr(97 + n)}" for n in range(30)]), "Estimates of o with intervals for 24 conditions"),
    ],
)
def test_the_shape_of_the_rows_decides(given, kind):
    [picture] = outcome_pictures(given, {})
    assert picture.alt.startswith(kind)


def test_an_outcome_that_could_not_be_scored_has_no_plot():
    assert outcome_pictures(rows(["a"], estimate=float("nan")), {}) == []


def test_names_with_markup_of_the_plotting_library_are_drawn_as_text():
    assert len(outcome_pictures(rows(["$\\frac$ \x1b[1m \u202e 你好"]), {})) == 1


def test_primary_outcomes_come_first_and_their_number_is_bounded():
    many = [row | {"outcome": f"o{number}"} for number in range(12) for row in rows(["a", "b"])]
    drawn = outcome_pictures(many, {"o7": {"family": "primary", "unit": "AUC", "null": 0.5}})
    assert len(drawn) == MAX_PICTURES
    assert drawn[0].caption.startswith("o7")


def test_single_values_of_one_unit_share_a_plot_with_their_controls():
    single = [row | {"outcome": name} for name in ("score", "control:twin", "rate") for row in rows(["all"])]
    units = {"score": "sd", "control:twin": "sd", "rate": "fraction"}
    drawn = outcome_pictures(
        single, {name: {"family": "primary" if name == "score" else "secondary", "unit": unit} for name, unit in units.items()}
    )
    assert [one.alt.split(" with")[0] for one in drawn] == ["Estimates of score, control:twin", "Estimates of rate"]


def test_a_long_curve_is_thinned_to_means_and_the_caption_says_so():
    short, long = (Series(np.arange(1, n + 1), np.arange(1.0, n + 1)) for n in (300, 1000))
    assert thinned(short) is short and thinning_note(short) == ""
    points = thinned(long)
    assert len(points) == 250
    assert (points.steps[0], points.values[-1]) == (2.5, 998.5)
    assert "mean of 4 updates" in thinning_note(long)


def test_numbers_in_names_sort_as_numbers():
    assert sorted(["x16", "x4", "x1", "a"], key=natural) == ["a", "x1", "x4", "x16"]
