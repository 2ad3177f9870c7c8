import math

import numpy as np
import torch

from megatron_exp import seeding
from megatron_exp.model.random import grid_normals, grid_truncated_normals, grid_words, philox

KEYS = [0, 1, (1 << 64) - 1, seeding.key(0, "noise", "watermark")]


def test_torch_words_are_bitwise_those_of_numpy():
    counters = np.array([0, 1, 2, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1])
    for key in KEYS:
        for c2, c3 in [(0, 0), (7, (1 << 32) - 1)]:
            expected = seeding.philox(key, counters[:, None], counters[None, :], c2, c3)
            made = philox(key, torch.from_numpy(counters)[:, None], torch.from_numpy(counters)[None, :], c2, c3)
            assert np.array_equal(made.numpy(), expected.astype(np.int64))


def test_any_slice_of_a_grid_is_that_part_of_the_whole():
    whole = grid_words(KEYS[3], torch.arange(20), range(37), stream=1 << 63)
    part = grid_words(KEYS[3], torch.tensor([3, 17, 4]), range(6, 31), stream=1 << 63)
    assert torch.equal(part, whole[[3, 17, 4], 6:31])


def test_streams_and_keys_give_other_words():
    first = grid_words(1, torch.arange(4), range(8))
    assert not torch.equal(first, grid_words(1, torch.arange(4), range(8), stream=1))
    assert not torch.equal(first, grid_words(2, torch.arange(4), range(8)))


def test_normals_are_those_of_the_formula():
    words = grid_words(9, torch.arange(2), range(4)).numpy()
    uniforms = (words + 0.5) / 2**32
    expected = math.sqrt(-2 * math.log(uniforms[1, 2])) * math.sin(2 * math.pi * uniforms[1, 3])
    assert abs(float(grid_normals(9, torch.arange(2), 4)[1, 3]) - expected) < 1e-6


def test_normals_are_standard():
    normals = grid_normals(5, torch.arange(512), 301).double()
    assert normals.shape == (512, 301)
    error = 5 / math.sqrt(normals.numel())
    assert abs(normals.mean()) < error
    assert abs(normals.var() - 1) < error * math.sqrt(2)
    assert abs((normals**4).mean() - 3) < error * math.sqrt(96)


def test_truncated_normals_stay_within_their_bound():
    normals = grid_truncated_normals(5, torch.arange(512), range(256), 3.0).double()
    assert normals.abs().max() <= 3.0
    density = math.exp(-4.5) / math.sqrt(2 * math.pi)
    variance = 1 - 2 * 3 * density / math.erf(3 / math.sqrt(2))
    assert abs(normals.var() - variance) < 5 * math.sqrt(2 / normals.numel())
