import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_exp.errors import UserError
from megatron_exp.shards.indexed import IndexedReader, IndexedWriter, token_dtype, write_index

DOCUMENTS = [[1, 2, 3], [4], [], [5, 6, 7, 8, 9], [65_000, 0]]


def write(prefix, documents, dtype=np.int32):
    with IndexedWriter(f"{prefix}.bin", f"{prefix}.idx", np.dtype(dtype)) as writer:
        for document in documents:
            writer.add(np.array(document, dtype=np.int64))
    return IndexedReader(prefix)


@pytest.mark.parametrize("dtype", [np.int32, np.uint16])
def test_files_equal_those_of_megatrons_builder_byte_for_byte(tmp_path, dtype):
    write(tmp_path / "ours", DOCUMENTS, dtype)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in DOCUMENTS:
        builder.add_document(torch.tensor(document, dtype=torch.int64), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()


def test_megatron_reads_what_we_write(tmp_path):
    write(tmp_path / "a", DOCUMENTS)
    dataset = IndexedDataset(str(tmp_path / "a"))
    assert [dataset[index].tolist() for index in range(len(dataset))] == DOCUMENTS


@settings(max_examples=25, deadline=None)
@given(documents=st.lists(st.lists(st.integers(0, 65_535), max_size=20), max_size=20), dtype=st.sampled_from([np.int32, np.uint16]))
def test_every_document_is_read_back(tmp_path_factory, documents, dtype):
    reader = write(tmp_path_factory.mktemp("shard") / "a", documents, dtype)
    assert reader.num_documents == len(documents)
    assert [reader.document(index).tolist() for index in range(len(documents))] == documents
    assert reader.tokens.tolist() == [token for document in documents for token in document]
    assert reader.starts.tolist() == [0, *np.cumsum([len(document) for document in documents])]


def test_documents_of_several_sequences_are_read_as_one(tmp_path):
    builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.int32)
    builder.add_document(torch.arange(5), [2, 3])
    builder.add_document(torch.arange(4), [4])
    builder.finalize(str(tmp_path / "a.idx"))
    reader = IndexedReader(tmp_path / "a")
    assert [reader.document(index).tolist() for index in range(reader.num_documents)] == [[0, 1, 2, 3, 4], [0, 1, 2, 3]]
    assert reader.starts.tolist() == [0, 5, 9]


@pytest.mark.parametrize("suffix", ["bin", "idx"])
@pytest.mark.parametrize("keep", [0, 1, 30, -1])
def test_a_truncated_file_is_refused_by_name(tmp_path, suffix, keep):
    write(tmp_path / "a", DOCUMENTS)
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=rf"a\.{suffix}"):
        IndexedReader(tmp_path / "a")


def test_an_index_that_contradicts_itself_is_refused(tmp_path):
    write(tmp_path / "a", DOCUMENTS)
    raw = bytearray((tmp_path / "a.idx").read_bytes())
    raw[34] ^= 1  # the first length
    (tmp_path / "a.idx").write_bytes(raw)
    with pytest.raises(UserError, match=r"a\.idx"):
        _ = IndexedReader(tmp_path / "a").starts


def test_an_id_that_does_not_fit_the_dtype_is_refused_and_nothing_is_left(tmp_path):
    with pytest.raises(ValueError, match="do not fit"):
        write(tmp_path / "a", [[70_000]], np.uint16)
    assert list(tmp_path.iterdir()) == []


def test_offsets_beyond_two_to_the_31_bytes_and_tokens_are_right(tmp_path):
    lengths = np.array([1_500_000_000, 1_500_000_000, 7], dtype=np.int32)
    write_index(tmp_path / "a.idx", lengths, np.dtype("<i4"))
    with open(tmp_path / "a.bin", "wb") as file:  # sparse: takes no disk
        file.truncate(4 * int(lengths.sum(dtype=np.int64)))
        file.seek(4 * 3_000_000_000)
        file.write(np.arange(1, 8, dtype="<i4").tobytes())
    reader = IndexedReader(tmp_path / "a")
    assert reader.num_tokens == 3_000_000_007
    assert reader.starts.tolist() == [0, 1_500_000_000, 3_000_000_000, 3_000_000_007]
    assert reader.document(2).tolist() == [1, 2, 3, 4, 5, 6, 7]
    dataset = IndexedDataset(str(tmp_path / "a"))  # kept: it unmaps its files when it is dropped, under the arrays it gave out
    assert dataset[2].tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_the_dtype_is_the_one_megatron_chooses():
    assert token_dtype(65_499) == np.uint16
    assert token_dtype(65_500) == np.int32


@pytest.mark.parametrize("dtype", [np.int32, np.uint16])
def test_every_token_leads_to_its_document_without_reading_the_index_whole(tmp_path, dtype):
    reader = write(tmp_path / "a", DOCUMENTS, dtype)
    expected = [(number, int(reader.starts[number])) for number, document in enumerate(DOCUMENTS) for _ in document]
    assert [reader.document_of(token) for token in range(reader.num_tokens)] == expected
    for outside in (-1, reader.num_tokens):
        with pytest.raises(IndexError):
            reader.document_of(outside)


def test_documents_beyond_two_to_the_31_are_found(tmp_path):
    """Sparse files: an index of 2**31 + 2 documents takes 43 GB and no disk. All are empty but the last."""
    num = 2**31 + 2
    header = 34
    with open(tmp_path / "a.idx", "wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, num, num + 1))
        file.truncate(header + 20 * num + 8)
        file.seek(header + 4 * (num - 1))
        file.write(struct.pack("<i", 3))  # its length; its pointer is 0, after nothing but empty ones
        file.seek(header + 12 * num + 8 * (num - 1))
        file.write(struct.pack("<qq", num - 1, num))
    (tmp_path / "a.bin").write_bytes(np.array([5, 6, 7], "<u2").tobytes())
    reader = IndexedReader(tmp_path / "a")
    assert (reader.num_documents, reader.num_tokens) == (num, 3)
    assert reader.document(num - 1).tolist() == [5, 6, 7]
    assert reader.document_of(2) == (num - 1, 0)
