import numpy as np
import pytest

from megatron_exp.stream.repetition import MAX_PERIOD, MIN_COUNT, is_repetitive


def slow(tokens: list[int]) -> bool:
    """The definition: some block of 1 to 13 tokens, somewhere, at least 32 times in a row."""
    return any(
        tokens[start + period : start + period * MIN_COUNT] == tokens[start : start + period * (MIN_COUNT - 1)]
        for period in range(1, MAX_PERIOD + 1)
        for start in range(len(tokens) - period * MIN_COUNT + 1)
    )


def as_ai2_describes(tokens: np.ndarray) -> bool:
    """Rows of `period` columns, each compared with the one above; runs of equal rows grow by the equal cells around them."""
    for period in range(1, min(MAX_PERIOD, len(tokens) // 3) + 1):
        padded = np.pad(tokens, (0, period - len(tokens) % period), constant_values=-1)
        equal = padded == np.roll(padded.reshape(-1, period), 1, axis=0).ravel()
        full = [row for row in range(len(padded) // period) if equal[row * period : (row + 1) * period].all()]
        for row in full:
            start, end = row * period, (row + 1) * period
            while end < len(padded) and equal[end]:
                end += 1
            while start > 0 and equal[start - 1]:
                start -= 1
            times = (end - (start - period)) // period
            if times > 2 and times >= MIN_COUNT:
                return True
    return False


@pytest.mark.parametrize("period", range(1, MAX_PERIOD + 2))
def test_the_filter_finds_32_copies_of_a_block_anywhere_and_not_31(period):
    rng = np.random.default_rng(period)
    for start in [0, 1, 37, 700 - 32 * period]:
        for copies in (MIN_COUNT - 1, MIN_COUNT, MIN_COUNT + 3):
            tokens = np.arange(1000, 1700, dtype=np.int32)
            block = rng.permutation(100)[:period]
            pasted = np.tile(block, copies)[: 700 - start]
            tokens[start : start + len(pasted)] = pasted
            expected = period <= MAX_PERIOD and len(pasted) >= MIN_COUNT * period
            assert is_repetitive(tokens) == as_ai2_describes(tokens) == expected


def test_the_filter_agrees_with_slow_references_on_random_text_that_repeats_itself():
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(30):
        pieces = []
        for _ in range(3):
            block = rng.integers(0, 3, rng.integers(1, 16))
            pieces += [np.tile(block, rng.integers(1, 40))[: rng.integers(1, 420)], rng.integers(0, 3, rng.integers(0, 40))]
        tokens = np.concatenate(pieces).astype(np.int32)
        expected = slow(tokens.tolist())
        found += expected
        assert is_repetitive(tokens) == expected == as_ai2_describes(tokens)
    assert 3 < found < 27


def test_one_token_that_breaks_the_run_is_seen_wherever_it_stands():
    tokens = np.tile(np.array([5, 6, 7]), 32)
    assert is_repetitive(tokens)
    for position in range(len(tokens)):
        broken = tokens.copy()
        broken[position] = 9
        assert not is_repetitive(broken)


@pytest.mark.parametrize("length", [0, 1, 13, 31])
def test_a_short_instance_cannot_repeat_itself_often_enough(length):
    assert not is_repetitive(np.zeros(length, dtype=np.int32))
