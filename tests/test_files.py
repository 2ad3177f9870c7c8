import io
import os
import shutil

import pytest

from megatron_exp import files
from megatron_exp.errors import UserError


class Crash(Exception):
    """Stands for a process that dies at this call."""


def count_calls(monkeypatch, fail_at=None):
    calls = []
    for name in ("_write", "_fsync", "_rename", "_fsync_directory"):
        original = getattr(files, name)

        def wrapped(*arguments, _original=original, _name=name):
            calls.append(_name)
            if fail_at is not None and len(calls) == fail_at:
                raise fail_at_error[0]
            return _original(*arguments)

        monkeypatch.setattr(files, name, wrapped)
    return calls


fail_at_error = [Crash()]


class TakesThree(io.RawIOBase):
    """Stands for a file of which the system writes three bytes at a time."""

    def __init__(self):
        self.content = b""

    def write(self, data):
        self.content += bytes(data[:3])
        return min(3, len(data))


def test_what_the_system_takes_in_parts_is_written_whole():
    file = TakesThree()
    files.append_whole(file, b"a whole line\n")
    assert file.content == b"a whole line\n"


def test_a_file_is_old_or_new_at_every_call_that_fails(tmp_path, monkeypatch):
    path = tmp_path / "record"
    files.write_file(path, b"old")
    with monkeypatch.context() as patch:
        calls = count_calls(patch)
        files.write_file(path, b"old")
        total = len(calls)
    assert total == 4
    for error in (Crash(), OSError(28, "No space left on device")):
        fail_at_error[0] = error
        for call in range(1, total + 1):
            with monkeypatch.context() as patch:
                count_calls(patch, fail_at=call)
                with pytest.raises(type(error)):
                    files.write_file(path, b"new")
            assert path.read_bytes() in (b"old", b"new")
            assert os.listdir(tmp_path) == ["record"], "no half-written file stays"
            files.write_file(path, b"old")


def test_a_directory_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    def build():
        with files.durable_directory(tmp_path / "result") as directory:
            files.write_file(directory / "a", b"1")
            (directory / "sub").mkdir()
            files.write_file(directory / "sub" / "b", b"2")

    with monkeypatch.context() as patch:
        calls = count_calls(patch)
        build()
    total = len(calls)
    fail_at_error[0] = Crash()
    for call in range(1, total):
        shutil.rmtree(tmp_path / "result", ignore_errors=True)
        with monkeypatch.context() as patch:
            count_calls(patch, fail_at=call)
            with pytest.raises(Crash):
                build()
        assert os.listdir(tmp_path) == [] or sorted(os.listdir(tmp_path / "result")) == ["a", "sub"]


def test_an_existing_result_is_never_overwritten(tmp_path):
    (tmp_path / "result").mkdir()
    (tmp_path / "result" / "x").write_text("mine")
    with pytest.raises(UserError, match="never overwritten"), files.durable_directory(tmp_path / "result"):
        pass
    assert (tmp_path / "result" / "x").read_text() == "mine"


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x"])
def test_a_name_that_leads_out_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="leads out"):
        files.safe_join(tmp_path, name)


def test_a_symbolic_link_that_leads_out_is_refused(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match="leads out"):
        files.safe_join(tmp_path / "root", "link/secret")
