import logging

import pytest

from megatron_exp import files
from megatron_exp.checkpoint import catalogue
from megatron_exp.errors import UserError


def make(run_dir, step, content=b"weights"):
    """A sealed directory with two files, as a checkpoint has many."""
    path = catalogue.checkpoint_path(run_dir, step)
    path.mkdir(parents=True)
    (path / "__0_0.distcp").write_bytes(content)
    (path / "common.pt").write_bytes(b"common")
    catalogue.seal(path, {name: files.sha256_file(path / name) for name in ("__0_0.distcp", "common.pt")})
    return path


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_sealed_checkpoint_is_sound(tmp_path):
    assert catalogue.verify_checkpoint(make(tmp_path, 3)) == []


DAMAGE = {
    "a flipped byte": (lambda path: flip_a_byte(path / "__0_0.distcp"), "__0_0.distcp is damaged"),
    "a truncated file": (lambda path: (path / "__0_0.distcp").write_bytes(b"wei"), "__0_0.distcp has 3 bytes, not the 7"),
    "a missing file": (lambda path: (path / "common.pt").unlink(), "common.pt is missing"),
    "an unlisted file": (lambda path: (path / "__1_0.distcp").write_bytes(b"old"), "__1_0.distcp is not in files.json"),
    "a flipped byte in the list": (lambda path: flip_a_byte(path / "files.json"), "COMPLETE does not belong to .*files.json"),
    "a stale marker": (lambda path: (path / "COMPLETE").write_bytes(b"0" * 64), "COMPLETE does not belong to .*files.json"),
    "no marker": (lambda path: (path / "COMPLETE").unlink(), "COMPLETE is missing"),
    "no list": (lambda path: (path / "files.json").unlink(), "files.json is missing"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_refused_by_name(tmp_path, what):
    damage, complaint = DAMAGE[what]
    path = make(tmp_path, 3)
    damage(path)
    with pytest.raises(UserError, match=complaint):
        catalogue.require_sound(path)


def test_checkpoints_are_listed_in_order_and_only_with_their_marker(tmp_path):
    for step in (100_000_000, 20, 3):
        make(tmp_path, step)
    (make(tmp_path, 5) / "COMPLETE").unlink()
    (tmp_path / "checkpoints" / "step-00000007.123.partial").mkdir()
    assert [step for step, _ in catalogue.list_checkpoints(tmp_path)] == [3, 20, 100_000_000]
    assert catalogue.list_checkpoints(tmp_path / "nothing") == []


def test_the_newest_sound_checkpoint_is_found_and_the_damaged_one_reported(tmp_path, caplog):
    make(tmp_path, 3)
    flip_a_byte(make(tmp_path, 6) / "common.pt")
    with caplog.at_level(logging.WARNING):
        assert catalogue.newest_verified(tmp_path) == (3, catalogue.checkpoint_path(tmp_path, 3))
    assert "step-00000006/common.pt is damaged" in caplog.text


@pytest.mark.parametrize("what", DAMAGE)
def test_whatever_is_damaged_the_checkpoint_before_is_found(tmp_path, what):
    make(tmp_path, 3)
    DAMAGE[what][0](make(tmp_path, 6))
    assert catalogue.newest_verified(tmp_path) == (3, catalogue.checkpoint_path(tmp_path, 3))


def test_without_a_sound_checkpoint_there_is_no_newest(tmp_path):
    assert catalogue.newest_verified(tmp_path) is None


def test_rotation_keeps_two_and_the_kept_steps(tmp_path):
    for step in range(1, 7):
        make(tmp_path, step)
    assert [path.name for path in catalogue.rotate_checkpoints(tmp_path, keep={2})] == ["step-00000004", "step-00000003", "step-00000001"]
    assert [step for step, _ in catalogue.list_checkpoints(tmp_path)] == [2, 5, 6]


def test_rotation_does_not_count_damaged_checkpoints(tmp_path):
    for step in range(1, 5):
        make(tmp_path, step)
    flip_a_byte(catalogue.checkpoint_path(tmp_path, 4) / "common.pt")
    catalogue.rotate_checkpoints(tmp_path, keep=())
    assert [step for step, _ in catalogue.list_checkpoints(tmp_path)] == [2, 3, 4]


RECORDS = {
    "zeros": b"\0" * 40,
    "no object": b"[]",
    "a key lost": b'{"schema_version": 1, "extrb": {}}',
    "another version": b'{"schema_version": 3}',
}


@pytest.mark.parametrize("content", RECORDS.values(), ids=RECORDS)
def test_a_record_that_cannot_be_read_is_refused_by_name_and_stops_no_rotation(tmp_path, caplog, content):
    paths = [make(tmp_path, step) for step in range(1, 5)]
    (paths[2] / "checkpoint.json").write_bytes(content)
    with pytest.raises(UserError, match="step-00000003.*(damaged|version)"):
        catalogue.read_record(paths[2])
    (paths[3] / "checkpoint.json").write_bytes(catalogue.record_bytes({}, "fp32", None, {}, {"tp": 1}))
    assert catalogue.rotate_checkpoints(tmp_path, keep=(), known_sound={paths[3]}) == [paths[0]]
    with caplog.at_level(logging.WARNING):
        assert catalogue.newest_portable(tmp_path) == paths[1]
    assert "No run can go on from" in caplog.text


def test_rotation_clears_what_a_killed_process_left(tmp_path):
    make(tmp_path, 1)
    (tmp_path / "checkpoints" / "step-00000002.123.partial").mkdir()
    catalogue.rotate_checkpoints(tmp_path, keep=())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_rotation_keeps_the_newest_portable_one_besides(tmp_path):
    for step in range(1, 7):
        path = make(tmp_path, step)
        portable = step in (1, 3)
        (path / "checkpoint.json").write_bytes(catalogue.record_bytes({}, "fp32", None, {}, None if portable else {"tp": 1}))
        catalogue.seal(path, {name: files.sha256_file(path / name) for name in ("__0_0.distcp", "common.pt", "checkpoint.json")})
    catalogue.rotate_checkpoints(tmp_path, keep=())
    assert [step for step, _ in catalogue.list_checkpoints(tmp_path)] == [3, 5, 6]
    assert catalogue.newest_portable(tmp_path) == catalogue.checkpoint_path(tmp_path, 3)


def test_rotation_reads_no_checkpoint_twice(tmp_path, monkeypatch):
    for step in range(1, 4):
        make(tmp_path, step)
    known = set()
    catalogue.rotate_checkpoints(tmp_path, keep=(), known_sound=known)
    monkeypatch.setattr(catalogue, "verify_checkpoint", lambda path: pytest.fail(f"{path} is read again"))
    catalogue.rotate_checkpoints(tmp_path, keep=(), known_sound=known)
    assert [step for step, _ in catalogue.list_checkpoints(tmp_path)] == [2, 3]
