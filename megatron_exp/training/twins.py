"""Losses of other runs on the same data, with which this one is compared while it trains."""

from pathlib import Path

from megatron_exp.errors import UserError
from megatron_exp.run_record import RunRecord, Series, pairing
from megatron_exp.training.run import Plan

_DATA = ("corpus", "geometry", "order")
"""What decides which tokens a step reads. Twins of other initialisations or rates are welcome: they show how far runs are apart anyway."""


def twin_losses(plan: Plan, path: Path) -> tuple[Series, Series]:
    """Losses in training and validation of a run that reads the same slots at the same steps; UserError where it does not."""
    twin = RunRecord.open(path)
    identity = plan.identity
    mine = pairing(plan.config.model_dump(mode="json"), plan.base.corpus.fingerprint, identity["model"], identity["training"])
    differing = [f"the {name} of the data" if name == "order" else f"the {name}" for name in _DATA if twin.pairing[name] != mine[name]]
    if differing:
        raise UserError(
            f"--against {path}: that run differs in {', '.join(differing)}, so its losses say nothing about this one's. Give a twin: a run on the "
            "same order of the same corpus."
        )
    history = twin.history()
    return history.series("loss"), history.series("validation_loss")
