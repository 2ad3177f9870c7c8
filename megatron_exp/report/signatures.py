"""Failure signatures: what would make a reader distrust the run as a whole, looked for in one place and listed also where nothing was found."""

from collections import Counter
from dataclasses import dataclass

from megatron_exp.display.numbers import count, counted, percent
from megatron_exp.report.dependence import DependenceSection
from megatron_exp.report.gather import Inputs

_MOST_MESSAGES = 3
_UNSCORED_SHARE = 0.2
_KINDS = {
    "not_finite": "a loss or gradient that is no number",
    "loss_spike": "spikes of the loss",
    "gradient_spike": "spikes of the gradient norm",
    "drift": "drift out of the twin's band",
    "data_wait": "waiting for data",
    "stall": "standing still",
}


@dataclass(frozen=True)
class Signature:
    """name: what was looked for. found: sentences, empty where nothing was. unknown: why it could not be looked for, or ""."""

    name: str
    found: list[str]
    unknown: str = ""


def signatures(inputs: Inputs, dependence: DependenceSection | None) -> list[Signature]:
    """Every signature, found or not."""
    rows = inputs.results.table.to_pylist()
    not_evaluated = "" if inputs.results.file else "the run has not been evaluated"
    return [
        *_alerts(inputs),
        Signature("Failed controls", _failed_controls(rows), not_evaluated),
        Signature("Too little scored", _unscored(rows), not_evaluated),
        Signature("Dependent experiments", _dependent(dependence), "" if dependence else "no dependence test was given (--cpdt)"),
    ]


def _alerts(inputs: Inputs) -> list[Signature]:
    """Alerts of the trainer by kind; the planned exceptions of experiments are none."""
    alerts = inputs.run.alerts()
    numbers = Counter(alert["kind"] for alert in alerts)
    found = []
    for kind, meaning in _KINDS.items():
        mine = [alert["message"] for alert in alerts if alert["kind"] == kind]
        more = [f"and {count(len(mine) - _MOST_MESSAGES)} more in alerts.jsonl"] if len(mine) > _MOST_MESSAGES else []
        unknown = "the run was not trained against a twin (train --against)" if kind == "drift" and not _watched_drift(inputs) else ""
        found.append(Signature(f"Training: {meaning}", [*mine[:_MOST_MESSAGES], *more], "" if mine else unknown))
    others = {kind: number for kind, number in numbers.items() if kind not in _KINDS}
    return [*found, *(Signature(f"Training: {kind}", [counted(number, "alert")]) for kind, number in sorted(others.items()))]


def _watched_drift(inputs: Inputs) -> bool:
    """Whether the trainer compared the run with a twin: `--against` stands in the command of an attempt."""
    commands = [attempt.get("command") or [] for attempt in inputs.run.record.get("attempts", [])]
    return any(str(part).startswith("--against") for command in commands for part in command)


def _failed_controls(rows: list[dict]) -> list[str]:
    return [
        f"{row['experiment']}: {row['outcome']}, {row['condition']} (state {row['step']})"
        for row in rows
        if row["outcome"].startswith("control:") and row["verdict"] == "control failed"
    ]


def _unscored(rows: list[dict]) -> list[str]:
    found = []
    for row in rows:
        total = row["n"] + row["num_unscored"]
        if row["primary"] and row["verdict"] and total and row["num_unscored"] > _UNSCORED_SHARE * total:
            share = percent(row["num_unscored"] / total)
            found.append(
                f"{row['experiment']}: {row['outcome']}, {row['condition']}: {share} of {count(total)} responses could not be scored"
            )
    return found


def _dependent(dependence: DependenceSection | None) -> list[str]:
    if dependence is None:
        return []
    pairs = [f"{cell['row']} on {cell['column']}" for cell in dependence.comparisons if cell["verdict"] == "dependent"]
    return pairs + ([] if dependence.complete else ["the test is incomplete"])
