"""Starting processes loses neither exit codes nor signals."""

import multiprocessing
import signal
import sys
import time
from pathlib import Path

import pytest

from megatron_exp.training.launch import launch

WORKER = "tests.training.worker"


@pytest.mark.parametrize("code", [0, 2, 75])
def test_the_exit_code_of_the_workers_is_that_of_the_command(code: int) -> None:
    assert launch(["exit", str(code)], 2, WORKER) == code


def test_the_callers_signal_handlers_are_put_back() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    launch(["exit", "0"], 1, WORKER)
    assert [signal.getsignal(number) for number in numbers] == before


def _launch_and_exit(file: str) -> None:
    sys.exit(launch(["wait", file], 2, WORKER))


def test_a_stop_signal_reaches_the_workers_and_their_answer_comes_back(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    launcher = context.Process(target=_launch_and_exit, args=(str(tmp_path / "ready"),))
    launcher.start()
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    launcher.terminate()
    launcher.join(60)
    assert launcher.exitcode == 75
