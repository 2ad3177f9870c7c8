import json

import numpy as np
import pytest
import sentencepiece

from megatron_exp.errors import UserError
from megatron_exp.shards.tokenizer import Tokenizer
from tests.shards.making import make_tokenizer, tokenizer_bytes


def edited(path, change):
    content = json.loads(tokenizer_bytes())
    change(content)
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sentencepiece")
    (directory / "text").write_text("some words and other words\nmore of the words here\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "text"), model_prefix=str(directory / "m"), vocab_size=300, model_type="bpe", byte_fallback=True, minloglevel=2
    )
    return directory / "m.model"


@pytest.mark.parametrize("text", ["plain words", "", " two  spaces\n", "naïve 日本語 👩‍👩‍👧", "x = {1: '<|endoftext|>'}"])
def test_text_survives_encoding_and_decoding(tmp_path, text):
    tokenizer = Tokenizer.load(make_tokenizer(tmp_path))
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text


def test_special_strings_in_text_stay_text_unless_asked_for(tmp_path):
    tokenizer = Tokenizer.load(make_tokenizer(tmp_path))
    text = "a<|endoftext|>b"
    assert tokenizer.eos_id not in tokenizer.encode(text)
    assert tokenizer.eos_id in tokenizer.encode_batch([text], specials_as_ids=True)[0]
    assert tokenizer.eos_id not in tokenizer.encode(text), "asking once must not change later calls"
    assert tokenizer.eos_id in tokenizer.special_ids


def test_a_saved_copy_is_the_same_tokenizer(tmp_path):
    tokenizer = Tokenizer.load(make_tokenizer(tmp_path))
    tokenizer.save_copy(tmp_path / "copy")
    copy = Tokenizer.load(tmp_path / "copy")
    assert (copy.fingerprint, copy.eos_id, copy.vocabulary_size) == (tokenizer.fingerprint, tokenizer.eos_id, 300)


def test_the_fingerprint_follows_the_content_and_not_the_file(tmp_path):
    original = Tokenizer.load(make_tokenizer(tmp_path)).fingerprint
    spaced = tmp_path / "spaced.json"
    spaced.write_text(json.dumps(json.loads(tokenizer_bytes()), indent=2))
    assert Tokenizer.load(spaced).fingerprint == original
    fewer = edited(tmp_path / "fewer.json", lambda content: content["model"]["merges"].pop())
    assert Tokenizer.load(fewer).fingerprint != original


def test_truncation_and_padding_saved_in_the_file_do_not_act(tmp_path):
    def limit(content):
        content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}

    tokenizer = Tokenizer.load(edited(tmp_path / "limited.json", limit))
    assert tokenizer.decode(tokenizer.encode("many words, more than two tokens")) == "many words, more than two tokens"


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    with pytest.raises(UserError, match="EOS"):
        Tokenizer.load(edited(tmp_path / "no-eos.json", lambda content: content["added_tokens"].clear()))


def test_the_configuration_beside_a_tokenizer_names_the_eos(tmp_path):
    edited(tmp_path / "tokenizer.json", lambda content: content["added_tokens"][0].update(content="<END>", id=300))
    with pytest.raises(UserError, match="tokenizer_config.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<END>"}}')
    assert Tokenizer.load(tmp_path).eos_id == 300
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<ELSE>"}')
    with pytest.raises(UserError, match="<ELSE>"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", ['{"eos_token": ["<END>"]}', '{"eos_token": {"content": 5}}', '{"eos_token": ["\\ud800"]}', '["<END>"]', "null", "{"])
def test_a_configuration_that_names_no_single_eos_is_refused(tmp_path, content):
    make_tokenizer(tmp_path).rename(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer_config\.json (gives .* as its eos_token|is not valid JSON)"):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_without_vocabulary_is_refused(tmp_path):
    def empty(content):
        content["model"].update(vocab={}, merges=[])
        content["added_tokens"] = []

    with pytest.raises(UserError, match=r"empty\.json has an empty vocabulary"):
        Tokenizer.load(edited(tmp_path / "empty.json", empty))


def test_bpe_dropout_is_refused(tmp_path):
    with pytest.raises(UserError, match="dropout"):
        Tokenizer.load(edited(tmp_path / "dropout.json", lambda content: content["model"].update(dropout=0.1)))


@pytest.mark.parametrize("content", [b"", b"{}", b"not a tokenizer", b'{"model": {"type": "What"}}', b'{"model": null}', b'{"model": []}'])
def test_a_file_that_is_no_tokenizer_is_refused_by_name(tmp_path, content):
    (tmp_path / "broken.json").write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.json"):
        Tokenizer.load(tmp_path / "broken.json")


def test_decoding_an_id_outside_the_vocabulary_is_refused(tmp_path):
    with pytest.raises(UserError, match="300"):
        Tokenizer.load(make_tokenizer(tmp_path)).decode([300])


def test_a_sentencepiece_model_is_read_with_its_eos(sentencepiece_model, tmp_path):
    tokenizer = Tokenizer.load(sentencepiece_model)
    assert (tokenizer.vocabulary_size, tokenizer.special_strings["</s>"]) == (300, tokenizer.eos_id)
    assert tokenizer.eos_id not in tokenizer.encode("words</s>words")
    assert tokenizer.decode(tokenizer.encode("some words é")) == "some words é"
    tokenizer.save_copy(tmp_path)
    assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint
