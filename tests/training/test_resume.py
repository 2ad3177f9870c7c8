"""Stopping, going on, and refusing to mix two runs."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_exp.checkpoint.catalogue import checkpoint_path, list_checkpoints
from megatron_exp.errors import UserError
from megatron_exp.inspection.findings import is_sound
from megatron_exp.inspection.verify import verify
from megatron_exp.manifest.reader import Manifest
from megatron_exp.run_record import RunRecord
from megatron_exp.training.train import FINISHED, REQUEUE, train
from tests.training.compare import answers, losses, step_hashes, weights
from tests.training.processes import metrics
from tests.training.toy import STEPS, make_manifest


def assert_same_run(found: Path, whole: Path) -> None:
    assert weights(found) == weights(whole)
    assert step_hashes(found) == step_hashes(whole)
    assert losses(found) == losses(whole)
    assert answers(found) == answers(whole)


@pytest.fixture
def half_run(manifest: Path, run: Path) -> Path:
    """A run stopped in state 7, between two periodic checkpoints."""
    assert train(manifest, run, stop_at=7) == REQUEUE
    return run


def test_a_stopped_run_goes_on_bitwise_as_if_never_stopped(manifest: Path, half_run: Path, whole_run: Path) -> None:
    assert RunRecord.open(half_run).record["state"] == "stopped"
    assert list_checkpoints(half_run)[-1][0] == 7
    assert train(manifest, half_run) == FINISHED
    assert_same_run(half_run, whole_run)


def test_every_attempt_leaves_its_lines_and_its_entry(manifest: Path, half_run: Path) -> None:
    train(manifest, half_run, stop_at=9)
    train(manifest, half_run)
    updates = [(line["attempt"], line["step"]) for line in metrics(half_run) if "loss" in line]
    assert updates == [(1, state) for state in range(1, 8)] + [(2, 8), (2, 9)] + [(3, 10), (3, 11), (3, 12)]
    attempts = RunRecord.open(half_run).record["attempts"]
    assert [(one["attempt"], one["from_step"], one["state"]) for one in attempts] == [
        (1, 0, "stopped"),
        (2, 7, "stopped"),
        (3, 9, "finished"),
    ]


def test_a_damaged_newest_checkpoint_is_put_aside_and_the_one_before_is_used(manifest: Path, half_run: Path, whole_run: Path) -> None:
    file = next(checkpoint_path(half_run, 7).glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert train(manifest, half_run) == FINISHED
    assert RunRecord.open(half_run).record["attempts"][-1]["from_step"] == 4
    assert (half_run / "checkpoints" / "damaged-step-00000007").is_dir()
    assert_same_run(half_run, whole_run)


def test_a_checkpoint_that_lost_its_marker_is_put_aside_however_often(manifest: Path, half_run: Path, whole_run: Path) -> None:
    (checkpoint_path(half_run, 7) / "COMPLETE").unlink()
    assert train(manifest, half_run, stop_at=7) == REQUEUE
    (checkpoint_path(half_run, 7) / "COMPLETE").unlink()
    assert train(manifest, half_run) == FINISHED
    assert [attempt["from_step"] for attempt in RunRecord.open(half_run).record["attempts"]] == [0, 4, 4]
    assert all((half_run / "checkpoints" / name).is_dir() for name in ("damaged-step-00000007", "damaged-step-00000007-2"))
    assert_same_run(half_run, whole_run)


def test_without_any_sound_checkpoint_the_run_starts_again(manifest: Path, half_run: Path, whole_run: Path) -> None:
    shutil.rmtree(half_run / "checkpoints")
    assert train(manifest, half_run) == FINISHED
    assert_same_run(half_run, whole_run)


@pytest.mark.parametrize("name", [str, os.path.basename])
def test_a_named_checkpoint_is_resumed_in_a_new_directory(
    manifest: Path, whole_run: Path, run: Path, name: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(whole_run / "checkpoints")
    assert train(manifest, run, resume=name(checkpoint_path(whole_run, 8))) == FINISHED
    assert weights(run) == weights(whole_run)
    assert answers(run) == answers(whole_run)
    findings = verify(run)
    assert is_sound(findings) and ["steps 0 to 7 are in the directory" in finding.problem for finding in findings] == [True]


@pytest.mark.parametrize("name", ["corpus.json", "manifest.json", "notes.md", "x.partial", "ledger.bin"])
def test_a_directory_of_something_else_is_refused_and_left_as_it_is(manifest: Path, run: Path, name: str) -> None:
    run.mkdir()
    (run / name).write_text("mine")
    with pytest.raises(UserError, match=f"no run directory: it holds {name} and no run.json"):
        train(manifest, run)
    assert [(path.name, path.read_text()) for path in run.iterdir()] == [(name, "mine")]


def test_what_a_batch_script_and_a_killed_beginning_leave_behind_is_no_obstacle(manifest: Path, run: Path) -> None:
    (run / "logs").mkdir(parents=True)
    (run / "tensorboard").mkdir()
    for name in ("attempts.log", "attempts-3.log", "stopped.txt", "slurm-17.out", "heartbeat.json", "metrics.jsonl", "run.json.1a-7-b.partial"):
        (run / name).touch()
    assert train(manifest, run, stop_at=1) == REQUEUE
    assert (run / "attempts.log").exists() and not list(run.glob("*.partial"))


def test_a_file_is_no_run_directory_and_has_none_below_it(manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="file is a file"):
            train(manifest, out)


def test_an_older_checkpoint_is_refused_while_newer_ones_are_there(manifest: Path, half_run: Path) -> None:
    with pytest.raises(UserError, match="newer checkpoints.*step-00000007"):
        train(manifest, half_run, resume=str(checkpoint_path(half_run, 4)))


def test_what_a_killed_attempt_left_half_written_is_removed(manifest: Path, half_run: Path) -> None:
    left = half_run / "checkpoints" / "step-00000008.1234.partial"
    left.mkdir()
    (left / "__0_0.distcp").write_bytes(b"half")
    (half_run / "run.json.1234.partial").write_bytes(b"{")
    train(manifest, half_run)
    assert not list(half_run.rglob("*.partial"))


def test_another_manifest_is_refused_with_both_fingerprints(data: Path, manifest: Path, half_run: Path) -> None:
    other = make_manifest(data, "manifest-other", experiments=[])
    before = sorted(half_run.rglob("*"))
    there, here = Manifest.open(manifest).fingerprint[:12], Manifest.open(other).fingerprint[:12]
    with pytest.raises(UserError, match=rf"manifest \(there {there}, here {here}\)"):
        train(other, half_run)
    with pytest.raises(UserError, match=rf"manifest \(there {there}, here {here}\)"):
        train(other, half_run.parent / "new", resume=str(checkpoint_path(half_run, 7)))
    assert sorted(half_run.rglob("*")) == before
    assert not (half_run.parent / "new").exists()


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"baseline": True}, "data"),
        ({"masked": ["canaries"]}, "data"),
        ({"overrides": ["model.hidden=64"]}, "model"),
        ({"overrides": ["seeds.init=1"]}, "model"),
        ({"overrides": ["training.schedule.peak_lr=1e-3"]}, "training"),
    ],
)
def test_another_run_is_refused_in_the_same_directory(manifest: Path, half_run: Path, changes: dict[str, object], name: str) -> None:
    with pytest.raises(UserError, match=rf"differs in {name} \(there"):
        train(manifest, half_run, **changes)


def test_settings_that_change_no_weight_may_change_between_attempts(manifest: Path, half_run: Path, whole_run: Path) -> None:
    assert train(manifest, half_run, overrides=["training.checkpoint.every=1", "training.validation.every=2"]) == FINISHED
    assert weights(half_run) == weights(whole_run)


def test_never_refuses_a_directory_that_holds_the_run(manifest: Path, half_run: Path) -> None:
    with pytest.raises(UserError, match="--resume never"):
        train(manifest, half_run, resume="never")


def test_what_plan_has_fixed_cannot_be_set(manifest: Path, run: Path) -> None:
    for override in ("geometry.steps=20", "seeds.order=1", "experiments=[]", "pool.slots=2"):
        with pytest.raises(UserError, match="plan again"):
            train(manifest, run, overrides=[override])
    with pytest.raises(UserError, match="validation"):
        train(manifest, run, overrides=["training.validation.slots=5"])
    with pytest.raises(UserError, match="micro_batch_size"):
        train(manifest, run, overrides=["training.micro_batch_size=3"])
    with pytest.raises(UserError, match="keep holds 99, but the run has 12 steps"):
        train(manifest, run, overrides=["training.checkpoint.keep=[3, 99]"])
    assert not run.exists()


def test_checkpoints_of_kept_states_never_rotate(manifest: Path, run: Path) -> None:
    train(manifest, run, overrides=["training.checkpoint.every=2", "training.checkpoint.keep=[0, 3]"])
    assert [step for step, _ in list_checkpoints(run)] == [0, 3, 8, 10, STEPS]
