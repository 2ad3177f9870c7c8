"""How far a run is: steps, speed, time left, checkpoints, attempts."""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from megatron_exp.checkpoint.catalogue import list_checkpoints
from megatron_exp.run_record import METRICS_NAME, History, RunRecord

_RECENT_STEPS = 50


@dataclass(frozen=True)
class RunStatus:
    """Where a run stands.

    step: updates done. tokens_per_second, seconds_left: from the median of the last 50 updates; None before the first one,
    seconds_left also when finished. last_checkpoint: step of the newest complete one. updated: when metrics were last written (UTC, ISO 8601).
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


def status(run_dir: Path) -> RunStatus:
    """Read the run's record, metrics and list of checkpoints; nothing is opened that training writes to."""
    run = RunRecord.open(run_dir)
    history = run.history()
    step = history.last_step
    seconds = _median_of_last(history, "seconds")
    checkpoints = list_checkpoints(run.path)
    metrics = run.path / METRICS_NAME
    return RunStatus(
        path=str(run.path),
        name=run.name,
        baseline=run.baseline,
        finished=step >= run.num_steps,
        step=step,
        num_steps=run.num_steps,
        tokens=step * run.tokens_per_step,
        loss=_last(history, "loss"),
        validation_loss=_last(history, "validation_loss"),
        tokens_per_second=_median_of_last(history, "tokens_per_second"),
        seconds_left=None if seconds is None or step >= run.num_steps else seconds * (run.num_steps - step),
        last_checkpoint=checkpoints[-1][0] if checkpoints else None,
        num_attempts=history.num_attempts,
        updated=datetime.fromtimestamp(metrics.stat().st_mtime, UTC).isoformat(timespec="seconds") if metrics.exists() else None,
    )


def _last(history: History, key: str) -> float | None:
    series = history.series(key)
    return series.last if len(series) else None


def _median_of_last(history: History, key: str) -> float | None:
    series = history.series(key)
    return float(np.median(series.values[-_RECENT_STEPS:])) if len(series) else None
