"""One `train` per run directory: a living owner is respected, a dead one is not waited for, and a displaced one writes no more."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest

from megatron_exp.errors import InterruptedRunError, UserError
from megatron_exp.files import write_file
from megatron_exp.ledger import read_ledger
from megatron_exp.run_record import RECORD_NAME
from megatron_exp.training import ownership
from megatron_exp.training import train as trainer
from megatron_exp.training.hooks.ledger import LEDGER_NAME, LedgerHook
from megatron_exp.training.hooks.owner import OwnerHook
from megatron_exp.training.ownership import OWNER_NAME, Ownership, refuse_if_owned
from tests.training.processes import training


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "BEAT_SECONDS", 0.05)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def change(directory: Path, **values: object) -> None:
    path = directory / OWNER_NAME
    write_file(path, orjson.dumps(orjson.loads(path.read_bytes()) | values))


def claimed_by_a_process_that(directory: Path, ending: str) -> subprocess.Popen[bytes]:
    script = f"from pathlib import Path; from megatron_exp.training.ownership import Ownership; Ownership(Path({str(directory)!r})).claim(1); {ending}"
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)


def claimed(directory: Path) -> Ownership:
    owner = Ownership(directory)
    owner.claim(1)
    return owner


def left_by_another_machine(directory: Path, **values: object) -> None:
    """owner.json as a living process elsewhere has it, or one that was killed."""
    owner = claimed(directory)
    record = (directory / OWNER_NAME).read_bytes()
    owner.release()
    (directory / OWNER_NAME).write_bytes(record)
    change(directory, machine="another", **values)


def test_an_unowned_or_released_directory_is_free(tmp_path: Path) -> None:
    refuse_if_owned(tmp_path / "new")
    claimed(tmp_path).release()
    refuse_if_owned(tmp_path)


def test_a_claim_that_came_to_nothing_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such model"), Ownership(tmp_path / "new") as owner:
        owner.claim(1)
        raise UserError("no such model")
    with Ownership(tmp_path) as owner:
        owner.claim(1)
    assert list(tmp_path.iterdir()) == []


def test_a_claim_that_the_disk_refuses_is_that_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(ownership, "write_file", full)
    with pytest.raises(OSError, match="No space left"), Ownership(tmp_path / "new") as owner:
        owner.claim(1)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_the_release_does_not_hide_why_the_run_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    with pytest.raises(InterruptedRunError, match="the disk failed"), Ownership(tmp_path) as owner:
        owner.claim(1)
        monkeypatch.setattr(Path, "unlink", read_only)
        raise InterruptedRunError("the disk failed")


def test_a_displaced_attempt_leaves_the_record_to_the_other(manifest: Path, run: Path) -> None:
    found = []

    class TakeOver(OwnerHook):
        """Another attempt claims the directory after step 2 and has entered nothing yet."""

        def on_step(self, run: Any) -> None:
            if run.step == 2:
                found.append((run.plan.directory / RECORD_NAME).read_bytes())
                claimed(run.plan.directory)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="was taken over"):
        patch.setattr(trainer, "OwnerHook", TakeOver)
        trainer.train(manifest, run)
    assert (run / RECORD_NAME).read_bytes() == found[0]


def test_a_living_process_of_this_machine_is_refused_and_a_killed_one_is_not_waited_for(tmp_path: Path) -> None:
    process = claimed_by_a_process_that(tmp_path, "print(flush=True); import time; time.sleep(100)")
    assert process.stdout
    process.stdout.readline()
    with pytest.raises(UserError, match=f"trained into by process {process.pid} on .*attempt 1"):
        refuse_if_owned(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    refuse_if_owned(tmp_path)


def test_an_owner_on_another_machine_is_refused_while_it_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "BEAT_SECONDS", 5.0)
    left_by_another_machine(tmp_path)
    beats = threading.Timer(0.02, lambda: change(tmp_path, beat=1))
    beats.start()
    with pytest.raises(UserError, match="Two at a time"):
        refuse_if_owned(tmp_path)
    beats.join()


def test_an_owner_on_another_machine_without_a_sign_of_life_is_taken_for_dead(tmp_path: Path) -> None:
    left_by_another_machine(tmp_path)
    refuse_if_owned(tmp_path)


def test_of_two_that_claim_at_once_only_the_last_goes_on(tmp_path: Path) -> None:
    first, second = claimed(tmp_path), claimed(tmp_path)
    second.require()
    with pytest.raises(UserError, match="was taken over by process"):
        first.require()
    first.release()
    second.require()
    assert (tmp_path / OWNER_NAME).exists(), "a displaced owner leaves the file alone"
    second.release()


def test_a_living_owner_beats(tmp_path: Path) -> None:
    owner = claimed(tmp_path)
    before = orjson.loads((tmp_path / OWNER_NAME).read_bytes())["beat"]
    for _ in range(200):
        if orjson.loads((tmp_path / OWNER_NAME).read_bytes())["beat"] > before:
            break
        threading.Event().wait(0.02)
    assert orjson.loads((tmp_path / OWNER_NAME).read_bytes())["beat"] > before
    owner.release()


def test_a_job_started_again_takes_over_from_its_own_start_on_a_lost_node_as_a_later_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "_is_alive", lambda directory, found: True)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    lost = claimed(tmp_path)
    with pytest.raises(UserError, match="Two at a time"):
        refuse_if_owned(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    refuse_if_owned(tmp_path)
    assert Ownership(tmp_path).claim(1) == 2
    with pytest.raises(UserError, match="was taken over by process"):
        lost.require()


def test_another_job_takes_nothing_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "_is_alive", lambda directory, found: True)
    claimed(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    for job in ("7", "8"):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        with pytest.raises(UserError, match="Two at a time"):
            refuse_if_owned(tmp_path)
        change(tmp_path, job="7", restart=0)


def test_a_displaced_attempt_writes_no_step_into_the_ledger(tmp_path: Path) -> None:
    displaced = claimed(tmp_path)
    run = SimpleNamespace(layout=SimpleNamespace(world_size=1, dp_size=1, is_main=True), plan=SimpleNamespace(directory=tmp_path))
    hook = LedgerHook(displaced)
    hook.on_start(run, None)
    claimed(tmp_path).release()
    hook._waiting = [(0, {0: 1})]
    with pytest.raises(UserError, match="was taken over"):
        hook.on_end(run)
    assert len(read_ledger(tmp_path / LEDGER_NAME).records) == 0


def wait_in_assemble() -> None:
    trainer.assemble = lambda *arguments: time.sleep(100)


def test_a_second_start_is_refused_while_the_first_still_loads_and_a_failed_loading_frees_the_directory(
    manifest: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with training(prepare=wait_in_assemble, manifest=manifest, run_dir=run) as first:
        while not (run / OWNER_NAME).exists():
            assert first.is_alive()
            time.sleep(0.01)
        with pytest.raises(UserError, match=f"trained into by process {first.pid} .*attempt 1"):
            trainer.train(manifest, run)

    def fail(*arguments: object) -> None:
        assert (run / OWNER_NAME).exists()
        raise UserError("no such model")

    with monkeypatch.context() as patched, pytest.raises(UserError, match="no such model"):
        patched.setattr(trainer, "assemble", fail)
        trainer.train(manifest, run)
    assert not (run / OWNER_NAME).exists()
