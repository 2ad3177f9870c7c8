"""What would make a reader distrust a run is looked for in one place, and said also where it was not looked for."""

import shutil

import orjson
import pytest

from megatron_exp.report.build import render
from megatron_exp.report.gather import gather
from megatron_exp.report.signatures import signatures
from tests.report.fabricated import STEPS, make_world, result_row, write_results
from tests.report.test_report import change_record


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("signatures"))


def changed(world, path, rows=(), alerts=(), command=()):
    run = shutil.copytree(world.run, path, ignore=shutil.ignore_patterns("evals"))
    attempts = [{"attempt": 1, "from_step": 0, "command": list(command)}]
    change_record(run, "run.json", attempts=attempts)
    (run / "alerts.jsonl").write_bytes(b"".join(orjson.dumps(alert) + b"\n" for alert in alerts))
    write_results(run, world.manifest, STEPS, [result_row(**row) for row in rows] or None)
    return gather(run, None)


def found(inputs):
    return {one.name: one for one in signatures(inputs, None)}


def alert(kind, step, message):
    return {"kind": kind, "step": step, "attempt": 1, "time": 0.0, "value": 9.0, "low": None, "high": 5.0, "message": message}


def test_alerts_are_listed_by_kind_and_no_more_than_a_reader_needs(world, tmp_path):
    spikes = [alert("loss_spike", step, f"in step {step} the loss was 9") for step in range(5)]
    inputs = changed(
        world, tmp_path / "run", alerts=[*spikes, alert("drift", 7, "the validation loss left the band")], command=["--against", "T"]
    )
    seen = found(inputs)
    assert seen["Training: spikes of the loss"].found == [f"in step {step} the loss was 9" for step in range(3)] + [
        "and 2 more in alerts.jsonl"
    ]
    assert seen["Training: drift out of the twin's band"].found == ["the validation loss left the band"]
    assert not seen["Training: standing still"].found and not seen["Training: standing still"].unknown


def test_what_could_not_be_looked_for_is_no_clean_bill(world, tmp_path):
    seen = found(changed(world, tmp_path / "run"))
    assert "--against" in seen["Training: drift out of the twin's band"].unknown and "--cpdt" in seen["Dependent experiments"].unknown
    page = render(changed(world, tmp_path / "other"), show_text=False)
    assert "Could not be looked for: Training: drift" in page


def test_a_failed_control_and_missing_scores_are_found(world, tmp_path):
    rows = [
        {"experiment": "memory", "outcome": "control:twin", "condition": "x16", "verdict": "control failed", "estimate": 0.9},
        {
            "experiment": "memory",
            "outcome": "auc",
            "condition": "x16",
            "primary": True,
            "verdict": "detected",
            "n": 60,
            "num_unscored": 40,
            "estimate": 0.9,
        },
        {
            "experiment": "swaps",
            "outcome": "late gain",
            "condition": "a",
            "primary": True,
            "verdict": "detected",
            "n": 99,
            "num_unscored": 1,
            "estimate": 0.9,
        },
    ]
    seen = found(changed(world, tmp_path / "run", rows))
    assert len(seen["Failed controls"].found) == 1 and "control:twin" in seen["Failed controls"].found[0]
    assert seen["Too little scored"].found == ["memory: auc, x16: 40.00% of 100 responses could not be scored"]
    assert "Failure signatures" in render(changed(world, tmp_path / "page", rows), show_text=False)
