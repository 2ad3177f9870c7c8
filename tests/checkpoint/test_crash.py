"""A checkpoint is old or new at every file operation that fails or at which the process dies, and never half."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_exp import files
from megatron_exp.checkpoint import catalogue
from megatron_exp.checkpoint.saving import SavingCheckpoint, save_checkpoint
from megatron_exp.errors import InterruptedRunError, UserError
from tests.model.tiny import running, train, trainable

CALLS = ("_write", "_fsync", "_rename", "_fsync_directory")


@pytest.fixture(scope="module")
def layout():
    with running() as layout:
        yield layout


@pytest.fixture(scope="module")
def model(layout):
    whole = trainable(layout, layers=1)
    train(*whole, range(1))
    return whole


class Died(BaseException):
    """Stands for a killed process: nothing that it would still have done happens."""


@contextlib.contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException) -> Iterator[list[str]]:
    """Every call of `files` from number `at` on raises; with Died, nothing is cleaned up either. Gives the names of the calls made."""
    made: list[str] = []
    dead = isinstance(error, Died)
    with monkeypatch.context() as patch:

        def counting(name, original):
            def wrapped(*arguments):
                made.append(name)
                if at and (len(made) == at or (dead and len(made) > at)):
                    raise error
                return original(*arguments)

            return wrapped

        for name in CALLS:
            patch.setattr(files, name, counting(name, getattr(files, name)))
        if dead:
            patch.setattr(shutil, "rmtree", lambda *arguments, **options: None)
            patch.setattr(Path, "unlink", lambda *arguments, **options: None)
        yield made


def save_second(run: Path, model, is_portable: bool) -> None:
    path = catalogue.checkpoint_path(run, 2)
    save_checkpoint(path, *model, {"step": 2}, is_portable=is_portable)
    catalogue.rotate_checkpoints(run, keep=(), num_rotating=1, known_sound={path})


@pytest.mark.parametrize(
    ("is_portable", "error"), [(True, OSError(28, "No space left on device")), (False, Died())], ids=["portable, disk full", "parallel, killed"]
)
def test_at_every_file_operation_the_newest_sound_checkpoint_is_the_old_or_the_new_one(
    model, tmp_path, monkeypatch, is_portable, error
) -> None:
    first = tmp_path / "first"
    save_checkpoint(catalogue.checkpoint_path(first, 1), *model, {"step": 1})
    run = Path(shutil.copytree(first, tmp_path / "whole"))
    with failing(monkeypatch, 0, error) as made:
        save_second(run, model, is_portable)
    total = len(made)
    assert {name: made.count(name) > 4 for name in CALLS} == dict.fromkeys(CALLS, True)
    seen = set()
    for call in range(1, total + 1):
        run = Path(shutil.copytree(first, tmp_path / str(call)))
        with failing(monkeypatch, call, error), pytest.raises((UserError, OSError, Died)):
            save_second(run, model, is_portable)
        step, path = catalogue.newest_verified(run)
        seen.add(step)
        assert catalogue.verify_checkpoint(path) == []
        assert all(catalogue.verify_checkpoint(other) == [] for _, other in catalogue.list_checkpoints(run))
        shutil.rmtree(run)
    assert seen == {1, 2}, "the last operations come after the new one has its name"


def test_a_full_disk_is_the_users_to_mend_and_says_what_is_free(model, tmp_path, monkeypatch) -> None:
    with failing(monkeypatch, 3, OSError(28, "No space left on device")), pytest.raises(UserError, match="No space left.* are free"):
        save_checkpoint(tmp_path / "one", *model, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", [3, -8], ids=["while a thread writes", "while the main rank seals"])
def test_a_faulty_disk_is_the_machines_and_the_run_is_to_be_started_again(model, tmp_path, monkeypatch, call) -> None:
    with failing(monkeypatch, 0, OSError()) as made:
        save_checkpoint(tmp_path / "whole", *model, {})
    broken = OSError(errno.EIO, "Input/output error")
    with failing(monkeypatch, call % len(made), broken), pytest.raises(InterruptedRunError, match="Input/output"):
        save_checkpoint(tmp_path / "one", *model, {})
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_a_disk_that_is_full_in_the_middle_of_a_large_tensor_is_still_called_full(layout, tmp_path, monkeypatch) -> None:
    """PyTorch's writer loses the error of its stream and raises one about positions."""
    large = trainable(layout, layers=1, hidden=128, ffn=4096)

    def quota(file, data):
        if len(data) > 1 << 20:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        file.write(data)

    monkeypatch.setattr(files, "_write", quota)
    with pytest.raises(UserError, match="Disk quota exceeded"):
        save_checkpoint(tmp_path / "one", *large, {})
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_for_a_folder_is_full_too(model, tmp_path, monkeypatch) -> None:
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left.* are free"):
        patch.setattr(Path, "mkdir", full)
        save_checkpoint(tmp_path / "one", *model, {})


def test_a_disk_that_gives_back_other_bytes_is_noticed_before_the_checkpoint_counts(model, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(files, "reread_sha256", lambda path: "0" * 64)
    with pytest.raises(InterruptedRunError, match="other bytes than were written"):
        save_checkpoint(tmp_path / "one", *model, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "common.pt", "metadata.json", "checkpoint.json", "files.json", "COMPLETE"])
def test_a_disk_that_damages_any_file_is_noticed_while_the_older_checkpoint_is_still_there(model, tmp_path, monkeypatch, name) -> None:
    def damaging(source, target):
        os.rename(source, target)
        if Path(target).name == name:
            data = bytearray(Path(target).read_bytes())
            data[len(data) // 2] ^= 1
            Path(target).write_bytes(data)

    save_checkpoint(catalogue.checkpoint_path(tmp_path, 1), *model, {"step": 1})
    monkeypatch.setattr(files, "_rename", damaging)
    with pytest.raises(InterruptedRunError, match=f"other bytes than were written: .*{name}"):
        save_checkpoint(catalogue.checkpoint_path(tmp_path, 2), *model, {"step": 2})
    assert [step for step, _ in catalogue.list_checkpoints(tmp_path)] == [1]


def test_what_is_written_in_the_background_is_the_state_at_its_beginning(layout, tmp_path) -> None:
    model, optimizer = trainable(layout)
    train(model, optimizer, range(2))
    save_checkpoint(tmp_path / "now", model, optimizer, {}, is_portable=False)
    saving = SavingCheckpoint(tmp_path / "later", model, optimizer, {}, is_portable=False, in_background=True)
    train(model, optimizer, range(2, 4))
    assert not (tmp_path / "later").exists(), "it counts from the end of `finish` on"
    saving.finish()
    shard = "__0_0.distcp"
    assert (tmp_path / "later" / shard).read_bytes() == (tmp_path / "now" / shard).read_bytes()
    assert catalogue.verify_checkpoint(tmp_path / "later") == []


def test_weights_that_are_no_longer_finite_are_never_saved(layout, tmp_path) -> None:
    model, optimizer = trainable(layout)
    train(model, optimizer, range(1))
    next(iter(optimizer._states()))[1].data[0] = float("nan")
    with pytest.raises(UserError, match="no longer finite"):
        save_checkpoint(tmp_path / "one", model, optimizer, {})
    assert list(tmp_path.iterdir()) == []
