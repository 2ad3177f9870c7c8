"""Adopting tokens that exist: the same ids come out, and an index that does not describe its tokens is refused by name."""

import csv
import errno
import gzip
import io
import os
from typing import NamedTuple

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_exp import files
from megatron_exp.config.load import validate
from megatron_exp.errors import UserError
from megatron_exp.preparation import import_shards as import_module
from megatron_exp.preparation.import_shards import import_shards
from megatron_exp.preparation.preprocess import preprocess
from megatron_exp.shards.tokenizer import Tokenizer
from megatron_exp.stream.keyed import KeyedStream
from tests.shards.making import decoded, make_corpus, make_tokenizer, text_lines, texts, tree, write_inputs


class Place(NamedTuple):
    """Where a test works, and the tokenizer of its tokens."""

    path: object
    tokenizer: object
    library: Tokenizer

    def documents(self, num, first=0):
        return [np.append(self.library.encode(text), self.library.eos_id) for text in texts(num, first)]

    def adopt(self, *inputs, name="corpus", **options):
        return import_shards([str(one) for one in inputs], self.tokenizer, self.path / name, workers=1, **options)


@pytest.fixture
def place(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    return Place(tmp_path, tokenizer, Tokenizer.load(tokenizer))


def write_megatron(prefix, documents, dtype=np.uint16):
    """A shard by Megatron's own builder."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for ids in documents:
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def csv_rows(documents, source="s3://bucket/raw.jsonl.gz"):
    ends = np.cumsum([len(ids) for ids in documents])
    return [
        [end - len(ids), end, f"id, {number}", source, number + 1] for number, (ids, end) in enumerate(zip(documents, ends, strict=True))
    ]


def write_csv(path, rows):
    """As the dolma toolkit does: csv.writer, no header, gzip."""
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    path.write_bytes(gzip.compress(text.getvalue().encode()))


def write_dolma(directory, documents, name="part-000"):
    """AI2's layout: headerless little-endian uint32, the index beside it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.npy").write_bytes(np.concatenate(documents).astype("<u4").tobytes())
    write_csv(directory / f"{name}.csv.gz", csv_rows(documents))
    return directory / f"{name}.npy"


def test_a_megatron_shard_is_adopted_token_for_token(place):
    prefix = write_megatron(place.path / "wiki" / "text_document", place.documents(30))
    corpus = place.adopt(prefix)
    assert decoded(corpus) == texts(30)
    assert [shard.source for shard in corpus.shards] == ["wiki"]
    assert list(corpus.verify()) == []
    assert corpus.locate(0, 0)["file"] == f"{prefix}.bin"
    assert corpus.documents(0)["line"].to_pylist() == list(range(1, 31))


def test_an_adopted_shard_equals_the_one_that_preprocess_writes(place):
    inputs = write_inputs(place.path / "in", {"web": [text_lines(20)]})
    ours = preprocess([str(inputs)], place.tokenizer, place.path / "ours", workers=1)
    theirs = place.adopt(f"web={write_megatron(place.path / 'x' / 'a', place.documents(20))}")
    assert theirs.fingerprint == ours.fingerprint
    assert theirs.record.keys() == ours.record.keys()
    assert theirs.record["ledger"].keys() == ours.record["ledger"].keys()


def test_a_pretokenised_array_becomes_a_shard_that_megatron_reads(place):
    array = write_dolma(place.path / "dclm", place.documents(30))
    corpus = place.adopt(array)
    dataset = IndexedDataset(str(corpus.path / "shard-00000"))
    assert [dataset[index].tolist() for index in range(30)] == [ids.tolist() for ids in place.documents(30)]
    assert list(corpus.verify()) == []
    assert corpus.documents(0).to_pylist()[7] == {"file": "s3://bucket/raw.jsonl.gz", "line": 8, "id": "id, 7"}


def test_bytes_are_linked_on_the_same_disk_and_copied_elsewhere(place, monkeypatch):
    array = write_dolma(place.path / "dclm", place.documents(9))
    linked = place.adopt(array, name="linked")
    assert os.path.samefile(array, linked.file(0, "bin"))

    def other_disk(source, target):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(files.os, "link", other_disk)
    copied = place.adopt(array, name="copied")
    assert not os.path.samefile(array, copied.file(0, "bin"))
    assert tree(copied.path) == tree(linked.path)


def test_pairs_keep_their_order_and_sources_their_names(place):
    for name, first in (("a", 0), ("b", 5), ("c", 10)):
        write_dolma(place.path / name, place.documents(5, first), "part-000")
    write_dolma(place.path / "a", place.documents(5, 15), "part-001")
    corpus = place.adopt(f"named={place.path}/c/*.npy", place.path / "a", place.path / "b" / "part-000")
    assert [shard.source for shard in corpus.shards] == ["named", "a", "a", "b"]
    assert decoded(corpus) == texts(5, 10) + texts(5) + texts(5, 15) + texts(5, 5)


def test_two_processes_write_the_same_bytes_as_one(place, monkeypatch):
    arrays = [write_dolma(place.path / name, place.documents(5, first)) for name, first in (("a", 0), ("b", 5), ("c", 10))]
    one = place.adopt(*arrays, name="one")
    monkeypatch.setattr(import_module, "_BYTES_PER_WORKER", 1)
    two = import_shards([str(array) for array in arrays], place.tokenizer, place.path / "two", workers=2)
    assert tree(one.path) == tree(two.path)


def test_a_stream_reads_an_imported_corpus(place):
    documents = place.documents(60)
    corpus = place.adopt(write_dolma(place.path / "dclm", documents))
    config = validate(
        {"name": "x", "corpus": {"path": str(corpus.path)}, "geometry": {"sequence_length": 16, "global_batch_size": 2, "steps": 4}}, "test"
    )
    stream = KeyedStream.open(config, corpus)
    slot, instance = stream.read(3), stream.instance(3)
    assert slot.tokens.tolist() == np.concatenate(documents)[instance.offset : instance.offset + 17].tolist()


def test_our_own_shards_can_be_adopted(place):
    own = make_corpus(place.path / "own")
    assert decoded(place.adopt(own.path, name="again")) == texts(50)


def test_an_eos_inside_a_document_of_megatron_is_kept_and_counted(place):
    documents = place.documents(4)
    documents[2][3] = documents[2][5] = place.library.eos_id
    ledger = place.adopt(write_megatron(place.path / "wiki" / "a", documents)).record["ledger"]
    assert (ledger["docs_out"], ledger["special_documents"], ledger["special_strings"]) == (4, 1, 2)
    assert ledger["text_bytes"] is None


def test_a_second_call_does_nothing_and_other_input_is_refused(place):
    array = write_dolma(place.path / "dclm", place.documents(5))
    before = tree(place.adopt(array).path)
    assert tree(place.adopt(array).path) == before
    write_dolma(place.path / "dclm", place.documents(5, 1))
    with pytest.raises(UserError, match="already holds a corpus made from other input"):
        place.adopt(array)


def test_blocks_may_end_anywhere(place, monkeypatch):
    """Documents, tokens and inner EOS across borders of blocks of 7 bytes."""
    documents = place.documents(12)
    documents[4][1] = documents[4][20] = place.library.eos_id
    prefix = write_megatron(place.path / "wiki" / "a", documents)
    monkeypatch.setattr("megatron_exp.preparation.preprocess_bytes._BLOCK_BYTES", 7)
    corpus = place.adopt(prefix)
    assert np.array_equal(corpus.tokens(0), np.concatenate(documents))
    assert (corpus.record["ledger"]["special_documents"], corpus.record["ledger"]["special_strings"]) == (1, 2)
    assert list(corpus.verify()) == []


def test_a_kill_at_any_durable_step_leaves_a_job_that_can_go_on(place, monkeypatch):
    arrays = [write_dolma(place.path / name, place.documents(5, first)) for name, first in (("a", 0), ("b", 5))]
    expected = tree(place.adopt(*arrays, name="whole").path)
    counted, at = [0], [None]

    class Killed(BaseException):
        pass

    def wrapped(step):
        def call(*arguments):
            counted[0] += 1
            if counted[0] == at[0]:
                raise Killed
            return step(*arguments)

        return call

    for name in ("_write", "_fsync", "_rename", "_fsync_directory"):
        monkeypatch.setattr(files, name, wrapped(getattr(files, name)))
    place.adopt(*arrays, name="counted")
    num_steps, counted[0] = counted[0], 0
    assert num_steps > 30
    for step in range(1, num_steps + 1, 5):
        counted[0], at[0] = 0, step
        with pytest.raises(Killed):
            place.adopt(*arrays, name=f"killed-{step}")
        at[0] = None
        assert tree(place.adopt(*arrays, name=f"killed-{step}").path) == expected, f"after step {step}"


def test_finished_pairs_are_not_read_again(place, monkeypatch):
    arrays = [write_dolma(place.path / name, place.documents(5, first)) for name, first in (("a", 0), ("b", 5))]
    read, real = [], import_module.read_index

    def recorded(tokens, *arguments):
        read.append(tokens.source)
        if read == ["a", "b"]:
            raise KeyboardInterrupt
        return real(tokens, *arguments)

    monkeypatch.setattr(import_module, "read_index", recorded)
    with pytest.raises(KeyboardInterrupt):
        place.adopt(*arrays)
    place.adopt(*arrays)
    assert read == ["a", "b", "b"]


# What is refused.


def cut(array, num_bytes):
    array.write_bytes(array.read_bytes()[:-num_bytes])


def add_header(array):
    tokens = np.fromfile(array, dtype="<u4")
    with open(array, "wb") as file:
        np.save(file, tokens)


def another_index(array, place):
    write_csv(array.with_name("part-000.csv.gz"), csv_rows(place.documents(30, 100)))


def another_index_of_the_same_length(array, place):
    rows = csv_rows(place.documents(30))
    rows[4][1] = rows[5][0] = rows[4][1] - 2
    write_csv(array.with_name("part-000.csv.gz"), rows)


def without_row(array, place, row):
    rows = csv_rows(place.documents(30))
    del rows[row]
    write_csv(array.with_name("part-000.csv.gz"), rows)


def set_field(array, place, row, column, value):
    rows = csv_rows(place.documents(30))
    rows[row][column] = value
    write_csv(array.with_name("part-000.csv.gz"), rows)


def joined_rows(array, place):
    rows = csv_rows(place.documents(30))
    rows[4][1] = rows.pop(5)[1]
    write_csv(array.with_name("part-000.csv.gz"), rows)


def set_token(array, place, index, value):
    tokens = np.fromfile(array, dtype="<u4")
    tokens[index] = value
    array.write_bytes(tokens.tobytes())


def cut_gzip(array, place):
    cut(array.with_name("part-000.csv.gz"), 20)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda array, place: cut(array, 8), r"part-000\.npy has \d+ bytes.*the array is cut short"),
        (lambda array, place: cut(array, 3), "the array is cut short"),
        (lambda array, place: add_header(array), r"part-000\.npy is a real NumPy file"),
        (another_index, r"part-000\.csv\.gz describes.*that of another array"),
        (another_index_of_the_same_length, r"part-000\.npy: document 4 \(from 0\) ends with id \d+ .* not with EOS.*another array"),
        (lambda array, place: without_row(array, place, 3), r"part-000\.csv\.gz, row 4: a document from token .* does not follow"),
        (lambda array, place: without_row(array, place, 29), "the index is cut short"),
        (lambda array, place: set_field(array, place, 0, 0, ""), r"part-000\.csv\.gz, row 1, has an empty `start`"),
        (lambda array, place: set_field(array, place, 29, 1, ""), r"part-000\.csv\.gz, row 30, has an empty `end`"),
        (lambda array, place: set_field(array, place, 4, 4, -1), r"part-000\.csv\.gz, row 5, has a negative `loc`"),
        (joined_rows, r"EOS .* stands at token \d+, inside document 4 .* has no border"),
        (lambda array, place: set_token(array, place, 40, 300), r"token 40, in document \d+ .* has the id 300; this tokenizer has 300 ids"),
        (lambda array, place: set_token(array, place, 40, 2**32 - 1), "has the id 4294967295"),
        (cut_gzip, r"part-000\.csv\.gz is cut short"),
        (lambda array, place: write_csv(array.with_name("part-000.csv.gz"), [["start", "end", "id", "src", "loc"]]), "is not the index of"),
        (lambda array, place: write_csv(array.with_name("part-000.csv.gz"), []), "part-000.csv.gz"),
        (lambda array, place: array.with_name("part-000.csv.gz").unlink(), "the index of .*part-000.npy was expected"),
    ],
)
def test_an_array_that_its_index_does_not_describe_is_refused(place, damage, message):
    array = write_dolma(place.path / "dclm", place.documents(30))
    damage(array, place)
    with pytest.raises(UserError, match=message):
        place.adopt(array)
    assert not (place.path / "corpus" / "corpus.json").exists()


def test_the_first_document_without_eos_is_named(place):
    documents = [ids if number != 3 else ids[:-1] for number, ids in enumerate(place.documents(6))]
    prefix = write_megatron(place.path / "wiki" / "a", documents)
    with pytest.raises(UserError, match=r"a\.bin: document 3 \(from 0\) ends with id \d+ .*--append-eod"):
        place.adopt(prefix)


def test_an_empty_document_is_refused(place):
    documents = place.documents(3)
    prefix = write_megatron(place.path / "wiki" / "a", [documents[0], documents[1][:0], documents[2]])
    with pytest.raises(UserError, match="Document 1 .* has no token"):
        place.adopt(prefix)


def test_a_megatron_shard_of_wrong_length_is_refused(place):
    prefix = write_megatron(place.path / "wiki" / "a", place.documents(6))
    cut(prefix.with_suffix(".bin"), 2)
    with pytest.raises(UserError, match=r"a\.bin has \d+ bytes where its index says"):
        place.adopt(prefix)


def test_token_types_are_not_mixed(place):
    first = write_megatron(place.path / "a" / "x", place.documents(3))
    second = write_megatron(place.path / "b" / "y", place.documents(3, 3), dtype=np.int32)
    with pytest.raises(UserError, match=r"y\.bin stores int32 tokens, .*x\.bin uint16"):
        place.adopt(first, second)


def test_ids_of_another_tokenizer_are_refused(place):
    documents = place.documents(3)
    documents[1][0] = 300
    with pytest.raises(UserError, match="the id 300; this tokenizer has 300 ids. The tokens come from another tokenizer"):
        place.adopt(write_megatron(place.path / "a" / "x", documents))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (["{0}/a", "{0}/a/part-000.npy"], "named twice"),
        (["{0}/nothing*"], "matches no"),
        (["{0}/a/part-000.npy", "{0}/*.json"], "is neither"),
        ([], "No shard was given"),
    ],
)
def test_inputs_that_name_no_or_one_pair_twice_are_refused(place, inputs, message):
    write_dolma(place.path / "a", place.documents(3))
    with pytest.raises(UserError, match=message):
        place.adopt(*(one.format(place.path) for one in inputs))


def test_half_a_megatron_pair_in_a_directory_is_refused(place):
    prefix = write_megatron(place.path / "a" / "x", place.documents(3))
    prefix.with_suffix(".idx").unlink()
    with pytest.raises(UserError, match=r"the index of .*x\.bin was expected"):
        place.adopt(place.path / "a")


def test_shards_inside_the_corpus_to_be_written_are_refused(place):
    (place.path / "corpus" / "units").mkdir(parents=True)
    array = write_dolma(place.path / "corpus" / "a", place.documents(3))
    with pytest.raises(UserError, match="lies in the directory that is to be written"):
        place.adopt(array)
    assert array.exists()


def test_an_input_of_import_is_complete_or_refused(place, monkeypatch):
    write_dolma(place.path / "data" / "deep", place.documents(3))
    monkeypatch.chdir(place.path / "data")
    with pytest.raises(UserError, match="names no path"):
        place.adopt("dclm=")
    assert decoded(place.adopt(place.path / "data" / "**")) == texts(3)
    (place.path / "data" / "part-001.npy").symlink_to(place.path / "nowhere.npy")
    for given in ("data", "data/*.npy", "data/**"):
        with pytest.raises(UserError, match=r"part-001\.npy is a link that leads nowhere"):
            place.adopt(place.path / given, name="other")
