"""Every odd input that loses documents elsewhere: each is accounted for, or refused by name."""

import gzip
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_exp.errors import UserError
from megatron_exp.preparation import preprocess_bytes, preprocess_readers
from megatron_exp.preparation.preprocess_inputs import find_inputs
from megatron_exp.preparation.preprocess_ledger import FileLedger
from megatron_exp.preparation.preprocess_readers import read_documents

GOOD = b'{"id": "a", "text": "first"}\n'
LAST = b'{"id": "z", "text": "last"}\n'


def read(path):
    """Documents as (line, id, text), and the ledger."""
    (file,) = find_inputs([str(path)])
    ledger = FileLedger(file.path, file.source, file.format, file.codec, file.num_bytes, file.modified_ns)
    documents = [tuple(document) for document in read_documents(file, ledger, lambda _: None)]
    ledger.docs_out = len(documents)
    ledger.close()
    return documents, ledger


def read_bytes(tmp_path, content, name="a.jsonl"):
    (tmp_path / name).write_bytes(content)
    return read(tmp_path / name)


def members(*parts):
    return b"".join(gzip.compress(part) for part in parts)


def frames(*parts):
    return b"".join(zstandard.ZstdCompressor(write_checksum=True).compress(part) for part in parts)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a\xff"}', "invalid_utf8"),
        (b'{"text": "a"', "invalid_json"),
        (b"plain words", "invalid_json"),
        (b"[" * 5000, "invalid_json"),
        (b'\xef\xbb\xbf{"text": "a"}', "invalid_json"),
        (b'["text"]', "not_an_object"),
        (b'{"id": 1}', "missing_text"),
        (b'{"text": null}', "null_text"),
        (b'{"text": 7}', "text_not_a_string"),
        (b'{"text": NaN}', "text_not_a_string"),
        (b'{"text": ""}', "empty_text"),
        (b'{"text": "\\ud800"}', "lone_surrogate"),
        (b'{"text": "a", "id": {}}', "bad_id"),
        (b'{"text": "a", "id": true}', "bad_id"),
        (b'{"text": "a", "id": "\\udfff"}', "bad_id"),
    ],
)
def test_a_line_that_is_no_document_is_rejected_and_the_rest_is_read(tmp_path, line, reason):
    documents, ledger = read_bytes(tmp_path, GOOD + line + b"\n" + LAST)
    assert documents == [(1, "a", "first"), (3, "z", "last")]
    assert (ledger.lines_in, ledger.rejected, ledger.rejects) == (3, {reason: 1}, [(2, reason)])


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b'{"score": NaN, "id": "b", "text": "kept"}', "kept"),
        (b'{"note": "\\ud800", "id": "b", "text": "kept"}', "kept"),
        (b'{"n": 123456789012345678901234567890, "id": "b", "text": "kept"}', "kept"),
        (b'{"text": "old", "id": "b", "text": "kept"}', "kept"),
        (b'{"id": "b", "text": "kept\\u0000\\ud83d\\ude00"}\r', "kept\x00\U0001f600"),
        (b'  {"id": "b", "text": "kept"}  ', "kept"),
    ],
)
def test_oddities_around_a_sound_text_lose_nothing(tmp_path, line, text):
    documents, ledger = read_bytes(tmp_path, GOOD + line + b"\n" + LAST)
    assert documents == [(1, "a", "first"), (2, "b", text), (3, "z", "last")]
    assert ledger.rejected == {}


def test_lines_that_only_python_reads_are_counted(tmp_path):
    _, ledger = read_bytes(tmp_path, GOOD + b'{"score": NaN, "text": "b"}\n' + LAST)
    assert ledger.nonstandard_lines == 1


@pytest.mark.parametrize("content", [GOOD + LAST, GOOD + LAST[:-1], b"\xef\xbb\xbf" + GOOD + LAST, GOOD.replace(b"\n", b"\r\n") + LAST])
def test_byte_order_mark_line_ends_and_a_missing_last_newline_change_nothing(tmp_path, content):
    assert read_bytes(tmp_path, content)[0] == [(1, "a", "first"), (2, "z", "last")]


def test_blank_lines_are_no_documents_but_count_as_lines_of_the_file(tmp_path):
    documents, ledger = read_bytes(tmp_path, GOOD + b"\n \t\r\n" + LAST)
    assert [line for line, _, _ in documents] == [1, 4]
    assert (ledger.lines_in, ledger.blank_lines, ledger.rejected) == (2, 2, {})


def test_a_missing_id_becomes_the_line_number_and_equal_ids_are_kept(tmp_path):
    documents, _ = read_bytes(tmp_path, b'{"text": "a"}\n{"text": "b", "id": 2}\n{"text": "c", "id": "2"}\n')
    assert [identity for _, identity, _ in documents] == ["1", "2", "2"]


def test_schemas_may_differ_from_line_to_line(tmp_path):
    lines = [{"text": "a", "meta": {"x": 1}}, {"meta": [1], "text": "b", "extra": None}, {"id": 3, "text": "c", "meta": "s"}]
    documents, _ = read_bytes(tmp_path, b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    assert [text for _, _, text in documents] == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.jsonl.gz"])
def test_a_file_of_no_bytes_has_no_lines(tmp_path, name):
    documents, ledger = read_bytes(tmp_path, b"", name)
    assert (documents, ledger.lines_in, ledger.rejected) == ([], 0, {})


@pytest.mark.parametrize("pack", [members, frames])
def test_every_gzip_member_and_zstd_frame_is_read(tmp_path, pack):
    split = pack(GOOD[:10], GOOD[10:], b"", LAST)
    documents, ledger = read_bytes(tmp_path, split)
    assert [text for _, _, text in documents] == ["first", "last"]
    assert ledger.hash


def test_zeros_after_a_gzip_member_are_padding(tmp_path):
    assert len(read_bytes(tmp_path, members(GOOD) + bytes(512) + members(LAST) + bytes(9000))[0]) == 2


@pytest.mark.parametrize("pack", [members, frames])
@pytest.mark.parametrize("keep", [-1, -9, 20])
def test_a_cut_stream_is_refused_by_name(tmp_path, pack, keep):
    with pytest.raises(UserError, match=r"a\.jsonl is cut short"):
        read_bytes(tmp_path, (pack(GOOD * 3, LAST * 3) if keep < 0 else pack(GOOD * 3))[:keep])


@pytest.mark.parametrize("pack", [members, frames])
def test_a_damaged_stream_is_refused_by_name(tmp_path, pack):
    packed = bytearray(pack(GOOD * 50, LAST))
    packed[len(pack(GOOD * 50)) - 2] ^= 1  # in the checksum of the first member
    with pytest.raises(UserError, match=r"a\.jsonl is damaged"):
        read_bytes(tmp_path, bytes(packed))
    with pytest.raises(UserError, match=r"a\.jsonl is damaged"):
        read_bytes(tmp_path, pack(GOOD) + b"garbage behind the last one")


def test_a_line_above_the_limit_is_rejected_without_losing_its_neighbours(tmp_path, monkeypatch):
    monkeypatch.setattr(preprocess_bytes, "MAX_RECORD_BYTES", 5 << 20)
    long = b'{"text": "' + b"x" * (6 << 20) + b'"}\n'
    documents, ledger = read_bytes(tmp_path, GOOD + long + LAST + long)
    assert [line for line, _, _ in documents] == [1, 3]
    assert ledger.rejected == {"too_long": 2}
    kept, _ = read_bytes(tmp_path, GOOD + long.replace(b"x" * (2 << 20), b"", 1) + LAST)
    assert [line for line, _, _ in kept] == [1, 2, 3]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=12), st.sampled_from([GOOD, LAST, b"\n", b'{"text": ""}\n', b'{"text":']))))
def test_every_line_of_any_file_is_accounted_for(tmp_path_factory, parts):
    content = b"".join(parts)
    path = tmp_path_factory.mktemp("fuzz") / "a.jsonl"
    (file_size, physical) = path.write_bytes(content), len(content.split(b"\n")) - (content.endswith(b"\n") or not content)
    try:
        _, ledger = read(path)
    except UserError:
        magics = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", *preprocess_bytes._REFUSED)
        assert content.startswith(magics) or content[1:4] == b"\x2a\x4d\x18" or not file_size
        return
    assert ledger.lines_in + ledger.blank_lines == physical


def test_a_text_file_is_one_document_named_after_it(tmp_path):
    documents, ledger = read_bytes(tmp_path, "\ufeffdef f():\r\n    pass\n".encode(), "module.py")
    assert documents == [(1, "module.py", "def f():\r\n    pass\n")]
    assert ledger.lines_in == 1
    assert read_bytes(tmp_path, members(b"two ", b"members"), "b.txt.gz")[0] == [(1, "b.txt.gz", "two members")]


def test_a_text_file_that_is_not_utf8_is_rejected(tmp_path):
    assert read_bytes(tmp_path, "é".encode("latin-1"), "a.txt")[1].rejected == {"invalid_utf8": 1}


def test_parquet_rows_are_read_whatever_else_the_file_holds(tmp_path):
    table = pa.table({"meta": [{"x": 1}] * 5, "text": ["a", None, "", "b", "c"], "id": [10, 11, 12, None, 14]})
    pq.write_table(table, tmp_path / "a.bin", row_group_size=2)
    documents, ledger = read(tmp_path / "a.bin")
    assert documents == [(1, "10", "a"), (4, "4", "b"), (5, "14", "c")]
    assert (ledger.lines_in, ledger.rejected) == (5, {"null_text": 1, "empty_text": 1})


def test_parquet_text_that_is_not_utf8_is_rejected_row_by_row(tmp_path):
    raw = pa.array([b"good", b"\xff", b"also good"], pa.binary())
    column = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    documents, ledger = read(tmp_path / "a.parquet")
    assert [text for _, _, text in documents] == ["good", "also good"]
    assert ledger.rejected == {"invalid_utf8": 1}


@pytest.mark.parametrize("table", [pa.table({"content": ["a"]}), pa.table({"text": [1]})])
def test_parquet_without_a_column_of_text_is_refused(tmp_path, table):
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet.*column `text`"):
        read(tmp_path / "a.parquet")


def test_cut_parquet_is_refused_by_name(tmp_path):
    pq.write_table(pa.table({"text": ["a"] * 100}), tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    with pytest.raises(UserError, match=r"a\.parquet cannot be read"):
        read_bytes(tmp_path, content[:-20], "a.parquet")


def test_a_line_of_a_hundred_megabytes_is_a_document_like_any_other(tmp_path):
    text = "x" * (100 << 20)
    documents, ledger = read_bytes(tmp_path, GOOD + b'{"id": "long", "text": "' + text.encode() + b'"}\n' + LAST)
    assert [document[1] for document in documents] == ["a", "long", "z"] and documents[1][2] == text
    assert ledger.docs_out == 3 and not ledger.rejected


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_a_parquet_text_above_the_limit_is_rejected_without_losing_its_neighbours(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(preprocess_bytes, "MAX_RECORD_BYTES", 1000)
    column = pa.array(["first", "\u00e9" * 501, None, "\u00e9" * 500, "last"]).cast(kind)
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    documents, ledger = read(tmp_path / "a.parquet")
    assert [(line, len(text)) for line, _, text in documents] == [(1, 5), (4, 500), (5, 4)]
    assert ledger.rejects == [(2, "too_long"), (3, "null_text")]


def test_parquet_is_read_in_batches_of_bounded_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(preprocess_readers, "_PARQUET_BYTES", 10_000)
    sizes, values = [], preprocess_readers._values
    monkeypatch.setattr(preprocess_readers, "_values", lambda batch, name: sizes.append(batch.nbytes) or values(batch, name))
    texts = [f"{number:04d}" * (1 if number < 400 else 1000) for number in range(500)] + ["x" * 50_000, "short"]
    pq.write_table(pa.table({"text": texts, "id": range(502)}), tmp_path / "a.parquet", row_group_size=200)
    documents, _ = read(tmp_path / "a.parquet")
    assert [text for _, _, text in documents] == texts
    assert max(sizes) < 70_000 and sum(size > 20_000 for size in sizes) <= 2 * 2, sizes


@pytest.mark.parametrize("name", ["text", "id"])
def test_parquet_with_two_columns_of_one_name_is_refused(tmp_path, name):
    columns = {"text": ["a"], "id": ["b"]}
    pq.write_table(pa.table([*columns.values(), columns[name]], names=[*columns, name]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=rf"a\.parquet has several columns `{name}`"):
        read(tmp_path / "a.parquet")


def test_a_long_line_is_given_up_once_it_is_a_document(tmp_path):
    length = 8 << 20
    (tmp_path / "a.jsonl").write_bytes((b'{"text": "' + b"x" * length + b'"}\n') * 3)
    (file,) = find_inputs([str(tmp_path / "a.jsonl")])
    ledger = FileLedger(file.path, file.source, file.format, file.codec, file.num_bytes, file.modified_ns)
    documents = read_documents(file, ledger, lambda _: None)
    tracemalloc.start()
    try:
        held = [(len(document.text), tracemalloc.get_traced_memory()[0]) for document in documents]
    finally:
        tracemalloc.stop()
    assert [text for text, _ in held] == [length] * 3
    assert all(num_bytes < 1.5 * length for _, num_bytes in held), held
