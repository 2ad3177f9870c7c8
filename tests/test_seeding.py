import numpy as np
import pytest
from scipy import stats

from megatron_exp import seeding
from megatron_exp.seeding import Words


def test_philox_gives_the_known_answers_of_its_authors():
    # Random123's kat_vectors, philox4x32-10
    assert [f"{x:08x}" for x in seeding.philox(0, 0, 0, 0, 0)] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    ones = 0xFFFFFFFF
    assert [f"{x:08x}" for x in seeding.philox(2**64 - 1, ones, ones, ones, ones)] == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert [f"{x:08x}" for x in seeding.philox(0x299F31D0A4093822, *pi)] == ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"]


def test_golden_words_never_change():
    words = Words.of(6198, "order", 3)
    assert words.key == 0xE008F3C56A484E6C
    assert words.words(3).tolist() == [6194350349402982585, 6762621220394277228, 14978330388877305087]
    assert words.integers(6, 10).tolist() == [3, 3, 8, 3, 8, 9]
    assert words.permutation(8).tolist() == [7, 0, 3, 1, 6, 4, 2, 5]
    assert words.normals(2).tolist() == pytest.approx([-0.9880827513227454, -0.3400057239445017], abs=1e-12)


def test_names_are_typed_and_their_borders_count():
    keys = {seeding.key(0, *names) for names in [("ab", "c"), ("a", "bc"), ("abc",), (1,), ("1",), (), ("",)]}
    assert len(keys) == 7


@pytest.mark.parametrize("seed", [0, 1])
def test_multiply_high_is_the_upper_half_of_the_exact_product(seed):
    a, b = Words(seed).words(200), Words(seed + 10).words(200)
    assert seeding.multiply_high(a, b).tolist() == [int(x) * int(y) >> 64 for x, y in zip(a, b, strict=True)]


def test_integers_are_uniform():
    counts = np.bincount(Words.of(1, "uniform").integers(60_000, 6), minlength=6)
    assert stats.chisquare(counts).pvalue > 1e-4


def test_normals_are_normal():
    assert stats.kstest(Words.of(1, "normal").normals(20_000), "norm").pvalue > 1e-4


def test_a_word_depends_on_its_index_only_and_not_on_how_many_are_asked():
    words = Words.of(5, "x")
    assert np.array_equal(words.words(10)[:4], words.words(4))
    assert not np.array_equal(words.words(4, stream=1), words.words(4))


def test_one_integer_of_each_stream_is_the_first_of_that_stream():
    words, streams = Words.of(2, "each"), np.array([0, 1, 7, 2**44 | 5], dtype=np.uint64)
    assert words.one_each(23, streams).tolist() == [words.integers(1, 23, int(stream))[0] for stream in streams]
