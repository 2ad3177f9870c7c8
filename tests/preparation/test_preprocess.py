import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_exp.errors import UserError
from megatron_exp.preparation import preprocess as preprocess_module
from megatron_exp.preparation import preprocess_unit
from megatron_exp.preparation.preprocess import preprocess
from megatron_exp.preparation.preprocess_encode import Encoded, GigatokenEncoder
from megatron_exp.shards.corpus import Corpus
from tests.shards.making import decoded, json_lines, make_corpus, make_tokenizer, text_lines, texts, tree, write_inputs

EOS = "<|endoftext|>"


def made(tmp_path, content, **options):
    (tmp_path / "in").mkdir(exist_ok=True)
    (tmp_path / "in" / "a.jsonl").write_bytes(content)
    return preprocess([str(tmp_path / "in")], make_tokenizer(tmp_path), tmp_path / "out", workers=1, **options)


def test_one_two_and_three_workers_write_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(preprocess_module, "_INPUT_BYTES_PER_WORKER", 1)
    inputs = write_inputs(
        tmp_path / "in", {"a": [text_lines(300), text_lines(5, 300)], "b": [text_lines(100, 305), b"", text_lines(7, 405)]}
    )
    for number, workers in enumerate((1, 2, 3)):
        preprocess([str(inputs)], make_tokenizer(tmp_path), tmp_path / f"out-{number}", workers=workers, shard_size=5000)
    assert tree(tmp_path / "out-0") == tree(tmp_path / "out-1") == tree(tmp_path / "out-2")
    assert decoded(Corpus.open(tmp_path / "out-2")) == texts(412)


def test_either_backend_writes_the_same_bytes(tmp_path):
    inputs = write_inputs(tmp_path / "in", {"a": [text_lines(30)]})
    trees = []
    for backend in ("gigatoken", "reference"):
        corpus = preprocess([str(inputs)], make_tokenizer(tmp_path), tmp_path / backend, workers=1, backend=backend)
        trees.append({name: content for name, content in tree(corpus.path).items() if name.startswith("shard")})
    assert trees[0] == trees[1]


def test_shards_hold_whole_documents_up_to_their_size(tmp_path):
    corpus = make_corpus(tmp_path, shard_size=1000)
    assert len(corpus.shards) > 5
    assert all(shard.num_tokens * 2 <= 1000 for shard in corpus.shards)
    assert decoded(corpus) == texts(50)
    first = [shard for shard in corpus.shards if shard.source == "books"]
    assert [shard.source for shard in corpus.shards] == ["books"] * len(first) + ["web"] * (len(corpus.shards) - len(first))
    assert corpus.locate(1, 0)["id"] == f"id-{first[0].num_documents}"
    assert list(corpus.verify()) == []


def test_a_document_above_the_shard_size_has_a_shard_of_its_own(tmp_path):
    corpus = made(tmp_path, json_lines({"text": "a"}, {"text": "long " * 500}, {"text": "b"}), shard_size=100)
    assert [shard.num_documents for shard in corpus.shards] == [1, 1, 1]


def test_formats_and_codecs_may_be_mixed(tmp_path):
    directory = write_inputs(tmp_path / "in", {"a": [text_lines(5)]})
    (directory / "a" / "part-1.py").write_text("x = 1\n")
    pq.write_table(pa.table({"text": ["row one", "row two"]}), directory / "a" / "part-2.parquet")
    corpus = preprocess([f"all={directory}"], make_tokenizer(tmp_path), tmp_path / "out", workers=1)
    assert decoded(corpus) == [*texts(5), "x = 1\n", "row one", "row two"]
    assert corpus.inputs()["format"].to_pylist() == ["jsonl", "text", "parquet"]
    assert [row["id"] for row in corpus.documents(0).to_pylist()[5:]] == ["part-1.py", "1", "2"]


def test_many_small_text_files_are_one_unit_and_keep_their_names(tmp_path):
    (tmp_path / "code").mkdir()
    for index in range(200):
        (tmp_path / "code" / f"{index:03d}.py").write_text(f"x = {index}\n")
    (tmp_path / "code" / "empty.py").write_text("")
    corpus = preprocess([str(tmp_path / "code")], make_tokenizer(tmp_path), tmp_path / "out", workers=1)
    assert decoded(corpus) == [f"x = {index}\n" for index in range(200)]
    assert corpus.documents(0)["id"].to_pylist()[7] == "007.py"
    assert corpus.inputs().num_rows == 201
    assert corpus.record["ledger"]["lines_in"] == 200


@pytest.mark.parametrize(("policy", "num_eos"), [("plain", 2), ("special", 3)])
def test_special_strings_follow_the_policy_and_are_counted(tmp_path, policy, num_eos):
    corpus = made(tmp_path, json_lines({"text": f"one {EOS} two"}, {"text": "three"}), special_in_text=policy)
    assert int((corpus.tokens(0) == corpus.eos_id).sum()) == num_eos
    assert (corpus.record["ledger"]["special_documents"], corpus.record["ledger"]["special_strings"]) == (1, 1)


def test_special_strings_can_make_a_reject(tmp_path):
    content = json_lines({"text": f"one {EOS}"}, {"text": "two"})
    with pytest.raises(UserError, match="special_string"):
        made(tmp_path, content, special_in_text="reject")
    assert decoded(made(tmp_path, content, special_in_text="reject", max_reject_rate=0.5)) == ["two"]


def test_a_reject_fails_the_run_and_names_its_place_until_it_is_allowed(tmp_path):
    content = text_lines(9) + b'{"text": null}\n'
    with pytest.raises(UserError, match=r"a\.jsonl:10 \(null_text\).*at least 0\.1"):
        made(tmp_path, content)
    assert not (tmp_path / "out" / "corpus.json").exists()
    with pytest.raises(UserError, match="null_text"):
        made(tmp_path, content, max_reject_rate=0.09)
    corpus = made(tmp_path, content, max_reject_rate=0.1)
    assert corpus.record["ledger"]["rejected"] == {"null_text": 1}
    assert corpus.inputs()["rejects"].to_pylist() == [[{"line": 10, "reason": "null_text"}]]
    assert corpus.locate(0, 0)["line"] == 1


def test_input_without_any_document_is_refused(tmp_path):
    with pytest.raises(UserError, match="no document: 1 files were read, and there is nothing in them"):
        made(tmp_path, b"\n")
    with pytest.raises(
        UserError, match=r"no document that can be used.* all of their 2 lines .* 1 with `text` is null .*a\.jsonl:1 \(null_text\)"
    ):
        made(tmp_path, b'{"text": null}\nbroken\n', max_reject_rate=1)
    assert not (tmp_path / "out" / "corpus.json").exists()


def test_a_corpus_made_with_rejects_is_not_that_of_a_stricter_call(tmp_path):
    content = text_lines(9) + b'{"text": null}\n'
    made(tmp_path, content, max_reject_rate=1)
    for rate in (0.0, 0.09):
        with pytest.raises(UserError, match=r"1 of 10 lines cannot be used.*a\.jsonl:10 \(null_text\)"):
            made(tmp_path, content, max_reject_rate=rate)
    assert made(tmp_path, content, max_reject_rate=0.1).num_documents == 9


@pytest.mark.parametrize(
    "options",
    [
        {"special_in_text": "yes"},
        {"backend": "fast"},
        {"max_reject_rate": 2},
        {"shard_size": 0},
        {"tokenizer": "nowhere.json"},
        {"inputs": ["nowhere"]},
    ],
)
def test_a_call_that_cannot_work_writes_nothing(tmp_path, options):
    (tmp_path / "a.txt").write_text("text")
    arguments = {"inputs": [str(tmp_path / "a.txt")], "tokenizer": make_tokenizer(tmp_path), "output": tmp_path / "out", **options}
    with pytest.raises(UserError):
        preprocess(**arguments)
    assert not (tmp_path / "out").exists()


def test_a_directory_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="already exists"):
        made(tmp_path, text_lines(3))
    assert tree(tmp_path / "out") == {"thesis.tex": b"years of work"}


def test_the_same_call_again_does_nothing_and_another_one_is_refused(tmp_path):
    made(tmp_path, text_lines(3))
    before = tree(tmp_path / "out")
    made(tmp_path, text_lines(3))  # the file is written anew: equal content, another time
    assert tree(tmp_path / "out") == before
    with pytest.raises(UserError, match="other input"):
        made(tmp_path, text_lines(3), special_in_text="special")
    with pytest.raises(UserError, match="other input"):
        made(tmp_path, text_lines(3).replace(b"0", b"9"))


def test_a_file_that_changes_between_two_attempts_is_read_again(tmp_path):
    with pytest.raises(UserError):
        made(tmp_path, b'{"text": null}\n')
    assert decoded(made(tmp_path, b'{"text":"ok" }\n')) == ["ok"]


def test_the_first_difference_from_the_reference_library_stops_the_run(tmp_path, monkeypatch):
    encode = GigatokenEncoder.encode

    def wrong(self, batch):
        encoded = encode(self, batch)
        if any("document 1000:" in text for text in batch):
            encoded.ids[encoded.lengths[:1000].sum()] += 1
        return encoded

    monkeypatch.setattr(GigatokenEncoder, "encode", wrong)
    with pytest.raises(UserError, match=r"a\.jsonl, line 1001"):
        made(tmp_path, text_lines(1001))


def test_one_document_in_a_thousand_and_every_special_one_is_checked(tmp_path):
    corpus = made(tmp_path, text_lines(2500) + json_lines({"text": EOS}))
    assert corpus.inputs()["checked_documents"].to_pylist() == [4]


def test_lost_documents_never_reach_a_shard(tmp_path, monkeypatch):
    encode = GigatokenEncoder.encode

    def loses_one(self, batch):
        encoded = encode(self, batch)
        return Encoded(encoded.ids, encoded.lengths[:-1]) if len(batch) > 1 else encoded

    monkeypatch.setattr(GigatokenEncoder, "encode", loses_one)
    with pytest.raises(AssertionError, match="lost documents"):
        made(tmp_path, text_lines(3))
    assert not (tmp_path / "out" / "corpus.json").exists()


def test_progress_counts_everything_once(tmp_path):
    seen = []
    corpus = made(tmp_path, text_lines(3000), progress=seen.append)
    last = {progress.phase: progress for progress in seen}
    assert last["tokenise"].tokens == last["merge"].tokens == corpus.num_tokens
    assert last["tokenise"].documents == 3000
    assert last["tokenise"].text_bytes == corpus.record["ledger"]["text_bytes"]
    assert [progress.fraction for progress in last.values()] == [1.0, 1.0]
    assert last["merge"].seconds_left == 0


def test_preprocessing_does_not_load_torch():
    code = "import sys, megatron_exp.preparation.preprocess, megatron_exp.preparation.bpe; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tokens_are_stored_as_uint16_for_a_small_vocabulary(tmp_path):
    corpus = make_corpus(tmp_path)
    assert corpus.tokens(0).dtype == np.uint16
    assert preprocess_unit.token_dtype(100_278) == np.int32
