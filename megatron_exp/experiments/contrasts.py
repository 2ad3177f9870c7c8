"""The comparison many experiments end in: what a key had inserted against what it held out, as one row of results."""

from typing import Literal, NamedTuple

import numpy as np
from scipy.special import stdtrit

from megatron_exp.experiments.frames import Frame
from megatron_exp.experiments.protocol import Score
from megatron_exp.seeding import Words
from megatron_exp.statistics.differences import MeanDifference, stratified_mean_difference
from megatron_exp.statistics.normal import NO_INTERVAL, Interval, Side, smallest_detectable_effect
from megatron_exp.statistics.ranks import stratified_rank_sum
from megatron_exp.statistics.roc import auc_interval
from megatron_exp.statistics.trend import trend

Measure = Literal["difference", "auc"]

_SMALLEST_GROUP = 10
"""A smaller group's own variance is not relied on."""


class Units(NamedTuple):
    """One value for each cluster, the mean of its rows. values: float64 [c]; treated: bool [c]; strata: str [c]."""

    values: np.ndarray
    treated: np.ndarray
    strata: np.ndarray


def units_of(frame: Frame, values: np.ndarray) -> Units:
    """The clusters of the rows whose value is known, in the order of their numbers.

    A cluster is what the assignment was drawn for: all its rows are controls or none, and all lie in one stratum.
    """
    known = np.isfinite(values)
    rows = frame.where(known)
    _, first, which = np.unique(rows.cluster, return_index=True, return_inverse=True)
    means = np.bincount(which, weights=values[known]) / np.bincount(which)
    return Units(means, (rows.role != "control")[first], rows.stratum[first])


def contrast_score(
    frame: Frame, outcome: str, condition: str, step: int, side: Side, *, measure: Measure = "difference", of_twin: bool = False
) -> Score:
    """All rows but the controls against the controls, by a rank sum within strata; every cluster counts once.

    Args:
        frame: one row per item, in one model state.
        outcome: name of the outcome.
        condition: what stands on the side that is not control.
        step: the state.
        side: direction of the alternative.
        measure: whether the estimate is a difference of means or an AUC; p comes from the rank sum either way.
        of_twin: compare the twin's own values instead of the change from twin to run.
    """
    values = frame.twin if of_twin else frame.change
    units = units_of(frame, values)
    words = Words.of(0, "score", frame.experiment, outcome, condition)
    test = stratified_rank_sum(*units, side, words)
    estimate, low, high, error = _measured(units, measure, side)
    scorable = bool(np.isfinite(estimate))
    num_unscored = int((~np.isfinite(values)).sum())
    return Score(
        outcome=outcome,
        condition=condition,
        step=step,
        n=len(frame) - num_unscored,
        num_clusters=len(units.values),
        num_unscored=num_unscored,
        estimate=estimate,
        low=low,
        high=high,
        control=float(units.values[~units.treated].mean()) if scorable and measure == "difference" else float("nan"),
        twin=_measured(units_of(frame, frame.twin), measure, side)[0],
        difference=estimate if measure == "difference" else estimate - 0.5,
        p=test.p,
        mde=smallest_detectable_effect(error, side),
        test=f"{test.method}, {'twin alone' if of_twin else frame.compared}",
        reason="" if scorable else "no stratum has scored items of both kinds",
    )


def _measured(units: Units, measure: Measure, side: Side) -> tuple[float, float, float, float]:
    """(estimate, low, high, standard error) in the unit of the measure. The tests' own p-values are not used: no draws."""
    words = Words.of(0, "no draws")
    if measure == "difference":
        means = stratified_mean_difference(*units, side, words, num_draws=0)
        return means.difference, *_interval(units, means), means.standard_error or float("nan")
    ranks = stratified_rank_sum(*units, side, words, num_draws=0)
    num_treated = int(units.treated.sum())
    interval = auc_interval(ranks.auc, num_treated, len(units.values) - num_treated) if np.isfinite(ranks.auc) else NO_INTERVAL
    return ranks.auc, *interval, ranks.standard_error


def _interval(units: Units, means: MeanDifference) -> Interval:
    """That of the difference; in a small group, whose own spread says little, from the spread over both groups.

    None where all values are equal: at a floor or a ceiling no spread is seen, and an interval of no width would claim certainty.
    """
    if not np.isfinite(means.difference) or np.ptp(units.values) == 0:
        return NO_INTERVAL
    if min(units.treated.sum(), (~units.treated).sum()) >= _SMALLEST_GROUP:
        return means.interval
    half = float(stdtrit(max(len(units.values) - 2, 1), 0.975)) * means.standard_error
    return Interval(means.difference - half, means.difference + half)


def trend_score(
    frame: Frame, values: np.ndarray, part: str, outcome: str, condition: str, step: int, *, compared: str, reason: str
) -> Score:
    """Do values rise with the number of a part of training that the key dealt the items to? `part`: its name in their metadata."""
    is_known = np.isfinite(values)
    known = frame.where(is_known)
    found = trend(values[is_known], known.meta(part).astype(np.float64) if len(known) else np.empty(0), "greater")
    return Score(
        outcome=outcome,
        condition=condition,
        step=step,
        n=len(known),
        num_clusters=len(known),
        num_unscored=len(frame) - len(known),
        estimate=found.slope,
        low=found.interval.low,
        high=found.interval.high,
        difference=found.slope,
        p=found.p,
        mde=smallest_detectable_effect(found.standard_error, "greater"),
        test=f"Spearman's rank correlation, normal approximation{compared}",
        reason="" if np.isfinite(found.slope) else reason,
    )
