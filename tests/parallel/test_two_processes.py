"""Two processes on gloo give what one process gives, in every kind of parallelism. One pair of processes serves all tests."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megatron_exp.checkpoint.convert import to_huggingface
from megatron_exp.checkpoint.state import load_checkpoint
from tests.model.tiny import running, same_weights, tiny_model, train, trainable
from tests.parallel.worker import LAYOUTS, short_run

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_pair(directory: Path) -> None:
    shared = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-W", "ignore", "-m", "tests.parallel.worker", str(directory)]
    logs = [open(directory / f"{rank}.log", "w+b") for rank in range(2)]
    started = [
        subprocess.Popen(command, cwd=ROOT, env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=log, stderr=log)
        for rank, log in enumerate(logs)
    ]
    try:
        deadline = time.monotonic() + 300
        while None in (codes := [process.poll() for process in started]) and not any(codes) and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        for process in started:
            process.kill()
        for log in logs:
            log.close()
    assert codes == [0, 0], "".join((directory / f"{rank}.log").read_text()[-3000:] for rank in range(2))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Name of a layout to what both ranks measured; `single` is this process alone."""
    directory = tmp_path_factory.mktemp("layouts")
    with running() as layout:
        single = short_run(layout, directory, "single")
    run_pair(directory)
    measured = {name: [torch.load(directory / f"{name}.{rank}.pt", weights_only=False) for rank in range(2)] for name in LAYOUTS}
    return {**measured, "single": single, "directory": directory}


@pytest.fixture(params=list(LAYOUTS))
def pair(request, results):
    """Each rank's measurements in a layout, and those of a single process."""
    return request.param, results[request.param], results["single"]


def test_losses_and_gradient_norms_are_those_of_one_process(pair):
    _, ranks, single = pair
    for rank in ranks:
        assert rank["losses"] == pytest.approx(single["losses"], abs=1e-4)
        assert rank["z_losses"] == pytest.approx(single["z_losses"], rel=1e-4)
        assert rank["grad_norms"] == pytest.approx(single["grad_norms"], rel=1e-3)


def test_scores_and_embedding_gradients_are_those_of_one_process_on_every_rank(pair):
    _, ranks, single = pair
    for rank in ranks:
        assert torch.allclose(rank["scores"].losses, single["scores"].losses, atol=1e-3)
        assert torch.equal(rank["scores"].most_likely, single["scores"].most_likely)
        assert torch.allclose(rank["next_logits"], single["next_logits"], atol=1e-3)
        assert (rank["gradients"] - single["gradients"]).norm() < 1e-2 * single["gradients"].norm()


def test_initial_weights_are_bitwise_those_of_one_process(pair, results):
    name, _, _ = pair
    with running() as layout:
        loaded = tiny_model(layout, seed=1, kv_groups=2)
        load_checkpoint(results["directory"] / f"{name}-initial", loaded, None)
        assert same_weights(loaded, tiny_model(layout, kv_groups=2))


def test_a_checkpoint_of_any_layout_becomes_the_same_hugging_face_model(pair, results, tmp_path):
    name, _, _ = pair
    for one in (name, "single"):
        to_huggingface(results["directory"] / f"{one}-initial", tmp_path / one)
    assert (tmp_path / name / "model.safetensors").read_bytes() == (tmp_path / "single" / "model.safetensors").read_bytes()


def test_resume_at_the_same_layout_is_bitwise(pair):
    _, ranks, _ = pair
    assert [rank["resume"] for rank in ranks] == [({"steps": 3}, True, True)] * 2


def test_a_checkpoint_of_one_process_goes_on_in_any_layout(pair):
    _, ranks, single = pair
    for rank in ranks:
        assert rank["moved"] == pytest.approx(single["moved"], abs=1e-4)


def test_a_checkpoint_of_any_layout_goes_on_in_one_process(pair, results):
    name, ranks, _ = pair
    with running() as layout:
        model, optimizer = trainable(layout, seed=1, kv_groups=2)
        load_checkpoint(results["directory"] / f"{name}-trained", model, optimizer)
        assert train(model, optimizer, [3])[0].loss == pytest.approx(ranks[0]["moved"], abs=1e-4)
