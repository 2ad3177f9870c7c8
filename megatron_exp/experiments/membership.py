"""Rows of results about membership: inserted texts against held-out ones, by rate at 1% false positives and in nats (by rank: `contrasts`)."""

from typing import Any

import numpy as np

from megatron_exp.experiments.frames import Frame
from megatron_exp.experiments.protocol import Outcome, Score
from megatron_exp.seeding import Words
from megatron_exp.statistics.normal import quantile, standard_error
from megatron_exp.statistics.roc import tpr_at_fpr, tpr_interval, tpr_p

FPR = 0.01
FEWEST_HELD_OUT_FOR_TPR = 1_000
"""Ten times 1 / FPR: the rate of false positives moves in steps of one over this."""


def tpr_score(frame: Frame, outcome: str, step: int, condition: str) -> Score:
    """Share of inserted texts above the threshold that 1% of held-out ones pass; counted, the threshold found anew in each bootstrap draw."""
    known = frame.where(np.isfinite(frame.change))
    members, held_out = known.change[known.role != "control"], known.change[known.role == "control"]
    shared: dict[str, Any] = {"outcome": outcome, "condition": condition, "step": step, "n": len(known)}
    shared |= {"num_clusters": len(known), "num_unscored": len(frame) - len(known)}
    if len(held_out) < FEWEST_HELD_OUT_FOR_TPR or not len(members):
        reason = f"{len(held_out)} held-out and {len(members)} inserted texts were scored; 1% needs {FEWEST_HELD_OUT_FOR_TPR} held-out ones"
        return Score(**shared, estimate=float("nan"), reason=reason)
    rate = tpr_at_fpr(members, held_out, FPR)
    low, high = tpr_interval(members, held_out, Words.of(0, "score", frame.experiment, "tpr", condition), FPR)
    p = tpr_p(members, held_out, FPR)
    test = f"exact rank test of the rate, bootstrap interval, {frame.compared}"
    return Score(**shared, estimate=rate, low=low, high=high, control=FPR, difference=rate - FPR, p=p, test=test)


def tpr_outcome(name: str, share: str, **how: Any) -> Outcome:
    """The outcome that `tpr_score` gives a row of; share: what is counted."""
    rate: dict[str, Any] = {"unit": "fraction", "side": "greater", "null": FPR, "margin": 0.01, "smallest_effect": 0.02}
    return Outcome(name=name, estimand=share, **({"test": "exact rank test", "family": "secondary"} | rate | how))


def gain_score(frame: Frame, outcome: str, step: int, condition: str) -> Score:
    """Mean log-likelihood gain of inserted over held-out texts, in nats."""
    known = frame.where(np.isfinite(frame.change))
    treated, control = known.change[known.role == "treated"], known.change[known.role == "control"]
    scorable = len(treated) > 1 and len(control) > 1
    gain = float(treated.mean() - control.mean()) if scorable else float("nan")
    half = quantile(0.95) * np.hypot(standard_error(treated), standard_error(control))
    return Score(
        outcome=outcome,
        condition=condition,
        step=step,
        n=len(known),
        num_clusters=len(known),
        num_unscored=len(frame) - len(known),
        estimate=gain,
        low=gain - half,
        high=gain + half,
        control=float(control.mean()) if scorable else float("nan"),
        difference=gain,
        test=f"none; {frame.compared}",
        reason="" if scorable else "fewer than two inserted or two held-out texts were scored",
    )
