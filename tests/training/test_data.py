"""The feed hands every layout the same global batches, checks ids, and mutates nothing."""

import numpy as np
import pytest
import torch

from megatron_exp.errors import UserError
from megatron_exp.model.step import micro_batch_rows
from megatron_exp.parallel.layout import Layout
from megatron_exp.stream.base import NoiseSpec, Stream
from megatron_exp.stream.slot import Slot
from megatron_exp.training.data import Batch, Feed
from tests.toy import toy_stream

VOCABULARY = 1 << 20


def rows_of(dp_rank: int, dp_size: int, micro_batch_size: int, global_batch_size: int) -> list[range]:
    alone = {f"{name}_{what}": value for name in ("tp", "pp", "cp") for what, value in (("rank", 0), ("size", 1))}
    layout = Layout(
        rank=dp_rank,
        world_size=dp_size,
        device=torch.device("cpu"),
        dp_rank=dp_rank,
        dp_size=dp_size,
        sequence_parallel=False,
        threads=1,
        **alone,
    )
    return micro_batch_rows(layout, global_batch_size, micro_batch_size)


def batches(stream: Stream, rows: list[range], steps: range, vocabulary: int = VOCABULARY) -> list[Batch]:
    feed = Feed(stream, rows, vocabulary, ["shard-00000", "shard-00001"])
    found = [feed.batch(step) for step in steps]
    feed.close()
    return found


@pytest.mark.parametrize("dp_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_the_replicas_together_read_exactly_the_slots_of_the_step(dp_size: int, micro_batch_size: int) -> None:
    stream = toy_stream(steps=4, batch=8, length=8)
    for step in range(4):
        read: dict[int, np.ndarray] = {}
        for rank in range(dp_size):
            batch = batches(stream, rows_of(rank, dp_size, micro_batch_size, 8), range(step, step + 1))[0]
            assert not read.keys() & set(batch.slots)
            read |= dict(zip(batch.slots, batch.tokens, strict=True))
        assert sorted(read) == list(stream.geometry.slots_of_step(step))
        for slot, tokens in read.items():
            np.testing.assert_array_equal(tokens, stream.read(slot).tokens)


def test_micro_batches_hold_the_rows_in_the_order_of_the_batch() -> None:
    batch = batches(toy_stream(steps=2, batch=8), rows_of(1, 2, 2, 8), range(2))[1]
    assert batch.slots == [8 + row for row in (2, 3, 6, 7)]
    np.testing.assert_array_equal(np.concatenate([one.tokens.numpy() for one in batch.micro_batches]), batch.tokens)
    np.testing.assert_array_equal(np.concatenate([one.loss_mask.numpy() for one in batch.micro_batches]), batch.loss_mask)


def test_a_feed_started_at_any_step_gives_what_a_feed_from_the_start_gives() -> None:
    stream = toy_stream(steps=5, batch=4)
    whole = batches(stream, rows_of(0, 1, 2, 4), range(5))
    for start in range(5):
        for expected, found in zip(whole[start:], batches(stream, rows_of(0, 1, 2, 4), range(start, 5)), strict=True):
            assert expected.slots == found.slots
            np.testing.assert_array_equal(expected.tokens, found.tokens)


def test_the_noise_of_a_slot_goes_with_its_row() -> None:
    class Noisy:
        def __init__(self, stream: Stream):
            self.geometry, self.read, self.instance = stream.geometry, stream.read, stream.instance

        def noise(self, slot: int) -> list[NoiseSpec]:
            return [NoiseSpec(1, slot, 0.5)] if slot % 3 == 0 else []

    batch = batches(Noisy(toy_stream(steps=2, batch=4)), rows_of(0, 1, 2, 4), range(2))[1]  # type: ignore[arg-type]
    assert [noise for one in batch.micro_batches for noise in one.noise] == [[], [], [NoiseSpec(1, 6, 0.5)], []]


def test_a_token_id_without_an_embedding_is_refused_with_its_shard_and_offset() -> None:
    stream = toy_stream(("a", 400), steps=4, batch=4, length=8)
    slot = next(slot for slot in range(16) if stream.instance(slot).offset > 0)
    bad = int(stream.read(slot).tokens.min()) + 3  # shards count up: an id only this slot's stretch of the shard goes beyond first
    place = stream.instance(slot)
    with pytest.raises(UserError, match=rf"Slot {slot} .* at token {place.offset} of shard shard-00000\."):
        batches(stream, [range(slot % 4, slot % 4 + 1)], range(slot // 4, slot // 4 + 1), vocabulary=bad)


def test_an_error_while_reading_ahead_reaches_the_step_it_belongs_to() -> None:
    stream = toy_stream(steps=3, batch=4)

    class Broken:
        geometry, noise, instance = stream.geometry, stream.noise, stream.instance

        def read(self, slot: int) -> Slot:
            if slot >= 8:
                raise UserError("shard gone")
            return stream.read(slot)

    feed = Feed(Broken(), [range(4)], VOCABULARY, ["shard-00000", "shard-00001"])
    feed.batch(0)
    feed.batch(1)
    with pytest.raises(UserError, match="shard gone"):
        feed.batch(2)
    feed.close()
