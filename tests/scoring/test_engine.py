"""The engine on real megatron-core models."""

import numpy as np
import pytest
import torch

from megatron_exp.checkpoint.saving import save_checkpoint
from megatron_exp.checkpoint.state import load_checkpoint
from megatron_exp.scoring.batched import LogLikelihoodRequest
from megatron_exp.scoring.engine import Scorer, fp32_scorer
from megatron_exp.scoring.huggingface import HuggingFaceScorer
from megatron_exp.seeding import key
from megatron_exp.stream.base import NoiseSpec
from tests.model.test_olmo2 import build_pair
from tests.model.tiny import LENGTH, VOCABULARY, running, same_weights, tiny_model, tokens_of, train, trainable, weights

GENERATOR = np.random.default_rng(0)
TEXTS = [GENERATOR.integers(0, VOCABULARY, size).astype(np.int32) for size in (5, 33, 12, 12, 20, 7)]
REQUESTS = [LogLikelihoodRequest(text, 2, len(text)) for text in TEXTS] + [LogLikelihoodRequest(TEXTS[1], 1, 9)]
SLOTS = GENERATOR.integers(0, VOCABULARY, (3, LENGTH + 1))
MASK = np.ones((3, LENGTH), np.uint8)
MASK[1, 20:] = 0
NOISE = [NoiseSpec(11, slot, 0.05) for slot in range(3)]


@pytest.fixture(scope="module")
def layout():
    with running() as layout:
        yield layout


def ask_everything(scorer):
    """Every kind of question once."""
    return [
        scorer.loglikelihood(REQUESTS).nats,
        scorer.greedy(TEXTS[2:4], 4),
        scorer.sample(TEXTS[2:4], 4, 0.9, [key(0, "a"), key(0, "b")]),
        scorer.slot_losses(SLOTS, MASK),
        scorer.embedding_gradient(SLOTS, MASK, NOISE),
    ]


def state_of(model, optimizer):
    """Everything scoring must leave as it is, as bytes."""
    chunks = model.training_chunks
    gradients = [parameter.grad for chunk in model.chunks for parameter in chunk.parameters()]
    buffers = [parameter.main_grad for chunk in model.chunks for parameter in chunk.parameters()]
    return {
        "weights": [raw(tensor) for tensor in weights(model)],
        "gradients": [None if tensor is None else raw(tensor) for tensor in gradients],
        "buffers": [raw(tensor) for tensor in buffers],
        "requires gradients": [parameter.requires_grad for chunk in model.chunks for parameter in chunk.parameters()],
        "modes": [module.training for chunk in [*chunks, *model.callable_chunks] for module in chunk.modules()],
        "torch": raw(torch.get_rng_state()),
        "numpy": np.random.get_state()[1].tobytes(),
        "finalize": model.config.finalize_model_grads_func,
    }


def raw(tensor):
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_scoring_between_steps_changes_no_bit_of_training(layout, precision):
    asked, optimizer = trainable(layout, precision)
    silent, silent_optimizer = trainable(layout, precision)
    for step in range(3):
        losses = [result.loss for result in train(asked, optimizer, [step])]
        before = state_of(asked, optimizer)
        ask_everything(Scorer(asked))
        assert state_of(asked, optimizer) == before
        assert losses == [result.loss for result in train(silent, silent_optimizer, [step])]
    assert same_weights(asked, silent)


def test_a_model_in_training_and_its_checkpoint_give_bitwise_the_same_answers(layout, tmp_path):
    live, optimizer = trainable(layout)
    train(live, optimizer, range(3), noise=[[NoiseSpec(11, row, 0.05)] for row in range(4)])
    asked = ask_everything(Scorer(live))
    save_checkpoint(tmp_path / "checkpoint", live, optimizer, {})
    loaded = tiny_model(layout, seed=1)
    load_checkpoint(tmp_path / "checkpoint", loaded, None)
    for while_training, afterwards in zip(asked, ask_everything(Scorer(loaded)), strict=True):
        assert (while_training == afterwards).all()
    assert np.isfinite(asked[-1]).all() and len(set(asked[-1].tolist())) == len(NOISE)


def test_noise_of_a_training_batch_does_not_reach_the_answers(layout):
    model = tiny_model(layout)
    clean = Scorer(model).slot_losses(SLOTS, MASK)
    model.noise.set([[NoiseSpec(1, 1, 0.5)]] * 3)
    assert (Scorer(model).slot_losses(SLOTS, MASK) == clean).all()


def test_the_same_question_gets_the_same_answer(layout):
    model = tiny_model(layout)
    for first, second in zip(ask_everything(Scorer(model)), ask_everything(Scorer(model)), strict=True):
        assert (first == second).all()


def test_batches_of_any_size_agree(layout):
    model = tiny_model(layout)
    for small, large in zip(ask_everything(Scorer(model, max_tokens=1)), ask_everything(Scorer(model)), strict=True):
        assert small == pytest.approx(large, rel=1e-5)


def test_megatron_and_transformers_give_the_same_answers(layout):
    model, reference = build_pair(layout, kv_groups=2)
    reference.config.max_position_embeddings = LENGTH
    ours, theirs = ask_everything(Scorer(model)), ask_everything(HuggingFaceScorer(reference, noise_dtype=torch.float32))
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
    flags = Scorer(model).loglikelihood(REQUESTS).greedy
    assert (flags == HuggingFaceScorer(reference).loglikelihood(REQUESTS).greedy).all()


def test_loglikelihood_is_minus_the_summed_loss_of_the_span(layout):
    scorer = Scorer(tiny_model(layout))
    whole = scorer.loglikelihood([LogLikelihoodRequest(SLOTS[0], 1, LENGTH + 1)])
    assert whole.nats[0] == pytest.approx(-LENGTH * scorer.slot_losses(SLOTS, MASK)[0])
    assert whole.num_tokens[0] == LENGTH


def test_watermark_statistic_is_the_slope_of_the_loss_along_the_noise(layout):
    """Two noises, one gradient: their statistics are in the ratio of the slopes that adding a little of each noise shows."""
    model, _ = build_pair(layout, kv_groups=4)
    one, other = NoiseSpec(1, 0, 0.05), NoiseSpec(2, 0, 0.05)
    found = Scorer(model).embedding_gradient(SLOTS[[0, 0]], MASK[[0, 0]], [one, other])
    slopes = [slope(model, spec) for spec in (one, other)]
    assert slopes[0] / slopes[1] == pytest.approx(found[0] / found[1], rel=2e-2)
    assert np.sign(found).tolist() == np.sign(-np.array(slopes)).tolist()


def slope(model, spec):
    """d loss / d share of the noise added, by central difference, through the noise hook that training uses."""
    inputs, labels = torch.from_numpy(SLOTS[:1, :-1]), torch.from_numpy(SLOTS[:1, 1:])
    losses = []
    for share in (-0.05, 0.05):
        model.noise.set([[spec._replace(scale=share * spec.scale)]])
        with torch.no_grad():
            losses.append(float(model.chunks[0](inputs, None, None, labels=labels)[..., 0].double().mean()))
    model.noise.clear()
    return (losses[1] - losses[0]) / 0.1


def test_training_on_noise_makes_its_statistic_positive(layout):
    model, optimizer = trainable(layout)
    specs = [NoiseSpec(7, row, 0.1) for row in range(4)]
    train(model, optimizer, [3] * 30, noise=[[spec] for spec in specs])
    tokens = tokens_of(3).numpy()
    learnt = Scorer(model).embedding_gradient(tokens, np.ones((4, LENGTH), np.uint8), specs)
    fresh = Scorer(model).embedding_gradient(tokens, np.ones((4, LENGTH), np.uint8), [spec._replace(key=8) for spec in specs])
    assert learnt.mean() > 3 > abs(fresh.mean())


def test_a_16_bit_model_is_differentiated_in_fp32_with_its_noise_as_it_was_rounded(layout):
    model = tiny_model(layout, precision="bf16")
    exact = fp32_scorer(model)
    assert exact.noise_dtype == torch.bfloat16
    for chunk, own in zip(exact._model.chunks, model.chunks, strict=True):
        kept = dict(own.named_parameters())
        assert all(p.dtype == torch.float32 and torch.equal(p, kept[name].float()) for name, p in chunk.named_parameters())
    found, coarse = exact.embedding_gradient(SLOTS, MASK, NOISE), Scorer(model).embedding_gradient(SLOTS, MASK, NOISE)
    assert np.isfinite(found).all() and found == pytest.approx(coarse, abs=0.3) and not np.array_equal(found, coarse)
    other = Scorer(exact._model).embedding_gradient(SLOTS, MASK, NOISE)  # with noise that was never rounded
    assert found == pytest.approx(other, abs=0.02) and not np.array_equal(found, other)
