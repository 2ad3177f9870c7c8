import json

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import models, pre_tokenizers

from megatron_exp.errors import UserError
from megatron_exp.preparation.preprocess_encode import Encoders, GigatokenEncoder, ReferenceEncoder, SpecialStrings, open_encoder
from megatron_exp.shards.tokenizer import Tokenizer
from tests.shards.making import REAL_DATA, ROOT, make_tokenizer, tokenizer_bytes

EOS = "<|endoftext|>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.load(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def same(first, second):
    return np.array_equal(first.ids, second.ids) and np.array_equal(first.lengths, second.lengths)


TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(
    st.sampled_from([EOS, EOS[:-1], "<|", "words ", " ", "\n", "\u0301", "\u200d", "\U0001f469", "12345", "'s", "\r\n", "\x00"])
).map("".join)


@pytest.mark.parametrize("policy", ["plain", "special"])
@settings(max_examples=150, deadline=None)
@given(batch=st.lists(TEXTS, max_size=5))
def test_gigatoken_gives_the_ids_of_the_reference(tokenizer, policy, batch):
    assert same(GigatokenEncoder(tokenizer, policy).encode(batch), ReferenceEncoder(tokenizer, policy).encode(batch))


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="needs ../shared/data (the dolma2 tokenizer)")
@pytest.mark.parametrize("policy", ["plain", "special"])
def test_gigatoken_gives_the_ids_of_the_reference_for_dolma2(policy):
    encoders = Encoders(REAL_DATA / "tokenizers" / "dolma2.json", "gigatoken", policy)

    @settings(max_examples=200, deadline=None)
    @given(TEXTS)
    def check(text):
        assert same(encoders.bulk.encode([text]), encoders.reference.encode([text]))

    check()


def test_a_model_that_gigatoken_refuses_goes_to_the_reference(tmp_path):
    library = LibraryTokenizer(models.WordLevel({"[UNK]": 0, "hello": 1, "</s>": 2}, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.add_special_tokens(["</s>"])
    library.save(str(tmp_path / "words.json"))
    tokenizer = Tokenizer.load(tmp_path / "words.json")
    assert open_encoder(tokenizer, "auto", "plain").is_reference
    with pytest.raises(UserError, match="gigatoken cannot encode"):
        open_encoder(tokenizer, "gigatoken", "plain")


def test_a_model_where_the_two_differ_goes_to_the_reference(tokenizer, monkeypatch):
    monkeypatch.setattr(
        GigatokenEncoder, "encode", lambda self, texts: ReferenceEncoder(tokenizer, "plain").encode([text + "!" for text in texts])
    )
    assert open_encoder(tokenizer, "auto", "plain").is_reference
    with pytest.raises(UserError, match="differ"):
        open_encoder(tokenizer, "gigatoken", "plain")


def test_gigatoken_serves_byte_level_bpe(tokenizer):
    assert not open_encoder(tokenizer, "auto", "plain").is_reference


def sentencepiece_tokenizer(directory, **options):
    sentences = (ROOT / "megatron_exp" / "seeding.py").read_text(encoding="utf-8").splitlines()
    with open(directory / "small.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=file,
            vocab_size=450,
            model_type="bpe",
            byte_fallback=True,
            minloglevel=2,
            **options,
        )
    return Tokenizer.load(directory / "small.model")


def test_gigatoken_serves_sentencepiece_models_that_change_no_text(tmp_path):
    """As of Llama and Mistral. Strings of control symbols stay text, as the sentencepiece library has it."""
    model = sentencepiece_tokenizer(tmp_path, normalization_rule_name="identity", remove_extra_whitespaces=False)
    fast, reference = open_encoder(model, "gigatoken", "plain"), ReferenceEncoder(model, "plain")
    assert not fast.is_reference
    assert same(fast.encode(["a", "b </s> <s>", "", "<unk>c"]), reference.encode(["a", "b </s> <s>", "", "<unk>c"]))

    @settings(max_examples=200, deadline=None)
    @given(st.lists(TEXTS | st.sampled_from(["</s>", "x <s>", "\u2581"]), max_size=4))
    def check(texts):
        assert same(fast.encode(texts), reference.encode(texts))

    check()


def test_sentencepiece_models_that_normalise_text_go_to_the_reference(tmp_path):
    assert open_encoder(sentencepiece_tokenizer(tmp_path), "auto", "plain").is_reference


def test_occurrences_of_special_strings_are_counted():
    strings = SpecialStrings([EOS, "<|im_end|>", "[PAD]", "<|end"])
    assert [strings.count(text) for text in ("", "<| no |>", f"{EOS}{EOS} <|im_end|>", "a[PAD]", "<|end of")] == [0, 0, 3, 1, 1]
    assert SpecialStrings([]).count(EOS) == 0


def test_added_tokens_that_are_not_special_stay_tokens(tmp_path):
    content = json.loads(tokenizer_bytes())
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    content["added_tokens"].append({"id": 300, "content": "|||PHONE|||", **plain})
    (tmp_path / "phones.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.load(tmp_path / "phones.json")
    text = f"call |||PHONE||| {EOS}"
    for encoder in (GigatokenEncoder(tokenizer, "plain"), ReferenceEncoder(tokenizer, "plain")):
        ids = encoder.encode([text]).ids
        assert 300 in ids
        assert tokenizer.eos_id not in ids
