"""What a command answers where the system refuses a path, or an option makes no sense: one paragraph, exit code 2, nothing written."""

import errno
import os
from pathlib import Path

import pytest

from megatron_exp.cli import os_errors
from megatron_exp.cli.main import EXIT_USER_ERROR, entry
from megatron_exp.errors import InterruptedRunError, UserError
from megatron_exp.files import partial_name
from tests.report.fabricated import make_world
from tests.training import toy


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def file(tmp_path):
    """A file where a folder would be needed, as the last component but one."""
    (tmp_path / "file").write_text("somebody's")
    return tmp_path / "file"


def refused(capsys, *arguments):
    """The one paragraph that the command prints."""
    with pytest.raises(SystemExit) as left:
        entry([str(argument) for argument in arguments])
    assert left.value.code == EXIT_USER_ERROR
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    return line


def config_of(world, folder):
    """A configuration that can be planned on the world's corpus."""
    path = folder / "config.yaml"
    path.write_text(f"name: toy\ncorpus: {{path: {world.corpus.path}}}\ngeometry: {{sequence_length: 8, global_batch_size: 1, steps: 1}}\n")
    return path


def test_a_file_in_the_place_of_a_folder_is_named_by_every_command(world, tmp_path, file, capsys):
    for arguments in (
        ("plan", config_of(world, tmp_path), "--out", file / "x"),
        ("train", world.manifest.path, "--out", file / "x"),
        ("train", world.manifest.path, "--out", file),
        ("inspect", world.manifest.path, "--html", file / "x.html"),
        ("verify", world.manifest.path, "--base-out", file / "x"),
        ("cache", world.corpus.path, "--to", file / "x"),
        ("quickstart", "--out", file / "x", "--minutes", "2", "--input", file),
        ("report", world.run, "--out", file / "x.html"),
        ("export", world.run, "--out", file / "x.csv"),
    ):
        assert str(file) in refused(capsys, *arguments), arguments
    assert file.read_text() == "somebody's"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "file"]


def test_a_folder_in_the_place_of_a_file_is_named_and_left_alone(world, tmp_path, file, capsys):
    assert f"{tmp_path}: Is a directory" in refused(capsys, "inspect", world.manifest.path, "--html", tmp_path)
    assert f"{tmp_path} already exists" in refused(capsys, "verify", world.manifest.path, "--base-out", tmp_path)
    assert list(tmp_path.iterdir()) == [file]


def test_a_full_disk_and_a_forbidden_path_are_told_apart_and_other_errors_are_no_mistake():
    assert "Make room" in (os_errors.mistake(OSError(errno.ENOSPC, "full")) or "")
    assert "/a/b: Permission denied" in (os_errors.mistake(PermissionError(errno.EACCES, "no", "/a/b")) or "")
    assert "/final" in (os_errors.mistake(OSError(errno.EISDIR, "no", "/final.x.partial", None, "/final")) or "")
    assert (os_errors.mistake(FileNotFoundError(errno.ENOENT, "no", partial_name(Path("/a/b.html")).as_posix())) or "").startswith("/a/b.html: No such")
    unfinished = (partial_name(Path("/a/model")) / "weights").as_posix()
    assert (os_errors.mistake(OSError(errno.EFBIG, "no", unfinished)) or "").startswith("/a/model/weights: File too large")
    assert os_errors.mistake(OSError(errno.EIO, "disk", "/a/b")) is None
    assert os_errors.mistake(OSError(errno.ENOENT, "which?")) is None
    assert os_errors.mistake(OSError("killed")) is None


def test_one_process_of_several_keeps_its_own_exit_code(world, file, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(FileExistsError):
        entry(["inspect", str(world.manifest.path), "--html", str(file / "x.html")])


def test_a_run_that_has_begun_well_is_interrupted_by_a_full_disk_and_may_be_started_again(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path))

    monkeypatch.setattr("megatron_exp.training.train.train_loop", full)
    with pytest.raises(InterruptedRunError, match="No space left.*Start it again"):
        entry(["train", str(toy.make_manifest(tmp_path)), "--out", str(tmp_path / "run")])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("quickstart", "--minutes", "nan", "--out", "{out}"), "--minutes nan"),
        (("quickstart", "--minutes", "inf", "--out", "{out}"), "--minutes inf"),
        (("train", "{manifest}", "--out", "{out}", "--hang-seconds", "nan"), "--hang-seconds nan"),
        (("train", "{manifest}", "--out", "{out}", "--hang-seconds=-1"), "--hang-seconds -1"),
        (("train", "{manifest}", "--out", "{out}", "--hang-seconds", "inf"), "--hang-seconds inf"),
        (("eval", "{run}", "--steps", "abc"), "--steps 'abc' is no list"),
        (("eval", "{run}", "--steps", "1,,2"), "is no list"),
        (("eval", "{run}", "--steps=-1"), "is no list"),
        (("inspect", "{manifest}", "--item=-7"), "-7 is no number of an item"),
        (("inspect", "{run}", "--item", "18446744073709551616"), "18446744073709551616 is no number of an item"),
    ],
)
def test_an_option_without_sense_is_refused_by_name(world, tmp_path, capsys, arguments, words):
    places = {"manifest": world.manifest.path, "run": world.run, "out": tmp_path / "out"}
    assert words in refused(capsys, *(argument.format(**places) for argument in arguments))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["null", "[]", "3", '"text"'])
@pytest.mark.parametrize("name", ["manifest.json", "run.json"])
def test_a_record_that_is_json_and_no_object_is_called_damaged(tmp_path, capsys, name, content):
    (tmp_path / name).write_text(content)
    assert f"{name} holds no object" in refused(capsys, "inspect", tmp_path)


def test_a_mistake_of_the_user_is_a_value_error_and_an_interrupted_run_is_none():
    assert issubclass(UserError, ValueError) and not issubclass(InterruptedRunError, ValueError | OSError)
