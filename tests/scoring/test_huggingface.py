"""Loading Hugging Face models; their answers are compared with megatron's in test_engine."""

import sys

import numpy as np
import pytest
from transformers import Olmo2Config, Olmo2ForCausalLM

from megatron_exp.errors import UserError
from megatron_exp.scoring.batched import LogLikelihoodRequest
from megatron_exp.scoring.huggingface import HuggingFaceScorer

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
REQUESTS = [LogLikelihoodRequest(np.arange(10), 3, 10)]


def tiny():
    return Olmo2ForCausalLM(Olmo2Config(**SIZES, max_position_embeddings=32, pad_token_id=None, eos_token_id=0))


def test_a_saved_model_answers_as_the_one_in_memory(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    opened = HuggingFaceScorer.open(str(tmp_path))
    assert (opened.loglikelihood(REQUESTS).nats == HuggingFaceScorer(model).loglikelihood(REQUESTS).nats).all()
    assert (opened.sequence_length, opened.vocabulary_size) == (32, 64)


def test_scoring_gives_no_parameter_a_gradient():
    model = tiny()
    HuggingFaceScorer(model)._embedding_gradients(np.arange(33)[None], np.ones((1, 32), np.uint8))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_folder_without_a_model_is_the_user_s_mistake(tmp_path):
    with pytest.raises(UserError, match="config.json"):
        HuggingFaceScorer.open(str(tmp_path))


def test_a_missing_library_is_named_with_its_remedy(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'megatron-exp\[hf\]'"):
        HuggingFaceScorer.open(str(tmp_path))
