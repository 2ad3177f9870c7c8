"""Whole runs in every layout feed the same slots, lose the same and answer probes the same. One pair of processes trains them all."""

from pathlib import Path
from typing import Any

import pytest

from megatron_exp.inspection.findings import is_sound
from megatron_exp.inspection.verify import verify
from megatron_exp.run_record import RunRecord
from megatron_exp.training.train import train
from tests.training.compare import answers, losses, step_hashes
from tests.training.processes import train_together
from tests.training.toy import make_manifest

ALONE = {"micro-batches of 1": ["micro_batch_size=1"], "micro-batches of 4": ["micro_batch_size=4"], "recomputed": ["recompute=full"]}
TOGETHER = {
    "tp2": ["parallel.tp=2"],
    "tp2-sp": ["parallel.tp=2", "parallel.sequence_parallel=true"],
    "pp2": ["parallel.pp=2"],
    "cp2": ["parallel.cp=2"],
    "dp2": ["micro_batch_size=1"],
    "dp2-large": ["micro_batch_size=2"],
}
FOUR = {
    "tp2-dp2": ["parallel.tp=2", "micro_batch_size=1"],
    "pp4": ["parallel.pp=4"],
    "pp2-interleaved-dp2": ["parallel.pp=2", "parallel.virtual=2", "micro_batch_size=1"],
}


def arguments(manifest: Path, run: Path, settings: list[str]) -> dict[str, Any]:
    rarely = ["training.checkpoint.every=100", *(f"training.{setting}" for setting in settings)]
    return {"manifest": manifest, "run_dir": run, "overrides": rarely}


def measured(run: Path, *keys: str) -> list[float]:
    return RunRecord.open(run).history().series(*keys).values.tolist()


def assert_same_run(run: Path, reference: Path) -> None:
    assert step_hashes(run) == step_hashes(reference)
    assert losses(run) == pytest.approx(losses(reference), rel=1e-4)
    assert answers(run) == pytest.approx(answers(reference), abs=1e-3)
    assert measured(run, "validation_loss") == pytest.approx(measured(reference, "validation_loss"), rel=1e-4)
    for key in [("norms", part) for part in ("input", "hidden", "output")] + [("layer_norms", layer) for layer in ("0", "1")]:
        assert measured(run, *key) == pytest.approx(measured(reference, *key), rel=1e-4)


@pytest.fixture(scope="module")
def pair(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a run of two processes for each layout."""
    directory = tmp_path_factory.mktemp("pair")
    runs = [arguments(manifest, directory / name, settings) for name, settings in TOGETHER.items()]
    assert train_together(2, several=runs) == [0, 0]
    return directory


@pytest.mark.parametrize("name", TOGETHER)
def test_two_processes_consume_lose_and_answer_the_same_as_one(pair: Path, whole_run: Path, name: str) -> None:
    assert_same_run(pair / name, whole_run)


@pytest.mark.parametrize("name", ALONE)
def test_one_process_does_so_whatever_goes_through_it_at_once(manifest: Path, whole_run: Path, run: Path, name: str) -> None:
    assert train(**arguments(manifest, run, ALONE[name])) == 0
    assert_same_run(run, whole_run)
    if name == "recomputed":  # the same sums in the same order
        assert losses(run) == losses(whole_run)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with runs of a model of four layers: `single`, and one of four processes for each layout."""
    directory = tmp_path_factory.mktemp("four")
    manifest = make_manifest(directory)
    deeper = ["training.checkpoint.every=100", "model.layers=4"]
    assert train(manifest, directory / "single", overrides=deeper) == 0
    runs = [arguments(manifest, directory / name, settings) for name, settings in FOUR.items()]
    for of_run in runs:
        of_run["overrides"].append("model.layers=4")
    assert train_together(4, several=runs) == [0, 0, 0, 0]
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_four_processes_consume_lose_and_answer_the_same_as_one(four: Path, name: str) -> None:
    assert_same_run(four / name, four / "single")
    assert is_sound(verify(four / name))


def test_what_runs_in_which_precision_and_layout_is_in_the_record(pair: Path) -> None:
    record = RunRecord.open(pair / "tp2-sp").record
    assert record["precision"]["products"]["mlp.down"] == record["precision"]["products"]["head"] == "fp32"
    assert (record["layout"]["tp"], record["layout"]["virtual"], record["layout"]["sequence_parallel"]) == (2, 1, True)


def test_speed_and_memory_are_measured_and_a_share_of_nothing_is_not(pair: Path) -> None:
    per_second, flops, memory = (measured(pair / "dp2", key) for key in ("tokens_per_second", "flops_per_second", "memory_bytes"))
    shape = RunRecord.open(pair / "dp2").record["model"]
    per_token = flops[0] * 2 / per_second[0]
    assert per_token == pytest.approx(flops[-1] * 2 / per_second[-1])
    assert 6 * shape["layers"] * shape["hidden"] ** 2 < per_token < 6 * shape["num_parameters"] * 2
    assert 1e7 < memory[-1] < 1e11
    assert measured(pair / "dp2", "mfu") == []
