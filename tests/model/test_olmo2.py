"""The model against transformers' Olmo2ForCausalLM with the same random weights."""

import pytest
import torch
from transformers import Olmo2Config, Olmo2ForCausalLM

from megatron_exp.checkpoint.convert_names import correspondences
from megatron_exp.model.presets import NORM_EPS, ROPE_THETA, Z_LOSS_WEIGHT
from megatron_exp.model.scoring import token_scores
from tests.model.tiny import ROWS, VOCABULARY, randomize, running, tiny_model, tokens_of


@pytest.fixture(scope="module")
def layout():
    with running() as layout:
        yield layout


def as_transformers(shape, tensors):
    """Their names and tensors from ours; a permutation, so it maps weights and gradients alike."""
    return {name: tensor for one in correspondences(shape) for name, tensor in one.split(tensors[one.parameter]).items()}


def build_pair(layout, kv_groups, layers=2):
    model = tiny_model(layout, kv_groups=kv_groups, layers=layers)
    randomize(model)
    shape = model.shape
    reference = Olmo2ForCausalLM(
        Olmo2Config(
            vocab_size=shape.vocabulary_size,
            hidden_size=shape.hidden,
            intermediate_size=shape.ffn,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_groups,
            rms_norm_eps=NORM_EPS,
            rope_parameters={"rope_type": "default", "rope_theta": float(ROPE_THETA)},
            attention_bias=False,
            tie_word_embeddings=False,
            pad_token_id=None,
        )
    )
    parameters = {name: parameter.detach().clone() for name, parameter in model.chunks[0].named_parameters()}
    reference.load_state_dict(as_transformers(shape, parameters), strict=True)
    return model, reference


@pytest.mark.parametrize("kv_groups", [4, 2])
def test_logits_and_gradients_are_those_of_transformers(layout, kv_groups):
    model, reference = build_pair(layout, kv_groups)
    tokens = tokens_of(0)
    expected = reference(tokens[:, :-1]).logits
    made = model.chunks[0](tokens[:, :-1], None, None)
    assert expected.std() > 0.5
    assert torch.allclose(made, expected, atol=1e-5)

    losses, normalizers = model.chunks[0](tokens[:, :-1], None, None, labels=tokens[:, 1:]).unbind(-1)
    (losses.mean() + Z_LOSS_WEIGHT * normalizers.square().mean()).backward()
    cross_entropy = torch.nn.functional.cross_entropy(expected.flatten(0, 1), tokens[:, 1:].flatten())
    (cross_entropy + Z_LOSS_WEIGHT * expected.logsumexp(-1).square().mean()).backward()
    assert losses.mean().item() == pytest.approx(cross_entropy.item(), abs=1e-6)
    ours = as_transformers(model.shape, {name: parameter.grad for name, parameter in model.chunks[0].named_parameters()})
    for name, parameter in reference.named_parameters():
        assert (ours[name] - parameter.grad).norm() <= 1e-3 * parameter.grad.norm(), name


def test_scores_of_a_shorter_text_are_its_losses(layout):
    model, reference = build_pair(layout, 4)
    tokens = tokens_of(0)[:, :12]
    logits = reference(tokens[:, :-1]).logits
    scores = token_scores(model, tokens)
    assert scores.losses.shape == (ROWS, 11)
    assert torch.allclose(scores.losses, torch.nn.functional.cross_entropy(logits.mT, tokens[:, 1:], reduction="none"), atol=1e-5)
    assert torch.equal(scores.most_likely, logits.argmax(-1) == tokens[:, 1:])
    assert int(tokens.max()) < VOCABULARY
