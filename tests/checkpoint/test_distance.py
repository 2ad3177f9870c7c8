import pytest

from megatron_exp.checkpoint.distance import weight_distance
from megatron_exp.checkpoint.saving import save_checkpoint
from megatron_exp.errors import UserError
from megatron_exp.model.parts import PARTS, part_of
from tests.model.tiny import running, tiny_model, train, trainable


@pytest.fixture(scope="module")
def layout():
    with running() as layout:
        yield layout


def by_hand(ours, theirs):
    apart = dict.fromkeys(PARTS.values(), 0.0)
    for (name, one), (_, other) in zip(ours.chunks[0].named_parameters(), theirs.chunks[0].named_parameters(), strict=True):
        apart[part_of(name)] += float((one.detach().double() - other.detach().double()).square().sum())
    return {part: total**0.5 for part, total in apart.items()}


def test_the_distance_is_that_of_all_weights_by_part_and_optimizer_state_is_no_weight(layout, tmp_path):
    ours, optimizer = trainable(layout)
    theirs = tiny_model(layout)
    train(ours, optimizer, range(3))
    save_checkpoint(tmp_path / "ours", ours, optimizer, {})
    save_checkpoint(tmp_path / "theirs", theirs, None, {})
    found = weight_distance(tmp_path / "ours", tmp_path / "theirs")
    assert {part: one["distance"] for part, one in found.items()} == pytest.approx(by_hand(ours, theirs), rel=1e-5)
    assert all(one["norm"] > 0 for one in found.values())
    assert {one["distance"] for one in weight_distance(tmp_path / "ours", tmp_path / "ours").values()} == {0.0}


def test_models_of_two_shapes_have_no_distance(layout, tmp_path):
    save_checkpoint(tmp_path / "small", tiny_model(layout), None, {})
    save_checkpoint(tmp_path / "large", tiny_model(layout, layers=3), None, {})
    with pytest.raises(UserError, match="one model shape"):
        weight_distance(tmp_path / "small", tmp_path / "large")
