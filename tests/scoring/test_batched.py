"""The engine without a network: a bigram model whose answers are known."""

import numpy as np
import pytest
import torch

from megatron_exp.model.noise import applied_noise
from megatron_exp.scoring.batched import LogLikelihoodRequest, drawn
from megatron_exp.seeding import key
from megatron_exp.stream.base import NoiseSpec
from tests.scoring.bigram import HIDDEN, LENGTH, VOCABULARY, Bigram, sequences


def spans(texts):
    generator = np.random.default_rng(3)
    starts = [int(generator.integers(1, len(text))) for text in texts]
    return [
        LogLikelihoodRequest(text, start, int(generator.integers(start + 1, len(text) + 1)))
        for text, start in zip(texts, starts, strict=True)
    ]


def test_spans_get_the_log_probability_of_their_own_tokens():
    model, requests = Bigram(), spans(sequences(200))
    found = model.loglikelihood(requests)
    assert found.nats == pytest.approx([model.log_probability(*request[:3]) for request in requests])
    assert found.num_tokens.tolist() == [request.end - request.start for request in requests]


def test_answers_do_not_depend_on_the_size_of_batches():
    requests = spans(sequences(100))
    small, large = Bigram(max_tokens=48).loglikelihood(requests), Bigram(max_tokens=4096).loglikelihood(requests)
    assert (small.nats == large.nats).all() and (small.greedy == large.greedy).all()


def test_greedy_flag_says_whether_greedy_decoding_writes_the_span():
    model = Bigram()
    prompts = sequences(20, longest=20)
    written = model.greedy(prompts, 5)
    texts = [np.concatenate([prompt, tokens]) for prompt, tokens in zip(prompts, written, strict=True)]
    assert model.loglikelihood([LogLikelihoodRequest(text, len(text) - 5, len(text)) for text in texts]).greedy.all()
    for text in texts:
        text[-1] = (text[-1] + 1) % VOCABULARY
    assert not model.loglikelihood([LogLikelihoodRequest(text, len(text) - 5, len(text)) for text in texts]).greedy.any()


def test_ties_go_to_the_lower_id():
    model = Bigram(np.zeros((VOCABULARY, VOCABULARY)))
    assert (model.greedy([np.array([3])], 4) == 0).all()


def test_questions_about_the_same_text_cost_one_pass():
    model, text = Bigram(), sequences(1, longest=30)[0]
    model.loglikelihood([LogLikelihoodRequest(text, 1, end) for end in range(2, len(text) + 1)])
    assert [shape[0] for shape in model.shapes] == [1]


def test_a_span_outside_the_tokens_is_refused():
    for start, end in ((0, 2), (2, 2), (1, 9)):
        with pytest.raises(ValueError, match="does not lie"):
            Bigram().loglikelihood([LogLikelihoodRequest(np.arange(4), start, end)])


def test_prompts_the_model_cannot_hold_are_refused():
    model = Bigram()
    assert model.greedy([np.zeros(LENGTH, int)], 1).shape == (1, 1)  # the last written token is never an input
    with pytest.raises(ValueError, match="longer"):
        model.greedy([np.zeros(LENGTH, int)], 2)
    with pytest.raises(ValueError, match="empty"):
        model.greedy([np.zeros(0, int)], 2)


def test_samples_follow_the_distribution():
    model = Bigram()
    draws = model.sample([np.array([5])] * 4000, 1, 0.8, [key(0, "draw", i) for i in range(4000)])[:, 0]
    expected = np.exp(model.table[5] / 0.8) / np.exp(model.table[5] / 0.8).sum()
    assert np.bincount(draws, minlength=VOCABULARY) / 4000 == pytest.approx(expected, abs=0.04)


def test_a_sample_depends_on_its_own_prompt_and_key_only():
    prompts, keys = sequences(30, longest=20), [key(1, i) for i in range(30)]
    together = Bigram().sample(prompts, 6, 1.0, keys)
    alone = Bigram().sample(prompts[7:8], 6, 1.0, keys[7:8])
    assert (together[7] == alone[0]).all()
    assert (Bigram().sample(prompts, 6, 1.0, keys[::-1]) != together).any()


def test_the_lowest_and_the_highest_draw_stay_in_the_vocabulary():
    logits = np.array([[0.0, -1000.0, 0.0, -1000.0]] * 2)
    assert drawn(logits, 1.0, np.array([2.0**-54, 1.0])).tolist() == [0, 2]


def test_slot_loss_is_the_mean_over_unmasked_tokens():
    model = Bigram()
    tokens = np.random.default_rng(2).integers(0, VOCABULARY, (5, LENGTH + 1))
    mask = np.ones((5, LENGTH), np.uint8)
    mask[1, 10:] = 0
    mask[2] = 0
    found = model.slot_losses(tokens, mask)
    assert found[0] == pytest.approx(-model.log_probability(tokens[0], 1, LENGTH + 1) / LENGTH)
    assert found[1] == pytest.approx(-model.log_probability(tokens[1], 1, 11) / 10)
    assert np.isnan(found[2])


def test_watermark_statistic_projects_the_gradient_on_the_noise():
    tokens = np.random.default_rng(2).integers(0, VOCABULARY, (3, LENGTH + 1))
    mask = np.ones((3, LENGTH), np.uint8)
    mask[2] = 0
    noise = [NoiseSpec(5, slot, 0.075) for slot in range(3)]
    found = Bigram().embedding_gradient(tokens, mask, noise)
    gradient = (tokens[1, :-1, None] * np.arange(1, HIDDEN + 1)).astype(float)
    added = applied_noise([noise[1]], LENGTH, HIDDEN, torch.float32).numpy().astype(float)
    assert found[1] == pytest.approx(-(gradient * added).sum() / (0.075 * np.linalg.norm(gradient)), rel=1e-6)
    assert np.isnan(found[2])


def test_replicas_share_the_work_and_their_sum_is_the_whole():
    requests = spans(sequences(100))
    whole = Bigram(max_tokens=64).loglikelihood(requests)
    parts = [Bigram(max_tokens=64, replica=(rank, 3)) for rank in range(3)]
    answers = [part.loglikelihood(requests) for part in parts]
    assert (sum(answer.nats for answer in answers) == whole.nats).all()
    assert max(len(part.shapes) for part in parts) - min(len(part.shapes) for part in parts) <= 1


def test_the_least_likely_share_of_a_span_counts_alone():
    model, text = Bigram(), sequences(1)[0]
    each = sorted(model.log_probability(text, place, place + 1) for place in range(1, len(text)))
    for share in (0.01, 0.4, 1.0):
        found = model.loglikelihood([LogLikelihoodRequest(text, 1, len(text), share)])
        num = max(1, int(np.ceil(share * len(each))))
        assert found.nats[0] == pytest.approx(sum(each[:num])) and found.num_tokens[0] == num
