"""How far a submission is: every stage with its job, and how far the runs among them are."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_exp.display.numbers import count, duration
from megatron_exp.inspection.status import RunStatus, num_requeues, status, stop_reason
from megatron_exp.run_record import RECORD_NAME as RUN_RECORD
from megatron_exp.submission import Submission, SubmittedStage

_FAILED = ("failed", "timeout", "node_fail", "out_of_memory", "cancelled", "boot_fail", "deadline", "stopped")


@dataclass(frozen=True)
class StageStatus:
    """One stage. state: `done`, `stopped` (not started again, for a reason), SLURM's state in small letters, or `unknown` where SLURM has forgotten the job.

    detail: how far, or why it ended. run: of a stage that trains and has begun.
    """

    name: str
    job: str | None
    state: str
    num_requeues: int
    detail: str
    run: RunStatus | None


@dataclass(frozen=True)
class SubmissionStatus:
    """All stages in order, and what to do next."""

    path: str
    name: str
    stages: tuple[StageStatus, ...]
    advice: str


def submission_status(root: Path, job_states: Mapping[str, str]) -> SubmissionStatus:
    """Read what the stages have left behind; `job_states`: job number to SLURM's state, of the jobs that it still knows."""
    submission = Submission.open(root)
    stages = [_stage(stage, job_states) for stage in submission.stages]
    furthest = max((index for index, stage in enumerate(stages) if stage.state in ("done", "running", "completing")), default=-1)
    # A stage is only begun when those before it have ended well; SLURM soon forgets those.
    shown = tuple(_as_done(stage) if index < furthest else stage for index, stage in enumerate(stages))
    return SubmissionStatus(str(root), submission.name, shown, _advice(root, shown))


def _stage(stage: SubmittedStage, job_states: Mapping[str, str]) -> StageStatus:
    folder = Path(stage.folder)
    run = status(Path(stage.run)) if stage.run and (Path(stage.run) / RUN_RECORD).is_file() else None
    reason = stop_reason(folder)
    if (stage.done and Path(stage.done).exists()) or (run and run.finished):
        state = "done"
    elif reason:
        state = "stopped"
    else:
        state = job_states.get(stage.job or "", "unknown").lower()
        state = "done" if state == "completed" else state
    return StageStatus(stage.name, stage.job, state, num_requeues(folder), _detail(stage, state, run, reason), run)


def _as_done(stage: StageStatus) -> StageStatus:
    return StageStatus(stage.name, stage.job, "done", stage.num_requeues, stage.detail, stage.run)


def _detail(stage: SubmittedStage, state: str, run: RunStatus | None, reason: str | None) -> str:
    if reason and state != "done":
        return reason
    if run is None or run.finished:
        return "" if state == "done" else stage.purpose
    checkpoint = "no checkpoint yet" if run.last_checkpoint is None else f"checkpoint {run.last_checkpoint}"
    speed = f"{count(run.tokens_per_second)} tokens/s, {duration(run.seconds_left)} left"
    return f"step {run.step} of {run.num_steps}, {speed}, {checkpoint}"


def _advice(root: Path, stages: tuple[StageStatus, ...]) -> str:
    again = "then the same `megatron-exp submit` again: what is done is not repeated."
    if all(stage.state == "done" for stage in stages):
        return f"Everything is done: {root / 'report.html'}"
    failed = next((stage for stage in stages if stage.state in _FAILED), None)
    if failed:
        return f"The stage {failed.name} ended ({failed.state}): look into {root / 'logs' / failed.name}, {again}"
    current = next(stage for stage in stages if stage.state != "done")
    if current.state == "unknown":
        return (
            f"SLURM knows no job of the stage {current.name}: if squeue is at hand here, look into {root / 'logs' / current.name}, {again}"
        )
    if current.run and current.run.state in ("lost", "failed") and current.state == "running":
        return f"The stage {current.name}: {current.run.advice}"
    return f"Wait: the stage {current.name} is {current.state}."
