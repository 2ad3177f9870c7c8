"""A training state put back is the same bit by bit, whatever was trained in between."""

import pytest

from megatron_exp.model.snapshot import Snapshot
from tests.model.tiny import running, same_weights, train, trainable


@pytest.fixture(scope="module")
def layout():
    with running() as layout:
        yield layout


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_from_a_restored_state_is_training_from_the_state_itself(layout, precision):
    straight, model = trainable(layout, precision), trainable(layout, precision)
    train(*straight, range(3))
    train(*model, range(3))
    start = Snapshot(*model)
    expected = train(*straight, range(3, 6))
    train(*model, range(10, 14))  # another row
    start.restore()
    assert train(*model, range(3, 6)) == expected
    assert same_weights(model[0], straight[0])
    assert model[1].summary() == straight[1].summary()


def test_a_state_without_moments_is_restored_to_one_without(layout):
    straight, model = trainable(layout), trainable(layout)
    start = Snapshot(*model)
    train(*model, range(4))
    start.restore()
    assert model[1].summary() == straight[1].summary()
    assert train(*model, range(2)) == train(*straight, range(2))
