import json

import numpy as np
import pytest

from megatron_exp.errors import UserError
from megatron_exp.overlay.overlay import Overlay
from megatron_exp.preparation.plan import plan
from megatron_exp.search import scan as scanning
from megatron_exp.search.patterns import Patterns
from megatron_exp.search.places import in_corpus, in_payloads, in_training
from megatron_exp.search.scan import scan
from megatron_exp.search.strings import read_strings
from megatron_exp.seeding import Words
from megatron_exp.shards.corpus import Corpus
from megatron_exp.shards.tokenizer import Tokenizer
from megatron_exp.stream.keyed import KeyedStream
from tests.shards.making import REAL_DATA
from tests.training import toy


def slow(tokens, strings):
    """(string, position) of every occurrence, by comparing everywhere."""
    return [
        (number, position)
        for position in range(len(tokens))
        for number, string in enumerate(strings)
        if np.array_equal(tokens[position : position + len(string)], string)
    ]


def fast(tokens, strings, **options):
    found = scan(tokens, Patterns.of(strings), **options)
    return list(zip(found.patterns.tolist(), found.positions.tolist(), strict=True))


@pytest.mark.parametrize("dtype", [np.int32, np.uint16])
@pytest.mark.parametrize("seed", range(4))
def test_every_occurrence_is_found_and_no_other(seed, dtype):
    tokens = Words(seed).integers(600, 3).astype(dtype)  # three ids: matches everywhere, overlapping ones too
    drawn = Words(seed + 100).integers(40, 560)
    strings = [tokens[start : start + 1 + number % 9].astype(np.int32) for number, start in enumerate(drawn)]
    assert fast(tokens, strings) == slow(tokens, strings)
    assert fast(tokens, strings, threads=2) == slow(tokens, strings)


def test_blocks_hide_no_match(monkeypatch):
    monkeypatch.setattr(scanning, "_BLOCK_TOKENS", 16)
    tokens = Words(1).integers(200, 2).astype(np.int32)
    strings = [tokens[10:21], tokens[30:33], tokens[15:17]]
    assert fast(tokens, strings, threads=2) == slow(tokens, strings)


def test_many_matches_do_not_overflow():
    tokens = np.zeros(10_000, dtype=np.int32)
    assert len(fast(tokens, [np.zeros(2, np.int32), np.zeros(1, np.int32)])) == 9_999 + 10_000


def test_ids_that_no_shard_type_can_hold_match_nothing_else():
    tokens = np.full(50, 5, dtype=np.uint16)
    assert fast(tokens, [np.array([5 + 65_536, 5], np.int32)]) == []


def test_strings_longer_than_the_text_and_an_empty_text_are_fine():
    assert fast(np.arange(3, dtype=np.int32), [np.arange(5)]) == []
    assert fast(np.empty(0, np.int32), [np.arange(1)]) == []


def test_an_empty_string_is_refused():
    with pytest.raises(UserError, match="no token"):
        Patterns.of([np.empty(0, np.int32)])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("search")
    path = toy.make_corpus(directory)
    manifest = plan(toy.make_config(path), directory / "manifest")
    corpus = Corpus.open(path)
    stream = KeyedStream.open(manifest.config, corpus)
    return corpus, stream, Overlay.open(stream, manifest), manifest


@pytest.fixture(scope="module")
def strings(run):
    _, stream, overlay, manifest = run
    swap = next(row for row in manifest.insertions().to_pylist() if row["kind"] == "swap")
    base = [stream.read(slot).tokens[start : start + 6] for slot, start in ((0, 3), (17, 20), (40, 0))]
    return [*base, overlay.read(swap["slot"]).tokens[4:12], manifest.payload(0)[2:9], np.array([1, 2, 3, 4, 5, 6, 7])]


@pytest.mark.parametrize("which", ["base", "overlay"])
def test_the_stream_as_trained_is_searched_slot_by_slot(run, strings, which):
    _, stream, overlay, _ = run
    trained = overlay if which == "overlay" else stream
    expected = [
        (number, slot, position)
        for slot in range(trained.num_slots)
        for number, position in sorted(slow(trained.read(slot).tokens[: toy.LENGTH], strings), key=lambda row: (row[1], row[0]))
    ]
    rows = in_training(trained, Patterns.of(strings), threads=2).to_pylist()
    assert expected and [(row["string"], row["slot"], row["offset"]) for row in rows] == expected
    assert all(row["step"] == row["slot"] // toy.BATCH for row in rows)


def test_shards_and_payloads_are_searched_whole(run, strings):
    corpus, _, _, manifest = run
    expected = [(n, shard, p) for shard in range(len(corpus.shards)) for n, p in slow(corpus.tokens(shard), strings)]
    assert [tuple(row.values()) for row in in_corpus(corpus, Patterns.of(strings)).to_pylist()] == expected
    numbers = range(len(manifest.payload_tokens()[1]) - 1)
    expected = [
        (n, number, p) for number in numbers for n, p in sorted(slow(manifest.payload(number), strings), key=lambda row: (row[1], row[0]))
    ]
    assert expected and [tuple(row.values()) for row in in_payloads(manifest, Patterns.of(strings)).to_pylist()] == expected


def test_strings_are_read_as_text_or_as_ids(run, tmp_path):
    tokenizer = run[0].tokenizer()
    file = tmp_path / "strings.jsonl"
    file.write_text(json.dumps({"id": "a", "text": "the old river"}) + "\n\n" + json.dumps({"token_ids": [5, 6]}) + "\n")
    first, second = read_strings(file, tokenizer)
    assert (first.id, tokenizer.decode(first.tokens)) == ("a", "the old river")
    assert (second.id, second.tokens.tolist()) == ("3", [5, 6])
    file.write_text(json.dumps({"text": "the old river", "token_ids": [7, 8]}) + "\n")
    assert read_strings(file, tokenizer)[0].tokens.tolist() == [7, 8], "ids are what is searched for where both are there"


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="needs ../shared/data")
def test_the_published_memorised_sequences_are_read():
    tokenizer = Tokenizer.load(REAL_DATA / "tokenizers" / "dolma2.json")
    strings = read_strings(REAL_DATA / "experiments" / "memorized_sequences.jsonl", tokenizer)
    assert len(strings) > 100 and all(len(string.tokens) >= 8 for string in strings)


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "holds no string"), ("{", "line 1 is not valid JSON"), ('{"x": 1}', "an object with `text` or `token_ids`"), ('{"token_ids": [-1]}', "ids from 0"),
     ('{"text": ""}', "empty string is everywhere"), ('{"text": 3}', "must be a string")],
)  # fmt: skip
def test_a_line_that_cannot_be_used_is_named(run, tmp_path, text, words):
    file = tmp_path / "strings.jsonl"
    file.write_text(text)
    with pytest.raises(UserError, match=words):
        read_strings(file, run[0].tokenizer())
