import shutil

import numpy as np
import pytest

from megatron_exp.errors import UserError
from megatron_exp.shards.corpus import Corpus
from tests.shards.making import decoded, make_corpus, texts

SHARD_FILES = ("bin", "idx", "docs.parquet", "sums.npy")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def corpus(sound, tmp_path):
    shutil.copytree(sound.path, tmp_path / "corpus")
    return Corpus.open(tmp_path / "corpus")


def damage(path, how):
    raw = bytearray(path.read_bytes())
    if how == "flip a bit":
        raw[len(raw) // 2] ^= 16
    elif how == "truncate":
        raw = raw[:-1]
    elif how == "empty":
        raw = bytearray()
    elif how == "zero a page":
        raw[: min(4096, len(raw))] = bytes(min(4096, len(raw)))
    path.write_bytes(raw)


def test_a_corpus_holds_every_document_in_input_order(sound):
    assert decoded(sound) == texts(50)
    assert [(shard.source, shard.num_documents) for shard in sound.shards] == [("books", 40), ("web", 10)]
    assert sound.record["ledger"]["lines_in"] == sound.num_documents == 50


def test_every_token_leads_back_to_its_line(sound):
    starts = sound.document_starts(0)
    place = sound.locate(0, int(starts[25]) + 3)
    assert (place["line"], place["id"], place["document"], place["offset"]) == (6, "id-25", 25, 3)
    assert place["file"].endswith("books/part-1.jsonl")
    with pytest.raises(UserError, match="no token"):
        sound.locate(0, int(starts[-1]))


def test_the_map_has_one_row_per_document(sound):
    assert sound.documents(1)["id"].to_pylist() == [f"id-{index}" for index in range(40, 50)]


def test_opening_reads_only_the_record(corpus):
    for path in corpus.path.iterdir():
        if path.is_file() and path.name != "corpus.json":
            path.unlink()
    assert Corpus.open(corpus.path).fingerprint == corpus.fingerprint


def test_a_sound_corpus_has_no_findings(sound):
    assert list(sound.verify()) == []


@pytest.mark.parametrize("how", ["flip a bit", "truncate", "empty", "zero a page"])
@pytest.mark.parametrize("name", [*(f"shard-00000.{suffix}" for suffix in SHARD_FILES), "inputs.parquet", "tokenizer/tokenizer.json"])
def test_damage_is_found_in_the_right_file(corpus, name, how):
    damage(corpus.path / name, how)
    findings = list(Corpus.open(corpus.path).verify())
    assert findings
    assert all(str(corpus.path / name) in finding or str((corpus.path / name).parent) + " holds" in finding for finding in findings)


def test_a_changed_block_is_named_with_its_place(corpus):
    damage(corpus.path / "shard-00001.bin", "flip a bit")
    (finding,) = corpus.verify()
    assert "shard-00001.bin" in finding
    assert "bytes 0 to" in finding


@pytest.mark.parametrize("suffix", SHARD_FILES)
def test_swapped_files_are_found(corpus, suffix):
    first, second = (corpus.path / f"shard-0000{index}.{suffix}" for index in (0, 1))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    findings = "\n".join(corpus.verify())
    assert str(first) in findings
    assert str(second) in findings


@pytest.mark.parametrize("suffix", SHARD_FILES)
def test_a_missing_file_is_found(corpus, suffix):
    (corpus.path / f"shard-00000.{suffix}").unlink()
    assert any(f"shard-00000.{suffix}" in finding for finding in corpus.verify())


def test_an_edited_record_is_refused(corpus):
    path = corpus.path / "corpus.json"
    path.write_bytes(path.read_bytes().replace(b'"eos_id": 0', b'"eos_id": 1'))
    with pytest.raises(UserError, match=r"corpus\.json"):
        Corpus.open(corpus.path)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"checksum": "x"}'])
def test_a_damaged_record_is_refused(tmp_path, content):
    (tmp_path / "corpus.json").write_bytes(content)
    with pytest.raises(UserError, match=r"corpus\.json"):
        Corpus.open(tmp_path)


def test_tokens_of_a_shard_with_another_length_are_refused(corpus):
    damage(corpus.path / "shard-00000.bin", "truncate")
    with pytest.raises(UserError, match=r"shard-00000\.bin"):
        corpus.tokens(0)
    assert len(corpus.tokens(1)) == corpus.shards[1].num_tokens, "other shards stay readable"


def test_another_tokenizer_is_refused(corpus):
    path = corpus.path / "tokenizer" / "tokenizer.json"
    path.write_bytes(path.read_bytes().replace(b'"add_prefix_space":false', b'"add_prefix_space":true'))
    with pytest.raises(UserError, match="another tokenizer"):
        corpus.tokenizer()


def test_the_fingerprint_does_not_depend_on_where_the_input_lies(sound, tmp_path):
    elsewhere = make_corpus(tmp_path / "else" / "where")
    assert elsewhere.fingerprint == sound.fingerprint
    assert np.array_equal(elsewhere.tokens(0), sound.tokens(0))
