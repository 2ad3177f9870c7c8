"""How often payloads stand in the corpus: counted like a plain loop does, resumable, and read by plan."""

import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_exp.errors import UserError
from megatron_exp.experiments.protocol import Item
from megatron_exp.preparation.plan import plan
from megatron_exp.search import base_rates
from megatron_exp.search.base_rates import BaseRates, ngrams, search_base_rates
from megatron_exp.shards.corpus import Corpus
from tests.preparation import spliced
from tests.training import toy

ENTRY = {"name": "texts", "type": "tests.search.test_base_rates"}


class CorpusTexts(spliced.Spliced):
    """Payloads of which half stand in the corpus; one that stands there more than `most` times a million tokens is never inserted."""

    most: float | None = None

    def items(self, context):
        for number in range(6):
            tokens = context.stream.read(number).tokens[4:24].copy()
            if number % 2:
                tokens[:] = tokens[::-1]
            payload = np.concatenate([[context.tokenizer.eos_id], tokens, [context.tokenizer.eos_id]]).astype(np.int32)
            rate = context.base_rate(payload)
            kept = rate is None or self.most is None or rate <= self.most
            yield Item(
                item=number,
                condition="all" if kept else "in the corpus",
                role="treated" if kept else "control",
                payload=payload,
                source="corpus",
                licence="-",
            )

    def requests(self, items, context):
        return (request for request in super().requests([item for item in items if item.role == "treated"], context))

    def _is_spliced(self, number):
        return False


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return Corpus.open(toy.make_corpus(tmp_path_factory.mktemp("corpus")))


@pytest.fixture(scope="module")
def first(corpus, tmp_path_factory):
    return plan(toy.make_config(corpus.path, experiments=[ENTRY]), tmp_path_factory.mktemp("first") / "manifest")


@pytest.fixture(scope="module")
def searched(corpus, first, tmp_path_factory):
    path = tmp_path_factory.mktemp("rates") / "rates.parquet"
    return path, search_base_rates(corpus, first, path, ngram=8)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 13))
def test_ngrams_cover_the_payload_at_a_quarter_of_their_length_without_eos_around(tokens, n):
    payload = np.array(tokens, dtype=np.int32)
    found, scale = ngrams(payload, n, eos_id=0)
    assert scale == 1
    text = payload[np.flatnonzero(payload)[0] : np.flatnonzero(payload)[-1] + 1] if payload.any() else payload[:0]
    if len(text) <= n:
        assert [string.tolist() for string in found] == ([text.tolist()] if len(text) else [])
    else:
        wanted = {tuple(text[start : start + n].tolist()) for start in range(0, len(text) - n + 1, max(1, n // 4))}
        assert {tuple(string.tolist()) for string in found} == wanted and len(found) == len(wanted)


def test_rates_are_those_of_a_plain_count(corpus, first, searched):
    rows = searched[1].to_pylist()
    tokens = np.asarray(corpus.tokens(0)).tolist()
    items = {(item["item"], item["arm"]): item for item in first.items().to_pylist()}
    assert len(rows) == len(items) == 6
    for row in rows:
        strings = {
            tuple(string.tolist()) for string in ngrams(first.payload(items[row["item"], row["arm"]]["payload"]), 8, corpus.eos_id)[0]
        }
        expected = sum(tuple(tokens[start : start + 8]) in strings for start in range(len(tokens) - 7))
        assert (row["num_ngrams"], row["occurrences"]) == (len(strings), expected)
        assert row["base_rate"] == pytest.approx(1e6 * expected / corpus.num_tokens)
        assert (expected > 0) or row["item"] % 2


def test_many_small_passes_find_what_one_does(corpus, first, searched, tmp_path, monkeypatch):
    monkeypatch.setattr(base_rates, "_STRINGS_AT_ONCE", 8)
    read = []
    table = search_base_rates(corpus, first, tmp_path / "rates.parquet", ngram=8, progress=read.append)
    assert table.equals(searched[1])
    assert read[-1] > 2 * corpus.num_tokens


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(1, 20))
def test_a_sample_is_spread_evenly_and_says_how_much_more_there_is(tokens, most):
    payload = np.arange(len(tokens), dtype=np.int32) + 1
    every, _ = ngrams(payload, 4, 0)
    some, scale = ngrams(payload, 4, 0, most)
    assert len(some) == min(most, len(every)) and scale == pytest.approx(len(every) / len(some))
    gaps = np.diff([string[0] for string in some])
    assert not len(gaps) or gaps.max() - gaps.min() <= 1
    assert some[0][0] == 1 and (len(some) == 1 or some[-1][0] == every[-1][0])


def test_rates_of_a_sample_are_scaled_to_all_ngrams(corpus, first, tmp_path):
    table = search_base_rates(corpus, first, tmp_path / "rates.parquet", ngram=8, per_payload=2)
    for row in table.to_pylist():
        assert row["num_ngrams"] <= 2
        whole = ngrams(first.payload(0), 8, corpus.eos_id)[0]
        if row["num_ngrams"] == 2:
            assert row["base_rate"] == pytest.approx(1e6 * row["occurrences"] / corpus.num_tokens * len(whole) / 2, rel=1e-5)
    assert table.schema.metadata[b"per_payload"] == b"2"


def test_a_search_killed_after_any_shard_goes_on_with_the_next(corpus, first, searched, tmp_path, monkeypatch):
    monkeypatch.setattr(base_rates, "_STRINGS_AT_ONCE", 16)
    counted, number = base_rates.count_in_shard, 0

    def killed(*arguments, **options):
        nonlocal number
        number += 1
        if number == 2:
            raise KeyboardInterrupt
        return counted(*arguments, **options)

    monkeypatch.setattr(base_rates, "count_in_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        search_base_rates(corpus, first, tmp_path / "rates.parquet", ngram=8)
    already, number = number, 2
    assert search_base_rates(corpus, first, tmp_path / "rates.parquet", ngram=8).equals(searched[1])
    assert already == 2


def test_a_killed_search_goes_on_with_the_shards_that_are_left(corpus, first, searched, tmp_path, monkeypatch):
    out = tmp_path / "rates.parquet"
    _kill_before_the_result(corpus, first, out, monkeypatch)
    monkeypatch.setattr(base_rates, "count_in_shard", None)
    assert search_base_rates(corpus, first, out, ngram=8).equals(searched[1])
    assert [path.name for path in tmp_path.iterdir()] == ["rates.parquet"]


def _kill_before_the_result(corpus, first, out, monkeypatch):
    """A search whose shards are all counted and whose result is not written."""
    with monkeypatch.context() as patched:
        patched.setattr(base_rates, "write_file", _fail_on(out))
        with pytest.raises(OSError, match="killed"):
            search_base_rates(corpus, first, out, ngram=8)


def _fail_on(path):
    def write(target, data):
        if target == path:
            raise OSError("killed")
        target.write_bytes(data)

    return write


def test_a_damaged_record_of_a_killed_search_is_named(corpus, first, tmp_path, monkeypatch):
    out = tmp_path / "rates.parquet"
    _kill_before_the_result(corpus, first, out, monkeypatch)
    record = next(path for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes()[:6] == b"\x93NUMPY")
    record.write_bytes(record.read_bytes()[:20])
    with pytest.raises(UserError, match=record.name):
        search_base_rates(corpus, first, out, ngram=8)


def test_records_of_another_search_are_refused(corpus, first, tmp_path, monkeypatch):
    out = tmp_path / "rates.parquet"
    _kill_before_the_result(corpus, first, out, monkeypatch)
    with pytest.raises(UserError, match="another search"):
        search_base_rates(corpus, first, out, ngram=9)


def test_plan_fills_base_rates_and_an_experiment_excludes_by_them_before_anything_is_inserted(corpus, first, searched, tmp_path):
    config = toy.make_config(corpus.path, experiments=[{**ENTRY, "most": 0.0}])
    manifest = plan(config, tmp_path / "manifest", base_rates=searched[0])
    found = {row["item"]: row["base_rate"] for row in searched[1].to_pylist()}
    assert {row["item"]: row["base_rate"] for row in manifest.items().to_pylist()} == found
    assert {row["item"] for row in manifest.insertions().to_pylist()} == {item for item, rate in found.items() if rate == 0}
    assert manifest.record["base_rates"]["ngram"] == 8
    assert {row["base_rate"] for row in first.items().to_pylist()} == {None}


def test_base_rates_of_another_corpus_are_refused(corpus, searched, tmp_path):
    other = tmp_path / "corpus"
    shutil.copytree(corpus.path, other)
    changed = Corpus.open(other)
    changed.record["fingerprint"] = "f" * 32
    with pytest.raises(UserError, match="was counted in a corpus"):
        BaseRates.read(searched[0], changed)
    with pytest.raises(UserError, match="cannot be read"):
        BaseRates.read(corpus.path / "corpus.json", corpus)
