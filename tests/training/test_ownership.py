"""One `train` per run directory: a living owner is respected, a dead one is not waited for, and a displaced one writes no more."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import orjson
import pytest

from megatron_exp.errors import UserError
from megatron_exp.files import write_file
from megatron_exp.training import ownership
from megatron_exp.training.ownership import OWNER_NAME, Ownership, refuse_if_owned


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "BEAT_SECONDS", 0.05)


def change(directory: Path, **values: object) -> None:
    path = directory / OWNER_NAME
    write_file(path, orjson.dumps(orjson.loads(path.read_bytes()) | values))


def claimed_by_a_process_that(directory: Path, ending: str) -> subprocess.Popen[bytes]:
    script = f"from pathlib import Path; from megatron_exp.training.ownership import Ownership; Ownership(Path({str(directory)!r}), 1); {ending}"
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)


def test_an_unowned_or_released_directory_is_free(tmp_path: Path) -> None:
    refuse_if_owned(tmp_path / "new")
    Ownership(tmp_path, 1).release()
    refuse_if_owned(tmp_path)


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
    Ownership(tmp_path, 1).release()
    change(tmp_path, machine="another", state="training")
    beats = threading.Timer(0.02, lambda: change(tmp_path, beat=1))
    beats.start()
    with pytest.raises(UserError, match="Two at a time"):
        refuse_if_owned(tmp_path)
    beats.join()


def test_an_owner_on_another_machine_without_a_sign_of_life_is_taken_for_dead(tmp_path: Path) -> None:
    Ownership(tmp_path, 1).release()
    change(tmp_path, machine="another", state="training")
    refuse_if_owned(tmp_path)


def test_of_two_that_claim_at_once_only_the_last_goes_on(tmp_path: Path) -> None:
    first = Ownership(tmp_path, 1)
    second = Ownership(tmp_path, 1)
    second.require()
    with pytest.raises(UserError, match="was taken over by process"):
        first.require()
    first.release()
    second.require()
    assert orjson.loads((tmp_path / OWNER_NAME).read_bytes())["state"] == "training", "a displaced owner leaves the file alone"
    second.release()


def test_a_living_owner_beats(tmp_path: Path) -> None:
    owner = Ownership(tmp_path, 1)
    before = orjson.loads((tmp_path / OWNER_NAME).read_bytes())["beat"]
    for _ in range(200):
        if orjson.loads((tmp_path / OWNER_NAME).read_bytes())["beat"] > before:
            break
        threading.Event().wait(0.02)
    assert orjson.loads((tmp_path / OWNER_NAME).read_bytes())["beat"] > before
    owner.release()
