import pytest
import torch

from megatron_exp.model.noise import applied_noise, noise_tensor
from megatron_exp.model.scoring import token_scores
from megatron_exp.model.step import MicroBatch, train_step
from megatron_exp.stream.slot import POOL
from tests.model.tiny import LENGTH, ROWS, mask_of, running, same_weights, tiny_model, tokens_of, train, trainable


@pytest.fixture(scope="module")
def layout():
    with running() as layout:
        yield layout


def spec(key: int, slot: int, scale: float):
    from megatron_exp.stream.base import NoiseSpec

    return NoiseSpec(key, slot, scale)


def embeddings_of(model, tokens):
    captured = []
    # Runs after the noise hook, which was registered first.
    handle = model.chunks[0].embedding.register_forward_hook(lambda module, args, output: captured.append(output.transpose(0, 1).detach()))
    model.chunks[0](tokens[:, :-1], None, None)
    handle.remove()
    return captured[0]


def test_noise_depends_on_key_and_slot_and_position():
    noise = noise_tensor(1, 2, LENGTH, 32)
    assert noise.shape == (LENGTH, 32)
    assert not torch.equal(noise, noise_tensor(1, 3, LENGTH, 32))
    assert not torch.equal(noise, noise_tensor(2, 2, LENGTH, 32))
    assert not torch.equal(noise, noise_tensor(1, POOL + 2, LENGTH, 32))
    assert torch.equal(noise[[30, 3]], noise_tensor(1, 2, LENGTH, 32, positions=torch.tensor([30, 3])))
    assert torch.equal(noise, noise_tensor(1, 2, 2 * LENGTH, 32)[:LENGTH])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_exactly_the_noised_rows_change_and_by_the_stated_noise(layout, precision):
    model = tiny_model(layout, precision)
    tokens = tokens_of(0)
    clean = embeddings_of(model, tokens)
    rows = [[], [spec(1, 5, 0.1)], [], [spec(1, 6, 0.1), spec(2, 6, 0.3)]]
    model.noise.set(rows)
    noised = embeddings_of(model, tokens)
    model.noise.clear()
    for row, specs in enumerate(rows):
        expected = clean[row] + applied_noise(specs, LENGTH, 32, model.dtype) if specs else clean[row]
        assert torch.equal(noised[row], expected)
    assert torch.equal(embeddings_of(model, tokens), clean)


def test_noise_changes_training_and_is_off_when_scoring(layout):
    noised, clean = trainable(layout), trainable(layout)
    specs = [[spec(1, row, 0.05)] for row in range(ROWS)]
    train(*noised, [0, 1], noise=specs)
    train(*clean, [0, 1])
    assert not same_weights(noised[0], clean[0])
    before = token_scores(noised[0], tokens_of(3)).losses
    noised[0].noise.set(specs)
    assert torch.equal(token_scores(noised[0], tokens_of(3)).losses, before)


def test_each_micro_batch_has_its_own_noise(layout):
    together, apart = trainable(layout), trainable(layout)
    specs = [[spec(1, row, 0.5)] if row % 2 else [] for row in range(ROWS)]
    whole = train(*together, [0], ROWS, noise=specs)[0]
    single = train(*apart, [0], 1, noise=specs)[0]
    plain = trainable(layout)
    plain[1].set_learning_rate(0.0)
    assert whole.loss == pytest.approx(single.loss, abs=1e-5)
    assert abs(whole.loss - train_step(*plain, [MicroBatch(tokens_of(0), mask_of(0))]).loss) > 1e-4
