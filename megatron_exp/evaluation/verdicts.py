"""What the numbers of an experiment say, as pure functions of scores and pre-registered outcomes.

Per tested row, the first that holds:

    control failed       a check on what no insertion can have changed (an outcome named `control:...`) has p < 0.001
    not scorable         nothing could be estimated; the reason follows a colon. Never a zero
    detected             p, corrected within the outcome's family, is below 1 - level
    equivalent to none   the interval of the effect lies inside the pre-registered margin
    not detected         else; the smallest detectable effect says how much that means

Rows that are not tested (descriptive outcomes, other states than the pre-registered one) have none. A control that holds is "not
detected".
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


def is_control(outcome: str) -> bool:
    """Whether an outcome is a check rather than a finding; it takes part in no family."""
    return outcome.startswith(CONTROL_PREFIX)


def is_tested(score: Score, outcome: Outcome | None, state: int) -> bool:
    """Whether a row belongs to its outcome's family: a pre-registered test in the pre-registered state, done or not scorable.

    Args:
        score: the row.
        outcome: its pre-registered outcome, None where the name was never registered.
        state: what "final" means in this evaluation.
    """
    if outcome is None or outcome.family == "descriptive" or score.exploratory or is_control(outcome.name):
        return False
    return score.step == tested_state(outcome, state)


def tested_state(outcome: Outcome, state: int) -> int:
    """The model state an outcome is tested in."""
    return state if outcome.state == "final" else int(outcome.state)


def control_failed(score: Score, outcome: Outcome | None, state: int) -> bool:
    """Whether a row is a check, in the state its experiment is tested in, that shows an effect where none can be."""
    tested_in = state if outcome is None else tested_state(outcome, state)
    return is_control(score.outcome) and score.step == tested_in and score.p < CONTROL_ALPHA


def row_verdict(score: Score, outcome: Outcome, p_corrected: float) -> str:
    """The verdict of one tested row whose experiment's controls hold."""
    if score.reason or math.isnan(p_corrected):
        return f"{NOT_SCORABLE}: {score.reason or 'no test was possible'}"
    if p_corrected < round(1.0 - score.level, 9):  # 1 - 0.95 is a little above 0.05
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
