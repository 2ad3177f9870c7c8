import numpy as np
import pytest
from scipy import stats

from megatron_exp.seeding import words64
from megatron_exp.stream.permutation import Permutation


def test_every_size_up_to_2000_is_a_bijection_with_its_inverse():
    for size in range(1, 2001):
        permutation = Permutation(size, key=size * 31)
        images = permutation.forward(np.arange(size))
        assert np.array_equal(np.sort(images), np.arange(size))
        assert np.array_equal(permutation.inverse(images), np.arange(size))


@pytest.mark.slow
def test_every_size_up_to_10000_is_a_bijection():
    for size in range(2001, 10_001):
        images = Permutation(size, key=size * 31).forward(np.arange(size))
        assert np.array_equal(np.sort(images), np.arange(size))


@pytest.mark.parametrize("size", [10**9, 2**31 + 5, 10**12 + 39])
def test_huge_sizes_invert_point_by_point(size):
    permutation = Permutation(size, key=3)
    points = np.array([0, 1, size // 2, size - 1], dtype=np.uint64)
    images = permutation.forward(points)
    assert images.max() < size
    assert np.array_equal(permutation.inverse(images), points)


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_small_permutations_are_equally_likely_over_keys(size):
    seen = [tuple(Permutation(size, key).forward(np.arange(size)).tolist()) for key in range(6000)]
    _, counts = np.unique(seen, axis=0, return_counts=True)
    assert len(counts) == np.prod(np.arange(1, size + 1))
    assert stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("size", [1500, 10**9])
def test_images_of_neighbours_are_uniform_and_uncorrelated(size):
    images = Permutation(size, key=11).forward(np.arange(min(size, 50_000))).astype(np.float64) / size
    assert stats.chisquare(np.histogram(images, bins=20, range=(0, 1))[0]).pvalue > 1e-4
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 5 / np.sqrt(len(images))


def test_golden_images_never_change():
    assert Permutation(10, key=1).forward(np.arange(10)).tolist() == [3, 6, 5, 7, 2, 9, 4, 1, 0, 8]
    assert Permutation(10**9, key=1).forward(np.arange(5)).tolist() == [89108705, 482057549, 515094363, 602522800, 605921337]


def test_a_value_outside_is_an_error():
    with pytest.raises(IndexError):
        Permutation(5000, key=0).forward(5000)


@pytest.mark.parametrize("size", [1, 7, 1024, 1025, 4_099, 2**31 + 11, 10**12 + 39, 2**61 + 1])
def test_one_value_has_the_image_that_it_has_among_many(size):
    permutation = Permutation(size, key=size ^ 0x5EED)
    values = sorted({0, size - 1, *(int(word) % size for word in words64(3, np.arange(300, dtype=np.uint64)))})
    images = permutation.forward(np.array(values, dtype=np.uint64))
    assert [int(permutation.forward(value)) for value in values] == images.tolist()
    with pytest.raises(IndexError):
        permutation.forward(size)
