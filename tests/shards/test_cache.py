import numpy as np
import pytest

from megatron_exp.errors import UserError
from megatron_exp.shards import cache
from megatron_exp.shards.cache import cache_folder, fill_cache, with_cache
from megatron_exp.shards.corpus import Corpus
from tests.training.toy import make_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return Corpus.open(make_corpus(tmp_path_factory.mktemp("corpus")))


def num_bytes(corpus):
    return sum(shard["files"]["bin"]["bytes"] for shard in corpus.record["shards"])


def test_the_cache_holds_the_same_tokens_and_they_are_read_from_there(corpus, tmp_path):
    assert fill_cache(corpus, tmp_path) == (num_bytes(corpus), 0)
    cached = with_cache(corpus, tmp_path)
    assert np.array_equal(cached.tokens(0), corpus.tokens(0))
    path = cache_folder(corpus, tmp_path) / f"{corpus.shards[0].name}.bin"
    changed = bytearray(path.read_bytes())
    changed[0] ^= 1
    path.write_bytes(changed)
    assert with_cache(corpus, tmp_path).tokens(0)[0] != corpus.tokens(0)[0]
    assert cached.path == corpus.path


def test_what_is_there_is_checked_and_only_the_damaged_copied_again(corpus, tmp_path):
    fill_cache(corpus, tmp_path)
    assert fill_cache(corpus, tmp_path) == (0, num_bytes(corpus))
    path = cache_folder(corpus, tmp_path) / f"{corpus.shards[0].name}.bin"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    copied, found = fill_cache(corpus, tmp_path)
    assert copied == len(damaged) and found == num_bytes(corpus) - copied


def test_a_cache_that_is_not_filled_is_refused_with_the_command(corpus, tmp_path):
    with pytest.raises(UserError, match="megatron-exp cache"):
        with_cache(corpus, tmp_path)


def test_a_damaged_corpus_is_noticed_while_copying(tmp_path):
    corpus = Corpus.open(make_corpus(tmp_path))
    path = corpus.file(0, "bin")
    damaged = bytearray(path.read_bytes())
    damaged[100] ^= 4
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="not what corpus.json says"):
        fill_cache(corpus, tmp_path / "cache")
    with pytest.raises(UserError, match="megatron-exp cache"):
        with_cache(corpus, tmp_path / "cache")


def test_a_disk_without_room_is_refused_before_anything_is_copied(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_ROOM_BYTES", 1 << 60)
    with pytest.raises(UserError, match="Make room, or leave `scratch` out"):
        fill_cache(corpus, tmp_path)
    assert not list(cache_folder(corpus, tmp_path).iterdir())
