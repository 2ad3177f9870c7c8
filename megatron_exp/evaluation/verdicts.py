"""What the numbers of an experiment say, as pure functions of scores and pre-registered outcomes.

Per tested row, the first that holds:

    control failed       a check on what no insertion can have changed (an outcome named `control:...`) has p < 0.001
    not scorable         nothing could be estimated; the reason follows a colon. Never a zero
    detected             p, corrected within the outcome's family, is below 1 - level
    equivalent to none   the interval of the effect lies inside the pre-registered margin
    not detected         else; the smallest detectable effect says how much that means

Rows that are not tested (descriptive outcomes, other states than the pre-registered one, values printed without a test) have none.
"""

import math
from collections.abc import Sequence

from megatron_exp.experiments.protocol import Outcome, Score

DETECTED = "detected"
NOT_DETECTED = "not detected"
EQUIVALENT = "equivalent to none"
NOT_SCORABLE = "not scorable"
CONTROL_FAILED = "control failed"

CONTROL_PREFIX = "control:"
"""Begins the name of an outcome that must show nothing."""
CONTROL_ALPHA = 0.001
"""A control below this p has failed: strict, since a false alarm discards an experiment's results."""


def is_tested(score: Score, outcome: Outcome | None, state: int) -> bool:
    """Whether a row belongs to its outcome's family: a pre-registered test, in the pre-registered state, done or not scorable.

    Args:
        score: the row.
        outcome: its pre-registered outcome, None where the name was never registered.
        state: what "final" means in this evaluation.
    """
    if outcome is None or outcome.family == "descriptive" or score.exploratory:
        return False
    return score.step == tested_state(outcome, state) and (bool(score.reason) or not math.isnan(score.p))


def tested_state(outcome: Outcome, state: int) -> int:
    """The model state an outcome is tested in."""
    return state if outcome.state == "final" else int(outcome.state)


def control_failed(scores: Sequence[Score]) -> bool:
    """Whether any check of an experiment shows an effect where none can be."""
    return any(score.outcome.startswith(CONTROL_PREFIX) and score.p < CONTROL_ALPHA for score in scores)


def row_verdict(score: Score, outcome: Outcome, p_corrected: float, *, failed: bool) -> str:
    """The verdict of one tested row; `failed`: whether a control of its experiment failed."""
    if failed:
        return CONTROL_FAILED
    if score.reason:
        return f"{NOT_SCORABLE}: {score.reason}"
    if p_corrected < 1.0 - score.level:
        return DETECTED
    return EQUIVALENT if is_equivalent(score, outcome) else NOT_DETECTED


def is_equivalent(score: Score, outcome: Outcome) -> bool:
    """Whether the whole interval of the effect, estimate - null, lies inside the margin. False where there is no interval or margin."""
    return outcome.null - outcome.margin < score.low and score.high < outcome.null + outcome.margin


def experiment_verdict(verdicts: Sequence[str]) -> str | None:
    """One verdict for an experiment from those of its tested primary rows; None where no primary outcome was tested.

    A failed control outweighs everything. Else one detection is enough (the correction has paid for the others), an undecided
    row outweighs an equivalent one, and "not scorable" is left for where nothing else was found.
    """
    for kind in (CONTROL_FAILED, DETECTED, NOT_DETECTED, EQUIVALENT):
        if kind in verdicts:
            return kind
    return verdicts[0] if verdicts else None
