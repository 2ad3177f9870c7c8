"""Packing and sharing of sequences."""

import numpy as np

from megatron_exp.scoring.batches import WIDTH_MULTIPLE, pack, padded, share

LENGTHS = np.random.default_rng(0).integers(1, 250, 500)


def test_every_row_is_in_exactly_one_batch_that_is_wide_enough():
    batches = pack(LENGTHS, 2048, 250)
    assert sorted(np.concatenate([batch.rows for batch in batches])) == list(range(500))
    assert all((LENGTHS[batch.rows] <= batch.width).all() for batch in batches)


def test_batches_stay_within_the_token_budget_and_the_model():
    batches = pack(LENGTHS, 2048, 250)
    assert all(len(batch.rows) * batch.width <= 2048 and batch.width <= 250 for batch in batches)
    assert all(batch.width % WIDTH_MULTIPLE == 0 or batch.width == 250 for batch in batches)


def test_a_row_beyond_the_budget_goes_alone():
    assert [list(batch.rows) for batch in pack(np.array([10, 99, 99]), 50, 99)] == [[1], [2], [0]]


def test_little_is_wasted_on_padding():
    batches = pack(LENGTHS, 2048, 250)
    assert sum(len(batch.rows) * batch.width for batch in batches) < 1.25 * LENGTHS.sum()


def test_rows_are_cut_or_padded_to_the_width():
    assert padded([np.array([1, 2, 3]), np.array([4])], 2).tolist() == [[1, 2], [4, 0]]


def test_equal_sequences_and_beginnings_share_one_pass():
    sequences = [np.array(s) for s in ([1, 2], [1, 2, 3], [2], [1, 2, 3], [1], [2, 1])]
    kept, answered_by = share(sequences)
    assert sorted(sequence.tolist() for sequence in kept) == [[1, 2, 3], [2, 1]]
    for sequence, index in zip(sequences, answered_by, strict=True):
        assert kept[index][: len(sequence)].tolist() == sequence.tolist()


def test_a_common_start_alone_is_not_shared():
    kept, _ = share([np.array([1, 256]), np.array([1]), np.array([1, 257]), np.array([256])])
    assert len(kept) == 3
