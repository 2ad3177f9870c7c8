"""How far a run is: steps, speed, time left, checkpoints, attempts, and what to do next."""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_exp.checkpoint.catalogue import is_finished, list_checkpoints
from megatron_exp.run_record import METRICS_NAME, History, RunRecord

_RECENT_STEPS = 50

_ALIVE_SECONDS = 180
"""A living attempt rewrites its heartbeat every 30 s; a busy file system may delay that."""

State = Literal["running", "finished", "stopped", "failed", "lost"]


@dataclass(frozen=True)
class RunStatus:
    """Where a run stands.

    step: updates done. tokens_per_second, seconds_left: from the median of the last 50 updates; None before the first one,
    seconds_left also when finished. last_checkpoint: step of the newest complete one. updated: when metrics were last written (UTC, ISO 8601).
    state: of the newest attempt; `lost` where the record says running and nobody has shown a sign of life. num_requeues: starts by SLURM after
    the first of each job. reason: why a job was not started again. advice: what to do next.
    """

    path: str
    name: str
    baseline: bool
    finished: bool
    step: int
    num_steps: int
    tokens: int
    loss: float | None
    validation_loss: float | None
    tokens_per_second: float | None
    seconds_left: float | None
    last_checkpoint: int | None
    num_attempts: int
    updated: str | None
    state: State
    num_requeues: int
    reason: str | None
    advice: str


def status(run_dir: Path, now: datetime | None = None) -> RunStatus:
    """Read the run's record, metrics and list of checkpoints; nothing is opened that training writes to. now: for tests."""
    run = RunRecord.open(run_dir)
    history = run.history()
    step = history.last_step
    seconds = _median_of_last(history, "seconds")
    checkpoints = list_checkpoints(run.path)
    metrics = run.path / METRICS_NAME
    updated = datetime.fromtimestamp(metrics.stat().st_mtime, UTC) if metrics.exists() else None
    finished = is_finished(run)
    state = "finished" if finished else _state(run, updated, now or datetime.now(UTC))
    reason = stop_reason(run.path)
    last_checkpoint = checkpoints[-1][0] if checkpoints else None
    return RunStatus(
        path=str(run.path),
        name=run.name,
        baseline=run.baseline,
        finished=finished,
        step=step,
        num_steps=run.num_steps,
        tokens=step * run.tokens_per_step,
        loss=_last(history, "loss"),
        validation_loss=_last(history, "validation_loss"),
        tokens_per_second=_median_of_last(history, "tokens_per_second"),
        seconds_left=None if seconds is None or finished else seconds * (run.num_steps - step),
        last_checkpoint=last_checkpoint,
        num_attempts=history.num_attempts,
        updated=updated.isoformat(timespec="seconds") if updated else None,
        state=state,
        num_requeues=num_requeues(run.path),
        reason=reason,
        advice=_advice(run, state, reason, last_checkpoint),
    )


def stop_reason(folder: Path) -> str | None:
    """Why the sbatch script did not start a job again, for the first of those in FOLDER that have a reason."""
    found = sorted(folder.glob("stopped*.txt"))
    return found[0].read_text(encoding="utf-8").strip() if found else None


def num_requeues(folder: Path) -> int:
    """Starts in FOLDER's attempts.log beyond the first of each job."""
    lines = [line for path in folder.glob("attempts*.log") for line in path.read_text(encoding="utf-8").splitlines()]
    return len(lines) - len({line.split()[0] for line in lines})


def _state(run: RunRecord, updated: datetime | None, now: datetime) -> State:
    recorded = run.record.get("state", "running")
    if recorded != "running":
        return recorded
    beat = run.heartbeat()
    signs = [datetime.fromisoformat(beat["time"])] if beat else []
    signs += [datetime.fromisoformat(run.record["attempts"][-1]["begun"])] if run.record.get("attempts") else []
    signs += [updated] if updated else []
    return "running" if signs and (now - max(signs)).total_seconds() <= _ALIVE_SECONDS else "lost"


def _advice(run: RunRecord, state: State, reason: str | None, last_checkpoint: int | None) -> str:
    where = "from the start" if last_checkpoint is None else f"from step {last_checkpoint}"
    if state == "finished":
        return "It is a twin: use it with --against." if run.baseline else f"megatron-exp eval {run.path} scores it."
    if reason:
        return f"Mend what the reason names, then submit again: it goes on {where}."
    beat = run.heartbeat()
    if state == "running":
        if beat and beat["still_seconds"] >= _ALIVE_SECONDS:
            return f"No step for {beat['still_seconds']} s: wait for the watchdog, or look into the log; rank 0 is on {beat['host']}."
        return "Wait."
    if state == "stopped":
        return f"Start it again with the same command (SLURM scripts do so themselves): it goes on {where}."
    if state == "failed":
        return f"The log says why. Then start it again with the same command: it goes on {where}."
    seen = f" Last seen on {beat['host']} at {beat['time']}." if beat else ""
    return f"Nobody is at work on it: killed, or its node was lost.{seen} Start it again with the same command: it goes on {where}."


def _last(history: History, key: str) -> float | None:
    series = history.series(key)
    return series.last if len(series) else None


def _median_of_last(history: History, key: str) -> float | None:
    series = history.series(key)
    return float(np.median(series.values[-_RECENT_STEPS:])) if len(series) else None
