"""What `status` says of a submission and of the runs in it."""

import io
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import orjson
import pytest
from rich.console import Console

from megatron_exp.checkpoint.catalogue import MARKER, checkpoint_path
from megatron_exp.inspection.document import as_json
from megatron_exp.inspection.render import render
from megatron_exp.inspection.status import status
from megatron_exp.inspection.submission_status import submission_status
from megatron_exp.run_record import HEARTBEAT_NAME, METRICS_NAME, RECORD_NAME
from megatron_exp.submission import Submission, SubmittedStage

NOW = datetime(2030, 1, 1, 12, tzinfo=UTC)


def write_run(directory: Path, *, state: str = "running", step: int = 3, minutes_ago: float = 1, checkpoint: int | None = None) -> Path:
    then = (NOW - timedelta(minutes=minutes_ago)).isoformat()
    directory.mkdir(parents=True)
    config = {"geometry": {"steps": 10, "global_batch_size": 2, "sequence_length": 8}}
    record = {
        "schema_version": 1,
        "name": "toy",
        "baseline": False,
        "config": config,
        "state": state,
        "attempts": [{"attempt": 1, "begun": then}],
    }
    (directory / RECORD_NAME).write_bytes(orjson.dumps(record))
    lines = [
        orjson.dumps({"attempt": 1, "step": number, "loss": 1.0, "seconds": 2.0, "tokens_per_second": 8.0}) for number in range(1, step + 1)
    ]
    (directory / METRICS_NAME).write_bytes(b"".join(line + b"\n" for line in lines))
    beat = {"schema_version": 1, "attempt": 1, "step": step, "time": then, "host": "node7", "still_seconds": 1}
    (directory / HEARTBEAT_NAME).write_bytes(orjson.dumps(beat))
    if checkpoint is not None:
        checkpoint_path(directory, checkpoint).mkdir(parents=True)
        (checkpoint_path(directory, checkpoint) / MARKER).touch()
    old = (NOW - timedelta(days=1)).timestamp()
    os.utime(directory / METRICS_NAME, (old, old))
    return directory


@pytest.mark.parametrize(
    ("run", "state", "advice"),
    [
        ({}, "running", "Wait"),
        ({"minutes_ago": 60}, "lost", "Last seen on node7"),
        ({"state": "stopped"}, "stopped", "Start it again"),
        ({"state": "failed"}, "failed", "The log says why"),
        ({"step": 10, "state": "finished"}, "finished", "megatron-exp eval"),
        ({"step": 10}, "running", "Wait"),
        ({"step": 10, "minutes_ago": 60}, "lost", "Start it again"),
        ({"step": 10, "state": "failed"}, "failed", "The log says why"),
        ({"step": 10, "minutes_ago": 60, "checkpoint": 10}, "finished", "megatron-exp eval"),
    ],
)
def test_a_run_says_what_state_it_is_in_and_what_to_do(tmp_path, run, state, advice):
    found = status(write_run(tmp_path / "run", **run), NOW)
    assert found.state == state and advice in found.advice


def test_requeues_and_the_reason_of_a_stop_are_shown(tmp_path):
    run = write_run(tmp_path / "run", state="stopped")
    (run / "attempts.log").write_text("job=1 progress=a restart=0\njob=1 progress=b restart=1\njob=2 progress=b restart=0\n")
    (run / "stopped.txt").write_text("Job 2 stopped: two attempts in a row.\n")
    found = status(run, NOW)
    assert found.num_requeues == 1 and found.reason == "Job 2 stopped: two attempts in a row."
    assert "submit again" in found.advice


def write_submission(root: Path) -> Submission:
    stages = [
        SubmittedStage("plan", "items", "plan.sbatch", str(root / "logs/plan"), done=str(root / "manifest/manifest.json"), job="1"),
        SubmittedStage("train", "the run", "train.sbatch", str(root / "run"), run=str(root / "run"), job="2"),
        SubmittedStage("eval", "scores", "eval.sbatch", str(root / "logs/eval"), job="3"),
        SubmittedStage("report", "page", "report.sbatch", str(root / "logs/report"), done=str(root / "report.html"), job="4"),
    ]
    root.mkdir(exist_ok=True)
    submission = Submission(root, "toy", "2030-01-01", "f" * 32, tuple(stages))
    submission.write()
    return submission


def states(root: Path, jobs: dict[str, str]) -> list[str]:
    return [stage.state for stage in submission_status(root, jobs).stages]


def test_stages_are_told_by_their_results_then_by_slurm(tmp_path):
    assert (
        Submission.open(tmp_path) == write_submission(tmp_path) if (tmp_path / "submission.json").exists() else write_submission(tmp_path)
    )
    (tmp_path / "manifest").mkdir()
    (tmp_path / "manifest/manifest.json").touch()
    write_run(tmp_path / "run")
    waiting = {"2": "RUNNING", "3": "PENDING", "4": "PENDING"}
    assert states(tmp_path, waiting) == ["done", "running", "pending", "pending"]
    found = submission_status(tmp_path, waiting)
    assert "step 3 of 10" in found.stages[1].detail and "no checkpoint yet" in found.stages[1].detail
    assert states(tmp_path, {}) == ["done", "unknown", "unknown", "unknown"]
    assert states(tmp_path, {"4": "RUNNING"}) == ["done", "done", "done", "running"]
    (tmp_path / "report.html").touch()
    assert states(tmp_path, {}) == ["done"] * 4
    assert "Everything is done" in submission_status(tmp_path, {}).advice


def test_a_failed_stage_and_its_log_are_named(tmp_path):
    write_submission(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/stopped.txt").write_text("Job 2 (train) stopped: two attempts in a row made no new checkpoint.")
    found = submission_status(tmp_path, {"1": "COMPLETED", "2": "FAILED", "3": "CANCELLED"})
    assert [stage.state for stage in found.stages[:3]] == ["done", "stopped", "cancelled"]
    assert "The stage train ended" in found.advice and str(tmp_path / "logs/train") in found.advice
    shown = io.StringIO()
    Console(file=shown, width=200).print(render(found))
    assert "two attempts in a row" in shown.getvalue()
    assert orjson.loads(as_json("status", found))["answer"]["stages"][1]["state"] == "stopped"
