"""The first screen: what was done, how much of the data it touched, what it cost the model, and the verdicts."""

from dataclasses import dataclass

import numpy as np

from megatron_exp.display.numbers import count, measured, percent, signed
from megatron_exp.manifest.rewritten import rewritten
from megatron_exp.report.effects import Row, natural
from megatron_exp.report.gather import Inputs

_SMALL_TOKENS = 2e9  # far below the 210B tokens of the run in which 1.8% was tested
_LOSS_TAIL = 0.05
_VERDICT_CLASSES = {
    "detected": "yes",
    "not detected": "no",
    "equivalent to none": "none",
    "not scorable": "unknown",
    "control failed": "failed",
    "dependent": "failed",
    "independent": "none",
    "undecided": "no",
    "above zero": "yes",
}


@dataclass(frozen=True)
class KeyFigure:
    """One number of the first screen: what it is, the number, and the sentence that makes it precise."""

    name: str
    value: str
    note: str


def key_figures(inputs: Inputs) -> list[KeyFigure]:
    """Tokens, modified fractions, copies per million tokens, loss gap to the twin."""
    geometry = inputs.manifest.geometry
    planned = rewritten(inputs.insertions, geometry)
    trained = inputs.last_step * inputs.run.tokens_per_step
    copies = inputs.insertions.num_rows
    return [
        KeyFigure(
            "Tokens trained",
            count(trained),
            f"{count(inputs.last_step)} of {count(inputs.run.num_steps)} updates of {count(inputs.run.tokens_per_step)} tokens",
        ),
        KeyFigure(
            "Modified tokens",
            percent(planned.tokens / geometry.num_tokens),
            f"{count(planned.tokens)} of {count(geometry.num_tokens)} tokens in the plan",
        ),
        KeyFigure(
            "Touched slots",
            percent(planned.slots / geometry.num_slots),
            f"{count(planned.slots)} of {count(geometry.num_slots)} training samples hold at least one insertion",
        ),
        KeyFigure(
            "Copies per million tokens",
            _rate(copies / geometry.num_tokens * 1e6),
            f"{count(copies)} insertions planned in {count(geometry.num_tokens)} tokens",
        ),
        _loss_gap(inputs),
    ]


def _rate(number: float) -> str:
    return count(number) if number >= 1000 else measured(number)


def _loss_gap(inputs: Inputs) -> KeyFigure:
    name = "Loss gap to the twin"
    if inputs.twin is None:
        return KeyFigure(name, "–", "no twin was given (--against)")
    gap = inputs.history.series("validation_loss").minus(inputs.twin_history.series("validation_loss"))
    if len(gap):
        return KeyFigure(name, signed(gap.last), f"nats per token on validation data after {count(int(gap.steps[-1]))} updates, run − twin")
    gap = inputs.history.series("loss").minus(inputs.twin_history.series("loss"))
    if not len(gap):
        return KeyFigure(name, "–", "run and twin have no state in common")
    tail = max(1, round(_LOSS_TAIL * len(gap)))
    return KeyFigure(
        name,
        signed(float(np.mean(gap.values[-tail:]))),
        f"nats per token, mean training loss of the last {tail} common updates, run − twin",
    )


def primary_rows(rows: list[Row]) -> list[Row]:
    """The rows that carry an experiment's primary verdicts; where nothing was tested yet, each primary outcome in its latest state."""
    primary = [row for row in rows if row["primary"] and not row["exploratory"]]
    latest: dict[tuple[str, str], Row] = {}
    for row in sorted(primary, key=lambda row: row["step"]):
        latest[row["outcome"], row["condition"]] = row
    tested = [row for row in primary if row["verdict"]]
    return sorted(tested or latest.values(), key=lambda row: (natural(row["outcome"]), natural(row["condition"]), row["step"]))


def verdict_kind(verdict: str | None) -> str:
    """CSS class of a verdict; verdicts may carry a reason after a colon."""
    return _VERDICT_CLASSES.get((verdict or "").split(":")[0].split("(")[0].strip(), "unknown")


def scale_note(inputs: Inputs) -> str | None:
    """What a small run can and cannot show."""
    num_tokens = inputs.manifest.geometry.num_tokens
    if num_tokens >= _SMALL_TOKENS:
        return None
    share = rewritten(inputs.insertions, inputs.manifest.geometry).tokens / num_tokens
    return (
        f"This is a small run: {count(num_tokens)} tokens, of which {percent(share)} are modified. "
        "This scale shows the machinery and dense effects. It does not show that experiments are independent of one another at 1.8% "
        "modified tokens: that claim needs a run of full size or the dependence test."
    )
