"""Fractional repetitions: exactly as declared, or an error."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_exp.errors import UserError
from megatron_exp.experiments.conformance import toy_context

CONTEXT = toy_context("copies")


@given(st.integers(1, 60), st.integers(0, 300))
def test_the_total_is_exact_and_no_unit_is_further_than_one_from_the_rate(num_units, total):
    copies = CONTEXT.copies(range(num_units), total / num_units)
    assert sum(copies.values()) == total
    assert max(copies.values()) - min(copies.values()) <= 1


def test_half_of_the_units_get_one_more():
    copies = CONTEXT.copies(range(100), 2.5)
    assert sorted(copies.values()) == [2] * 50 + [3] * 50
    assert copies != CONTEXT.copies(range(100), 2.5, purpose="another")


def test_the_draw_follows_the_unit_and_not_its_position():
    assert CONTEXT.copies([7, 3, 9, 4], 0.5) == CONTEXT.copies([3, 4, 7, 9], 0.5)


def test_every_stratum_gets_its_share():
    strata = {unit: "ab"[unit % 2] for unit in range(40)}
    copies = CONTEXT.copies(range(40), 1.25, strata)
    assert [sum(copies[unit] for unit in range(40) if strata[unit] == name) for name in "ab"] == [25, 25]


@pytest.mark.parametrize(
    ("units", "rate", "words"),
    [
        (7, 2.5, "use 6 or 8 units"),
        (1, 0.25, "use 4 units"),
        (10, 0.123456789123, "round the rate"),
        (4, -1.0, "not negative"),
        (4, float("nan"), "not"),
    ],
)
def test_what_cannot_be_had_exactly_is_an_error_with_a_remedy(units, rate, words):
    with pytest.raises(UserError, match=words):
        CONTEXT.copies(range(units), rate)


def test_no_units_need_no_copies():
    assert CONTEXT.copies([], 2.5) == {}
