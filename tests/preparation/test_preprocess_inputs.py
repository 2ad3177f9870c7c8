import gzip

import pytest
import zstandard

from megatron_exp.errors import UserError
from megatron_exp.preparation import preprocess_inputs
from megatron_exp.preparation.preprocess_inputs import find_inputs, make_units


def files(*inputs):
    return find_inputs([str(item) for item in inputs])


def described(*inputs):
    return [(file.path.rsplit("/", 1)[1], file.source, file.format, file.codec) for file in files(*inputs)]


def test_the_codec_comes_from_the_bytes_and_not_from_the_name(tmp_path):
    line = b'{"text": "a"}\n'
    for name, content in {
        "plain.json.gz": line,
        "gzip.jsonl": gzip.compress(line),
        "zstd.json": zstandard.ZstdCompressor().compress(line),
        "skippable.json": b"\x50\x2a\x4d\x18\x01\x00\x00\x00x" + zstandard.ZstdCompressor().compress(line),
    }.items():
        (tmp_path / name).write_bytes(content)
    assert [(name, kind, codec) for name, _, kind, codec in described(tmp_path)] == [
        ("gzip.jsonl", "jsonl", "gzip"),
        ("plain.json.gz", "jsonl", "plain"),
        ("skippable.json", "jsonl", "zstd"),
        ("zstd.json", "jsonl", "zstd"),
    ]


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b'{"text": "a"}\n', "jsonl"),
        (b'\xef\xbb\xbf{"id": 1, "text": null}\r\n', "jsonl"),
        (b'{"text": "' + b"x" * (2 << 20) + b'"}\n', "jsonl"),
        (b'{"id": 1}\n', "text"),
        (b"{braces} in prose\n", "text"),
        (b"", "text"),
        (b"import json\n", "text"),
    ],
)
def test_json_lines_under_another_name_never_pass_as_one_long_text(tmp_path, content, kind):
    (tmp_path / "part-00000").write_bytes(content)
    (tmp_path / "compressed").write_bytes(gzip.compress(content))
    assert {file.format for file in files(tmp_path)} == {kind}


@pytest.mark.parametrize("magic", [b"BZh91AY", b"\xfd7zXZ\x00", b"PK\x03\x04zip"])
def test_an_unsupported_codec_is_refused_by_name(tmp_path, magic):
    (tmp_path / "a.jsonl").write_bytes(magic)
    with pytest.raises(UserError, match=r"a\.jsonl is compressed"):
        files(tmp_path)


def test_the_source_is_the_given_name_or_the_parent_directory(tmp_path):
    (tmp_path / "my data").mkdir()
    (tmp_path / "my data" / "a.txt").write_text("x")
    assert [file.source for file in files(tmp_path)] == ["my-data"]
    assert [file.source for file in files(f"web={tmp_path}/**/*.txt")] == ["web"]


def test_a_directory_leaves_out_hidden_files_and_caches(tmp_path):
    for name in ("a.py", ".hidden", "__pycache__/a.pyc", "sub/b.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [name for name, *_ in described(tmp_path)] == ["a.py", "b.py"]


def test_files_come_in_the_order_of_the_inputs_and_then_of_their_paths(tmp_path):
    for name in ("b", "a", "c[1]"):
        (tmp_path / name).write_text("x")
    assert [name for name, *_ in described(tmp_path / "c[1]", tmp_path / "[ab]")] == ["c[1]", "a", "b"]


@pytest.mark.parametrize("given", [[], ["nowhere/*.json"], ["a", "*a"], ["name=missing"]])
def test_inputs_that_name_nothing_or_something_twice_are_refused(tmp_path, given, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").write_text("x")
    with pytest.raises(UserError):
        find_inputs(given)


def test_neighbouring_small_text_files_of_one_source_share_a_unit(tmp_path, monkeypatch):
    monkeypatch.setattr(preprocess_inputs, "_GROUP_FILES", 3)
    for index in range(8):
        (tmp_path / f"{index}.py").write_text("x = 1\n")
    (tmp_path / "4.py").rename(tmp_path / "4.jsonl")
    units = make_units(files(f"code={tmp_path}"), "tokenizer", "plain")
    assert [[file.path[-7:].lstrip("/").split(".")[0][-1] for file in unit.files] for unit in units] == [
        list("012"),
        ["3"],
        ["4"],
        list("567"),
    ]


def test_a_unit_key_covers_files_tokenizer_policy_and_source(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    found = files(tmp_path)
    keys = {
        make_units(found, "one", "plain")[0].key,
        make_units(found, "two", "plain")[0].key,
        make_units(found, "one", "special")[0].key,
        make_units(files(f"other={tmp_path}"), "one", "plain")[0].key,
    }
    assert len(keys) == 4
