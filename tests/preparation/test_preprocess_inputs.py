import gzip
import os
import re
from pathlib import Path

import pytest
import zstandard

from megatron_exp.errors import UserError
from megatron_exp.preparation import preprocess_inputs
from megatron_exp.preparation.preprocess_inputs import find_inputs, make_units


def files(*inputs):
    return find_inputs([str(item) for item in inputs])


def described(*inputs):
    return [(Path(file.path).name, file.source, file.format, file.codec) for file in files(*inputs)]


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
        (b'{"id": 1}\n', "jsonl"),
        (b'{"score": NaN, "text": "a"}\n', "jsonl"),
        (b'{"text": "\\ud800"}\n', "jsonl"),
        (b'{"text": "\xff"}\n', "jsonl"),
        (b'{"text": "cut\n\n{"text": "a"}\n', "jsonl"),
        (b'["text"]\n{"text": "a"}\n', "jsonl"),
        (b'null\n{"text": "a"}\n', "jsonl"),
        (b'{"text": 1}\n' + b"broken\n" * 9, "jsonl"),
        (b"{braces} in prose\n", "text"),
        (b"{-# LANGUAGE Safe #-}\n", "text"),
        (b"[![badge](x)](y)\n", "text"),
        (b"[section]\nkey = 1\n", "text"),
        (b"[1] A reference\n[2] Another\n", "text"),
        (b"For example:\n\n" + b"words\n" * 3 + b'{"a": 1}\n', "text"),
        (b"", "text"),
        (b"import json\n", "text"),
        (b"x" * (3 << 20), "text"),
    ],
)
def test_json_lines_under_another_name_never_pass_as_one_long_text(tmp_path, content, kind):
    (tmp_path / "part-00000").write_bytes(content)
    (tmp_path / "compressed").write_bytes(gzip.compress(content))
    assert {file.format for file in files(tmp_path)} == {kind}


@pytest.mark.parametrize(
    "content",
    [
        b'{"text": "cut',
        b"{'text': 'a'}\n",
        b'{\n  "a": 1\n}\n',
        b"[1, 2]\n[3]\n",
        b'[{"text": "a"},\n',
        b"words\n" * 3 + b'{"text": "a"}\n',
    ],
)
def test_what_could_be_json_lines_or_one_text_is_refused_until_its_name_tells(tmp_path, content):
    (tmp_path / "part-00000").write_bytes(content)
    with pytest.raises(UserError, match=r"part-00000 could be JSON lines or one plain text.*\.jsonl.*\.txt"):
        files(tmp_path)
    for name, kind in (("a.txt", "text"), ("a.jsonl", "jsonl"), ("a.txt.gz", "text")):
        (tmp_path / "named").mkdir(exist_ok=True)
        (tmp_path / "named" / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        assert [file.format for file in files(tmp_path / "named" / name)] == [kind]


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


# A directory or glob stands for all of its files.


@pytest.fixture
def nest(tmp_path):
    """Two files at different depths."""
    for name in ("a.txt", "sub/deep/b.txt"):
        (tmp_path / "nest" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "nest" / name).write_text(name)
    return tmp_path / "nest"


def names(*inputs):
    return [name for name, *_ in described(*inputs)]


@pytest.mark.parametrize("given", ["{}", "{}/*", "{}/sub", "{}/*/*/*.txt", "{}/**", "{}/**/*"])
@pytest.mark.parametrize("kind", ["unreadable", "link", "socket"])
def test_what_cannot_be_read_is_named_and_never_left_out(nest, monkeypatch, given, kind):
    bad, deep, list_directory = nest / "sub" / "deep" / "bad.txt", nest / "sub" / "deep", os.scandir

    def refuse(path="."):
        if Path(path) == deep:
            raise PermissionError(13, "Permission denied", str(path))
        return list_directory(path)

    if kind == "unreadable":
        monkeypatch.setattr(os, "scandir", refuse)
    elif kind == "link":
        bad.symlink_to(nest / "nowhere")
    else:
        os.mkfifo(bad)
    with pytest.raises(UserError, match=re.escape(str(deep if kind == "unreadable" else bad))):
        files(given.format(nest))


def test_a_broken_link_on_the_way_of_a_glob_is_named(nest):
    (nest / "gone").symlink_to(nest / "nowhere")
    with pytest.raises(UserError, match="nest/gone is a link that leads nowhere"):
        files(nest / "*" / "deep" / "*.txt")


def test_hidden_links_may_lead_nowhere(nest):
    (nest / ".#a.txt").symlink_to("somebody@somewhere")
    assert names(nest) == names(nest / "**") == ["a.txt", "b.txt"]


def test_a_file_that_may_not_be_opened_is_named(nest, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(preprocess_inputs, "codec_of", refuse)
    with pytest.raises(UserError, match=r"a\.txt cannot be read \(Permission denied\)"):
        files(nest)


@pytest.mark.parametrize("given", ["{}", "{}/**"])
def test_links_to_directories_are_followed_once_and_circles_end(nest, tmp_path, given):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "c.txt").write_text("c")
    (nest / "sub" / "linked").symlink_to(tmp_path / "elsewhere")
    (nest / "again").symlink_to(nest / "sub")
    (nest / "sub" / "circle").symlink_to(nest)
    assert [file.path.removeprefix(f"{nest}/") for file in files(given.format(nest))] == ["a.txt", "sub/deep/b.txt", "sub/linked/c.txt"]


@pytest.mark.parametrize("given", ["{}/**", "{}/**/*", "{}/**/**/*.txt", "{}/*", "{}"])
def test_what_one_input_matches_in_several_ways_is_read_once(nest, given):
    (nest / "second name.txt").symlink_to(nest / "a.txt")
    assert names(given.format(nest)) == ["a.txt", "b.txt"]


def test_globs_match_as_in_a_shell(nest):
    (nest / ".hidden.txt").write_text("x")
    assert names(nest / "*.txt") == ["a.txt"]
    assert names(nest / ".h*") == [".hidden.txt"]
    assert names(f"{nest}/*/") == ["b.txt"]
    assert names(nest / "s[tu]b" / ".." / "a.?xt") == ["a.txt"]


@pytest.mark.parametrize("given", ["", "dclm="])
def test_an_empty_path_is_not_the_current_directory(nest, monkeypatch, given):
    monkeypatch.chdir(nest)
    with pytest.raises(UserError, match="names no path"):
        find_inputs([given])
    assert names(".") == ["a.txt", "b.txt"]


def test_a_file_name_that_is_not_utf8_is_refused(nest):
    Path(os.fsdecode(os.fsencode(nest) + b"/caf\xe9.txt")).write_text("x")
    with pytest.raises(UserError, match=r"caf\\xe9\.txt.* is not UTF-8"):
        files(nest)
