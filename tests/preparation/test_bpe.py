import pytest

from megatron_exp.errors import UserError
from megatron_exp.preparation.bpe import EOS, train_bpe
from megatron_exp.shards.tokenizer import Tokenizer
from tests.shards.making import texts


def test_the_same_texts_give_the_same_file(tmp_path):
    first = train_bpe(texts(50), 280, tmp_path / "a.json").read_bytes()
    assert train_bpe(iter(texts(50)), 280, tmp_path / "b.json").read_bytes() == first


def test_the_tokenizer_has_the_size_asked_for_an_eos_and_every_byte(tmp_path):
    tokenizer = Tokenizer.load(train_bpe(texts(50), 280, tmp_path / "a.json"))
    assert (tokenizer.vocabulary_size, tokenizer.special_strings) == (280, {EOS: tokenizer.eos_id})
    everything = "".join(map(chr, range(1, 0x250))) + "日本\U0001f600"
    assert tokenizer.decode(tokenizer.encode(everything)) == everything


@pytest.mark.parametrize(("given", "size", "what"), [([], 300, "more text"), (["abc"], 300, "more text"), (["abc"], 256, "at least 257")])
def test_a_vocabulary_that_cannot_be_filled_is_refused(tmp_path, given, size, what):
    with pytest.raises(UserError, match=what):
        train_bpe(given, size, tmp_path / "a.json")
    assert list(tmp_path.iterdir()) == []
