"""Two processes: every one of them gets all answers, and they are those of one process."""

import contextlib
import multiprocessing
import os
import socket
from pathlib import Path

import numpy as np
import pytest

from megatron_exp.config.schema import ParallelConfig
from megatron_exp.scoring.engine import Scorer
from tests.model.tiny import running, tiny_model
from tests.scoring.test_engine import ask_everything

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.scoring.test_processes"])
LAYOUTS = {"dp2": ParallelConfig(), "tp2": ParallelConfig(tp=2)}


def answers(parallel=None):
    """Small batches, so that replicas have something to share."""
    with running(parallel) as layout:
        return ask_everything(Scorer(tiny_model(layout), max_tokens=48))


def worker(directory: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    for name, parallel in LAYOUTS.items():
        np.savez(directory / f"{name}-{environment['RANK']}.npz", *answers(parallel))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pair")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with contextlib.ExitStack() as stack:
        started = [CONTEXT.Process(target=worker, args=(directory, {**shared, "RANK": str(r), "LOCAL_RANK": str(r)})) for r in range(2)]
        for process in started:
            stack.callback(process.kill)
            process.start()
        for process in started:
            process.join(90)
        assert [process.exitcode for process in started] == [0, 0]
    return directory


@pytest.mark.parametrize("name", LAYOUTS)
def test_both_processes_get_the_answers_of_one(pair, name):
    first, second = (list(np.load(pair / f"{name}-{rank}.npz").values()) for rank in range(2))
    assert all((mine == theirs).all() for mine, theirs in zip(first, second, strict=True))
    for together, alone in zip(first, answers(), strict=True):
        assert together == pytest.approx(alone, rel=1e-4, abs=1e-5)


def test_answers_of_replicas_are_bitwise_those_of_one(pair):
    for together, alone in zip(np.load(pair / "dp2-0.npz").values(), answers(), strict=True):
        assert (together == alone).all()
