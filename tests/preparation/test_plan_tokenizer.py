import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_exp.errors import UserError
from megatron_exp.preparation import plan_tokenizer
from megatron_exp.preparation.plan_tokenizer import PlanTokenizer
from megatron_exp.shards.tokenizer import Tokenizer
from tests.shards.making import make_tokenizer

TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(["<|endoftext|>", "a <|endoftext|> b", "", " \n"])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.load(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.parametrize("backend", ["auto", "gigatoken", "reference"])
@settings(max_examples=60, deadline=None)
@given(texts=st.lists(TEXTS, min_size=2, max_size=5))
def test_every_text_has_the_ids_of_the_reference_library(tokenizer, backend, texts):
    planning = PlanTokenizer(tokenizer, backend, few=1)
    for text in texts:
        ids = planning.encode(text)
        assert ids.dtype == np.int32 and ids.tolist() == tokenizer.encode(text).tolist()
        assert planning.decode(ids) == tokenizer.decode(ids)


def test_a_difference_from_the_reference_library_stops_the_plan(tokenizer, monkeypatch):
    class Wrong:
        name, is_reference = "wrong", False

        def encode_one(self, text):
            return np.zeros(1, np.int32)

    monkeypatch.setattr(plan_tokenizer, "open_encoder", lambda *arguments: Wrong())
    planning = PlanTokenizer(tokenizer, few=1)
    with pytest.raises(UserError, match="--backend reference"):
        for number in range(2 * plan_tokenizer._CHECK_EVERY):
            planning.encode(f"text {number}")


def test_few_texts_need_no_second_library(tokenizer, monkeypatch):
    monkeypatch.setattr(plan_tokenizer, "open_encoder", lambda *arguments: pytest.fail("loaded"))
    planning = PlanTokenizer(tokenizer, few=10)
    for number in range(10):
        planning.encode(f"text {number}")
