import numpy as np
import pytest

from megatron_exp.errors import UserError
from megatron_exp.stream.slot import POOL
from tests.toy import toy_config, toy_corpus, toy_stream


def test_training_and_pool_share_no_instance_and_each_is_used_once():
    stream = toy_stream(("a", 200), ("b", 203), steps=11, batch=4, pool=6)
    train = [stream.instance(slot)[:3] for slot in range(stream.num_slots)]
    pool = [stream.instance(POOL + q)[:3] for q in range(stream.pool_slots)]
    assert len(set(train)) == 44
    assert not {(source, index) for source, _, index in train} & {(source, index) for source, _, index in pool}
    assert len(set(pool)) == 6


def test_both_directions_agree_with_several_epochs_and_fractions():
    stream = toy_stream(("a", 200), ("b", 160), steps=12, batch=4, pool=5, sources={"a": 2.5, "b": 0.5})
    for slot in range(stream.num_slots):
        source, _, index, _, _ = stream.instance(slot)
        assert slot in stream.slots(source, index)
    for q in range(stream.pool_slots):
        source, _, index, _, _ = stream.instance(POOL + q)
        assert stream.slots(source, index) == [POOL + q]


def test_epochs_are_counted_exactly():
    stream = toy_stream(("a", 80), ("b", 80), steps=1, batch=1, pool=0, sources={"a": 2.5, "b": 0.3})
    assert stream.num_indices == 25 + 3
    full = toy_stream(("a", 80), ("b", 80), steps=28, batch=1, pool=0, sources={"a": 2.5, "b": 0.3})
    uses = np.bincount([full.instance(slot).index for slot in range(28) if full.instance(slot).source == "a"])
    assert sorted(uses) == [2] * 5 + [3] * 5


def test_a_slot_holds_the_shard_content_and_one_look_ahead_token():
    stream = toy_stream(("a", 200), ("b", 203))
    for slot in range(stream.num_slots):
        place, (tokens, mask) = stream.instance(slot), stream.read(slot)
        size = stream.corpus.shards[place.shard].num_tokens
        assert tokens.dtype == np.int32 and mask.dtype == np.uint8
        assert tokens[:8].tolist() == [1000 * place.shard + place.offset + i for i in range(8)]
        if place.offset + 8 < size:
            assert tokens[8] == 1000 * place.shard + place.offset + 8 and mask.all()
        else:
            assert tokens[8] == stream.corpus.eos_id and mask.tolist() == [1] * 7 + [0]


def test_the_last_instance_of_a_shard_has_no_label_for_its_last_position():
    stream = toy_stream(("a", 64), steps=8, batch=1, pool=0)
    assert sum(1 - int(stream.read(slot).loss_mask[-1]) for slot in range(8)) == 1


def test_reading_gives_a_copy():
    stream = toy_stream()
    stream.read(3).tokens[:] = -1
    assert stream.read(3).tokens.min() >= 0


def test_more_steps_keep_the_order():
    short, long = toy_stream(steps=4), toy_stream(steps=9)
    assert [short.instance(slot) for slot in range(short.num_slots)] == [long.instance(slot) for slot in range(short.num_slots)]
    assert short.fingerprint == long.fingerprint


def test_the_fingerprint_follows_everything_that_changes_the_order():
    base = toy_stream().fingerprint
    assert toy_stream(pool=5).fingerprint != base
    assert toy_stream(length=9).fingerprint != base
    assert toy_stream(("a", 200), ("c", 203)).fingerprint != base


def test_nothing_is_opened_before_the_first_read():
    stream = toy_stream()
    stream.instance(0)
    assert not stream.corpus.opened


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 100}, "Train at most"),
        ({"pool": 1000}, "smaller pool"),
        ({"sources": {"a": 1, "c": 1}}, "holds: a, b"),
        ({"sources": {"a": 1}}, "does not list b"),
    ],
)
def test_an_impossible_stream_is_refused_with_a_remedy(options, words):
    with pytest.raises(UserError, match=words):
        toy_stream(**options)


def test_the_pool_is_drawn_in_proportion_to_what_each_source_contributes():
    from megatron_exp.stream.layout import lay_out

    sources = lay_out(toy_corpus(("a", 8000), ("b", 2000)), {"a": 1, "b": 4}, 8, 180)
    assert {source.name: source.num_pool for source in sources} == {"a": 100 * 9 // 10, "b": 90}
    assert toy_config().pool.slots == 4


def test_a_run_that_begins_later_reads_what_the_whole_order_has_there():
    whole, later = toy_stream(steps=11), toy_stream(steps=4, first_slot=20)
    for slot in range(later.num_slots):
        assert later.instance(slot) == whole.instance(20 + slot)
        source, _, index, _, _ = later.instance(slot)
        assert later.slots(source, index) == [slot]
    assert [later.instance(POOL + place) for place in range(4)] == [whole.instance(POOL + place) for place in range(4)]
    assert later.fingerprint != whole.fingerprint
    assert toy_stream(steps=11, first_slot=0).fingerprint == whole.fingerprint


def test_a_run_that_begins_too_late_is_refused():
    with pytest.raises(UserError, match="after a pool of 4 and the first 40 of its order"):
        toy_stream(steps=4, first_slot=40)
