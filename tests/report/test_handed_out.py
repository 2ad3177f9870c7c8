"""The report and the evaluation count what a controller really used, which the plan could not know."""

import orjson
import pyarrow as pa
import pytest

from megatron_exp.control.segments import handed_out, read_segments
from megatron_exp.evaluation.evaluate import evaluate
from megatron_exp.manifest.reader import Manifest
from megatron_exp.report.gather import gather
from megatron_exp.report.inserted import inserted_rows, interventions
from megatron_exp.training.train import train
from tests.control.facts import FACTS
from tests.training.toy import STEPS, make_manifest


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("handed-out")
    train(make_manifest(path, experiments=[{**FACTS, "target": 0.002}]), path / "run")
    return path / "run"


@pytest.fixture(scope="module")
def rows(run):
    segments = read_segments(run, Manifest.open(run.parent / "manifest").fingerprint)
    return pa.concat_tables([segment.rows for segment in segments]).to_pylist()


def test_the_report_counts_what_was_handed_out(run, rows):
    inputs = gather(run, None)
    (inserted,) = [row for row in inserted_rows(inputs) if row.condition == "inserted"]
    assert (inserted.copies, inserted.tokens) == (len(rows), sum(row["length"] for row in rows))
    assert inserted.slots == len({row["slot"] for row in rows})
    assert inserted.kinds == "tokens"
    assert interventions(inputs, "facts")["tokens"]["copies"] == len(rows) == inputs.insertions.num_rows


def test_results_name_the_budget_that_was_used(run, rows):
    evaluate(run)
    record = orjson.loads(next((run / "evals").glob("step-*/results.json")).read_bytes())
    assert record["experiments"]["facts"]["handed_out"] == {
        "decisions": 4,
        "copies": len(rows),
        "tokens": sum(row["length"] for row in rows),
    }


def test_what_was_handed_out_is_counted_up_to_a_state(run, rows):
    segments = read_segments(run, Manifest.open(run.parent / "manifest").fingerprint)
    for state in range(STEPS + 1):
        copies = sum(row["step"] < state for row in rows)
        assert handed_out(segments, state).get("facts", {"copies": 0})["copies"] == copies
