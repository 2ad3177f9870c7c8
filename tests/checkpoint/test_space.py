from collections import namedtuple

import pytest

from megatron_exp.checkpoint import catalogue, space
from megatron_exp.checkpoint.saving import save_checkpoint
from megatron_exp.errors import UserError
from tests.model.tiny import running, tiny_shape, train, trainable


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("is_portable", [True, False], ids=["portable", "parallel"])
def test_a_checkpoint_takes_what_is_computed_from_its_model(tmp_path, precision, is_portable):
    with running() as layout:
        whole = trainable(layout, precision, hidden=128, ffn=512)
        train(*whole, range(1))
        save_checkpoint(tmp_path / "one", *whole, {}, is_portable=is_portable)
    actual = sum(file.stat().st_size for file in (tmp_path / "one").rglob("*"))
    computed = space.checkpoint_bytes(tiny_shape(hidden=128, ffn=512).num_parameters, precision)
    assert 0.97 * (computed - (1 << 20)) < actual < computed


def test_the_1b_model_takes_21_gib_and_all_kept_ones_count():
    assert round(space.checkpoint_bytes(1_485_000_000, "bf16") / 2**30, 1) == 19.8
    assert space.most_at_once(1000, 0, {5, 7000}, 100_000, 2) == 6
    assert space.most_at_once(1000, 10_000, {5, 7000}, 100_000, 2) == 7
    assert space.most_at_once(1000, 0, (), 1500, 2) == 2, "a short run never has as many"
    assert space.most_at_once(1000, 0, {9999}, 1500, 2) == 2, "states after the end are never reached"


def test_too_little_room_is_refused_with_the_numbers_and_what_lies_there_counts(tmp_path, monkeypatch):
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(100 << 30, 0, 5 << 30))
    run = tmp_path / "run"
    with pytest.raises(UserError, match="room for 6 checkpoints of 1 GiB .* has 0, so 6 GiB more are needed; its disk has 5 GiB free"):
        space.require_room(run, 1 << 30, 6)
    path = catalogue.checkpoint_path(run, 1)
    path.mkdir(parents=True)
    catalogue.seal(path, {})
    space.require_room(run, 1 << 30, 6)
    space.require_room_for_one(path, 5 << 30)
    with pytest.raises(UserError, match="takes 6 GiB, and its disk has 5 GiB free"):
        space.require_room_for_one(path, 6 << 30)
