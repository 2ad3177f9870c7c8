import math

import pytest

from megatron_exp.display import numbers


@pytest.mark.parametrize("write", [numbers.count, numbers.measured, numbers.signed, numbers.probability, numbers.percent, numbers.duration])
@pytest.mark.parametrize("missing", [None, math.nan])
def test_what_was_not_measured_is_never_a_number(write, missing):
    assert write(missing) == numbers.ABSENT


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (numbers.count(999_999), "999,999"),
        (numbers.size(512), "512 B"),
        (numbers.size(1.5 * 2**30), "1.5 GiB"),
        (numbers.size(3 * 2**50), "3,072 TiB"),
        (numbers.count(1_228_800), "1.23M"),
        (numbers.measured(-0.0123456), "−0.0123"),
        (numbers.measured(1.5e-9), "1.50\u00a0×\u00a010⁻⁹"),
        (numbers.measured(math.inf), "∞"),
        (numbers.signed(0.5), "+0.500"),
        (numbers.probability(3e-17), "3.0\u00a0×\u00a010⁻¹⁷"),
        (numbers.probability(0.04), "0.040"),
        (numbers.percent(0.018), "1.80%"),
        (numbers.percent(0.0000312), "0.0031%"),
        (numbers.interval(-1.0, math.inf), "[−1.00, ∞]"),
        (numbers.interval(math.nan, 2.0), "[−∞, 2.00]"),
        (numbers.interval(None, None), numbers.ABSENT),
        (numbers.duration(3700), "1 h 1 min"),
        (numbers.counted(1, "item"), "1 item"),
        (numbers.counted(1000, "item"), "1,000 items"),
    ],
)
def test_numbers_are_written_with_the_digits_that_carry_meaning(text, expected):
    assert text == expected
