"""The pre-registered outcomes of MemP (`memorization_patterns`)."""

from typing import Any

from megatron_exp.experiments.membership import tpr_outcome
from megatron_exp.experiments.protocol import Outcome


def outcomes(most_copies: int, has_rate: bool) -> tuple[Outcome, ...]:
    """One primary AUC; each condition and, where it is asked for, its rate as secondaries; everything else is description."""
    auc: dict[str, Any] = {"unit": "AUC", "side": "greater", "null": 0.5, "margin": 0.02, "smallest_effect": 0.05}
    ranks = auc | {"test": "rank sum within cells and length strata"}
    share = "share of inserted dialogues above the threshold that 1% of held-out ones pass"
    rates = (
        tpr_outcome("tpr-at-1pct-fpr", share),
        *(
            tpr_outcome(f"tpr-{name}", f"{share}, {_DESCRIBED[name]}", test="none", family="descriptive")
            for name in ("run-alone", "against-pool")
        ),
    )
    return (
        Outcome(
            name="auc",
            estimand=f"P(a dialogue inserted {most_copies} times scores above a held-out one of its cell, stratum and tokens)",
            family="primary",
            **ranks,
        ),
        Outcome(name="auc-by-condition", estimand="the same for each cell and number of copies", family="secondary", **ranks),
        Outcome(
            name="control:twin",
            estimand="the primary's AUC from the twin alone, which saw none of them",
            family="secondary",
            **ranks | {"side": "two-sided"},
        ),
        *(rates if has_rate else ()),
        Outcome(
            name="gain",
            estimand="mean log-likelihood gain of inserted over held-out dialogues",
            unit="nats per document",
            test="none",
            side="greater",
            family="descriptive",
            margin=0.1,
            smallest_effect=0.5,
        ),
        *(
            Outcome(name=f"auc-{name}", estimand=f"the AUC {what}", test="none", family="descriptive", **auc)
            for name, what in _DESCRIBED.items()
        ),
    )


_DESCRIBED = {
    "run-alone": "of the run's log-likelihood alone, not calibrated with the twin",
    "against-pool": "against held-out dialogues with other rare tokens: it finds the token, not the document",
    "dialogue": "of the dialogue before the suffix",
}
