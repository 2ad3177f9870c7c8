import numpy as np
import pytest

from megatron_exp.errors import UserError
from megatron_exp.stream.opening import make_order, open_stream
from megatron_exp.stream.slot import POOL
from tests.toy import ToyCorpus, toy_config, toy_corpus

LENGTH = 8
SIZES = [("a", 200), ("b", 203), ("a", 7), ("b", 96)]


def open_olmo(directory, *sizes, corpus=None, **options):
    config, corpus = toy_config(**{"order": "olmo", **options}), corpus or toy_corpus(*sizes or SIZES)
    return open_stream(config, corpus, make_order(config, corpus, directory))


def replay(files: list[np.ndarray], length: int, seed: int = 6198) -> list[np.ndarray]:
    """AI2's first epoch, from its description: every file in whole chunks, all chunks numbered through, shuffled by PCG64(seed + epoch)."""
    chunks = [file[first : first + length] for file in files for first in range(0, len(file) - length + 1, length)]
    indices = np.arange(len(chunks), dtype=np.uint32)
    np.random.Generator(np.random.PCG64(seed + 0)).shuffle(indices)
    return [chunks[index] for index in indices]


def test_slots_are_those_of_an_independent_replay_and_the_pool_is_what_comes_next(tmp_path):
    stream = open_olmo(tmp_path, steps=11, batch=4, pool=6)
    expected = replay([stream.corpus.tokens(shard) for shard in range(len(SIZES))], LENGTH)
    assert len(expected) == 25 + 25 + 0 + 12
    for slot in range(stream.num_slots):
        assert np.array_equal(stream.read(slot).tokens[:LENGTH], expected[slot])
    for q in range(stream.pool_slots):
        assert np.array_equal(stream.read(POOL + q).tokens[:LENGTH], expected[stream.num_slots + q])


def test_the_stored_order_is_the_layout_of_ai2s_own_file(tmp_path):
    open_olmo(tmp_path)
    indices = np.arange(62, dtype=np.uint32)
    np.random.Generator(np.random.PCG64(6198)).shuffle(indices)
    assert (tmp_path / "order.u32").read_bytes() == indices.tobytes()


def test_the_order_of_seed_6198_stays_what_it_is(tmp_path):
    assert open_olmo(tmp_path).order[:10].tolist() == [30, 6, 25, 52, 19, 24, 35, 42, 43, 12]


def test_the_last_position_has_no_label_although_the_shard_goes_on(tmp_path):
    stream = open_olmo(tmp_path)
    for slot in range(stream.num_slots):
        tokens, mask = stream.read(slot)
        assert tokens[LENGTH] == stream.corpus.eos_id and mask.tolist() == [1] * 7 + [0]


def test_both_directions_agree_and_pool_and_training_share_nothing(tmp_path):
    stream = open_olmo(tmp_path, steps=11, batch=4, pool=6)
    seen = {}
    for slot in [*range(stream.num_slots), *(POOL + q for q in range(6))]:
        place = stream.instance(slot)
        assert stream.slots(place.source, place.index) == [slot]
        assert place.epoch == 0 and stream.corpus.shards[place.shard].source == place.source
        seen[place.source, place.index] = slot
    assert len(seen) == 50
    rest = [(source.name, index) for source in stream.sources for index in range(source.num_instances) if (source.name, index) not in seen]
    assert len(rest) == 12 and all(stream.slots(*place) == [] for place in rest)


def test_a_source_left_out_gives_the_order_of_the_other_files(tmp_path):
    stream = open_olmo(tmp_path, steps=9, batch=4, pool=0, sources={"a": 0, "b": 1})
    expected = replay([stream.corpus.tokens(1), stream.corpus.tokens(3)], LENGTH)
    assert all(np.array_equal(stream.read(slot).tokens[:LENGTH], expected[slot]) for slot in range(36))


def test_a_repetitive_instance_has_no_loss_and_the_others_keep_theirs(tmp_path):
    class Repeating(ToyCorpus):
        def tokens(self, shard):
            tokens = super().tokens(shard)
            tokens[40:80] = 3
            return tokens

    stream = open_olmo(tmp_path, corpus=Repeating(toy_corpus(("a", 400)).shards), steps=10, batch=1, length=40, pool=0)
    masked = {stream.instance(slot).index for slot in range(10) if not stream.read(slot).loss_mask.any()}
    assert masked == {1}
    assert all(stream.read(slot).loss_mask[:-1].all() for slot in range(10) if stream.instance(slot).index != 1)


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_order_file_is_named(tmp_path, damage):
    config, corpus = toy_config(order="olmo"), toy_corpus(*SIZES)
    order_file = make_order(config, corpus, tmp_path)
    content = bytearray(order_file.path.read_bytes())
    if damage == "gone":
        order_file.path.unlink()
    else:
        content[100] ^= 1
        order_file.path.write_bytes(content[:-4] if damage == "cut" else content)
    with pytest.raises(UserError, match=r"order\.u32"):
        open_stream(config, corpus, order_file)


def test_an_order_is_told_from_a_list_that_is_none(tmp_path):
    stream = open_olmo(tmp_path)
    assert stream.is_permutation()
    np.memmap(tmp_path / "order.u32", dtype="<u4", mode="r+")[3] = stream.order[4]
    assert not stream.is_permutation()


def test_the_fingerprint_follows_order_and_pool(tmp_path):
    directories = [tmp_path / str(number) for number in range(5)]
    for directory in directories:
        directory.mkdir()
    streams = [
        open_olmo(directories[0]),
        open_olmo(directories[1], pool=5),
        open_olmo(directories[2], steps=9),
        open_olmo(directories[3], ("a", 400)),
        open_olmo(directories[4]),
    ]
    prints = [stream.fingerprint for stream in streams]
    assert prints[0] == prints[4] and len(set(prints)) == 4
    assert all(streams[0].instance(slot) == streams[2].instance(slot) for slot in range(streams[0].num_slots))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 15, "pool": 4}, "Train at most 14 steps"),
        ({"pool": 40}, "shrink the pool"),
        ({"sources": {"a": 2, "b": 1}}, "2 epochs of a"),
        ({"sources": {"a": 1, "b": 0.5}}, "first epoch"),
        ({"sources": {"a": 1}}, "does not list b"),
    ],
)
def test_an_impossible_order_is_refused_with_a_remedy(tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        open_olmo(tmp_path, **options)


def test_a_stream_without_its_stored_order_is_refused():
    with pytest.raises(UserError, match="Plan the manifest again"):
        open_stream(toy_config(order="olmo"), toy_corpus(*SIZES))


def test_slots_outside_run_and_pool_are_refused(tmp_path):
    stream = open_olmo(tmp_path)
    for slot in (-1, stream.num_slots, POOL + stream.pool_slots):
        with pytest.raises(UserError, match="is outside"):
            stream.read(slot)
