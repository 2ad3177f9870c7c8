"""Several processes on gloo give what one gives, and what transformers gives, in every kind of parallelism.

One group of processes serves all tests of its size: two in `make test`, four in `make test-slow`.
"""

import functools
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megatron_exp.checkpoint.convert import to_huggingface
from megatron_exp.checkpoint.convert_names import correspondences
from megatron_exp.checkpoint.saving import save_checkpoint
from megatron_exp.checkpoint.state import load_checkpoint
from megatron_exp.checkpoint.stored import StoredTensors
from megatron_exp.errors import UserError
from megatron_exp.model.presets import Z_LOSS_WEIGHT
from tests.model.test_olmo2 import build_pair
from tests.model.tiny import mask_of, running, same_weights, tiny_model, tokens_of, train
from tests.parallel.worker import KV_GROUPS, LAYERS, LAYOUTS, STEPS, model_of, short_run

ROOT = Path(__file__).parents[2]
SIZES = {"two": 2, "four": 4}
CASES = [
    pytest.param((group, name), id=name, marks=[pytest.mark.slow] if group == "four" else []) for group in LAYOUTS for name in LAYOUTS[group]
]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_group(directory: Path, group: str) -> None:
    size = SIZES[group]
    shared = {
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-W", "ignore", "-m", "tests.parallel.worker", str(directory), group]
    logs = [open(directory / f"{rank}.log", "w+b") for rank in range(size)]
    started = [
        subprocess.Popen(command, cwd=ROOT, env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=log, stderr=log)
        for rank, log in enumerate(logs)
    ]
    try:
        deadline = time.monotonic() + 600
        while None in (codes := [process.poll() for process in started]) and not any(codes) and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        for process in started:
            process.kill()
        for log in logs:
            log.close()
    assert codes == [0] * size, "".join((directory / f"{rank}.log").read_text()[-3000:] for rank in range(size))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def references(directory):
    """For each number of key heads: logits [S, V] of transformers, and its gradients by its names, from weights left as a checkpoint."""
    found = {}
    with running() as layout:
        for kv_groups in KV_GROUPS:
            model, reference = build_pair(layout, kv_groups, layers=LAYERS)
            save_checkpoint(directory / f"random-{kv_groups}", model, None, {})
            tokens, mask = tokens_of(0), mask_of(0)
            logits = reference(tokens[:, :-1]).logits
            losses = torch.nn.functional.cross_entropy(logits.mT, tokens[:, 1:], reduction="none")
            (((losses + Z_LOSS_WEIGHT * logits.logsumexp(-1).square()) * mask).sum() / mask.sum()).backward()
            gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
            found[kv_groups] = (logits[0].detach(), gradients, model.shape)
    return found


@pytest.fixture(scope="module")
def single(directory, references):
    """What this process measures alone."""
    with running() as layout:
        return short_run(layout, directory, "single")


@pytest.fixture(scope="module")
def measured(directory, single):
    """From a group of processes to what each rank measured, by layout; the group runs once."""

    @functools.cache
    def run(group):
        run_group(directory, group)
        return {name: [torch.load(directory / f"{name}.{rank}.pt", weights_only=False) for rank in range(SIZES[group])] for name in LAYOUTS[group]}

    return run


@pytest.fixture(params=CASES)
def case(request, measured, single):
    """A layout, each rank's measurements in it, and those of a single process."""
    group, name = request.param
    return name, measured(group)[name], single


@pytest.mark.parametrize("kv_groups", KV_GROUPS)
def test_logits_are_those_of_transformers(case, references, kv_groups):
    _, ranks, single = case
    expected = references[kv_groups][0]
    assert expected.std() > 0.5
    assert torch.allclose(single["logits"][kv_groups], expected, rtol=0, atol=1e-5)
    for rank in ranks:
        assert torch.allclose(rank["logits"][kv_groups], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kv_groups", KV_GROUPS)
def test_gradients_of_all_parameters_are_those_of_transformers(case, references, directory, kv_groups):
    name, _, _ = case
    _, expected, shape = references[kv_groups]
    stored = StoredTensors(directory / f"{name}-gradients-{kv_groups}")
    compared = set()
    for one in correspondences(shape):
        moment = next(key for key in stored.sizes if "exp_avg." in key and key.endswith(one.place.name))
        for theirs, gradient in one.split(stored.read(one.place._replace(name=moment))).items():
            assert (gradient - expected[theirs]).norm() <= 1e-3 * expected[theirs].norm(), theirs
            compared.add(theirs)
    assert compared == set(expected)


def test_losses_of_twenty_steps_and_gradient_norms_are_those_of_one_process(case):
    _, ranks, single = case
    assert len(single["losses"]) == 20
    for rank in ranks:
        assert rank["losses"] == pytest.approx(single["losses"], rel=1e-4)
        assert rank["z_losses"] == pytest.approx(single["z_losses"], rel=1e-3)
        assert rank["grad_norms"] == pytest.approx(single["grad_norms"], rel=5e-3)


def test_noise_is_bitwise_the_same_part_of_the_whole_on_every_rank(case):
    assert all(rank["noise"] for rank in case[1])


def test_sending_while_computing_changes_no_bit(case):
    assert all(rank["overlap"] for rank in case[1])


def test_continuations_are_those_of_one_process_on_every_rank(case):
    _, ranks, single = case
    for rank in ranks:
        assert (rank["greedy"] == single["greedy"]).all()
        assert (rank["sample"] == single["sample"]).all()


def test_scores_and_embedding_gradients_are_those_of_one_process_on_every_rank(case):
    _, ranks, single = case
    for rank in ranks:
        assert torch.allclose(rank["scores"].losses, single["scores"].losses, atol=1e-3)
        assert torch.equal(rank["scores"].most_likely, single["scores"].most_likely)
        assert torch.allclose(rank["next_logits"], single["next_logits"], atol=1e-3)
        assert (rank["gradients"] - single["gradients"]).norm() < 1e-2 * single["gradients"].norm()


def test_any_number_of_rows_is_scored_alike(case):
    for rank in case[1]:
        for rows, losses in zip((1, 3), rank["odd"], strict=False):
            assert torch.allclose(losses, rank["scores"].losses[:rows], atol=1e-5)
        assert (rank["odd"][2] - rank["gradients"][:3]).norm() < 1e-3 * rank["gradients"].norm()


def test_initial_weights_are_bitwise_those_of_one_process(case, directory):
    name, _, _ = case
    with running() as layout:
        loaded = tiny_model(layout, seed=1, kv_groups=2, layers=LAYERS)
        load_checkpoint(directory / f"{name}-initial", loaded, None)
        assert same_weights(loaded, tiny_model(layout, kv_groups=2, layers=LAYERS))


def test_a_checkpoint_of_any_layout_becomes_the_same_hugging_face_model(case, directory, tmp_path):
    name, _, _ = case
    for one in (name, "single"):
        to_huggingface(directory / f"{one}-initial", tmp_path / one)
    assert (tmp_path / name / "model.safetensors").read_bytes() == (tmp_path / "single" / "model.safetensors").read_bytes()


def test_resume_at_the_same_layout_is_bitwise(case):
    _, ranks, _ = case
    assert [rank["resume"] for rank in ranks] == [({"steps": len(STEPS)}, True, True)] * len(ranks)


def test_a_checkpoint_of_one_process_goes_on_in_any_layout(case):
    _, ranks, single = case
    for rank in ranks:
        assert rank["moved"] == pytest.approx(single["moved"], abs=1e-4)


def test_a_checkpoint_of_any_layout_goes_on_in_one_process(case, directory):
    name, ranks, _ = case
    with running() as layout:
        model, optimizer = model_of(layout, seed=1)
        load_checkpoint(directory / f"{name}-trained", model, optimizer)
        assert train(model, optimizer, [3], 2)[0].loss == pytest.approx(ranks[0]["moved"], abs=1e-4)


@pytest.mark.parametrize("name", LAYOUTS["two"])
def test_a_portable_checkpoint_of_two_tensor_ranks_loses_the_same_in_every_layout(measured, name):
    expected = measured("two")["tp2"][0]["going_on"]
    assert [rank["resharded"] for rank in measured("two")[name]] == pytest.approx([expected] * 2, abs=1e-6)


def test_a_portable_checkpoint_of_two_tensor_ranks_loses_the_same_in_one_process(measured, directory):
    expected = measured("two")["tp2"][0]["going_on"]
    with running() as layout:
        model, optimizer = model_of(layout, seed=1)
        load_checkpoint(directory / "tp2-trained", model, optimizer)
        assert train(model, optimizer, [3], 2)[0].loss == pytest.approx(expected, abs=1e-6)


def test_a_parallel_checkpoint_of_two_replicas_has_a_part_of_each_and_goes_on_in_one(measured, directory):
    expected = measured("two")["dp2"][0]["going_on"]
    parallel = directory / "dp2-parallel"
    one, other = sorted(path.stat().st_size for path in parallel.glob("*.distcp"))
    assert one > 0.4 * (one + other), "the replicas share the writing"
    with running() as layout:
        model, optimizer = model_of(layout, seed=1)
        load_checkpoint(parallel, model, optimizer)
        assert train(model, optimizer, [3], 2)[0].loss == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["dp2", "tp2"])
def test_a_parallel_checkpoint_becomes_the_same_hugging_face_model_as_a_portable_one(measured, directory, tmp_path, name):
    assert measured("two")[name]
    for form in ("parallel", "trained"):
        to_huggingface(directory / f"{name}-{form}", tmp_path / form)
    assert (tmp_path / "parallel/model.safetensors").read_bytes() == (tmp_path / "trained/model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["tp2", "pp2", "pp2-interleaved"])
def test_a_parallel_checkpoint_of_another_division_is_refused_but_its_weights_load(measured, directory, name):
    assert measured("two")[name]
    with running() as layout:
        with pytest.raises(UserError, match="loads only there"):
            load_checkpoint(directory / f"{name}-parallel", *model_of(layout))
        weights_alone, full = (tiny_model(layout, seed=seed, kv_groups=2, layers=LAYERS) for seed in (1, 2))
        load_checkpoint(directory / f"{name}-parallel", weights_alone, None)
        load_checkpoint(directory / f"{name}-trained", full, None)
        assert same_weights(weights_alone, full)
