"""Losses of other runs on the same data, with which this one is compared while it trains."""

from pathlib import Path

from megatron_exp.errors import UserError
from megatron_exp.run_record import RunRecord, Series
from megatron_exp.training.run import Plan


def twin_losses(plan: Plan, path: Path) -> tuple[Series, Series]:
    """Losses in training and validation of a run that reads the same slots at the same steps; UserError where it does not."""
    twin = RunRecord.open(path)
    config = plan.config
    differing = [
        name
        for name, theirs, mine in (
            ("the corpus", twin.record["corpus"]["fingerprint"], plan.base.corpus.fingerprint),
            ("the geometry", twin.record["config"]["geometry"], config.geometry.model_dump(mode="json")),
            ("the order of the data", twin.record["config"]["seeds"]["order"], config.seeds.order),
        )
        if theirs != mine
    ]
    if differing:
        raise UserError(
            f"--against {path}: that run differs in {', '.join(differing)}, so its losses say nothing about this one's. Give a twin: a run on the "
            "same order of the same corpus."
        )
    history = twin.history()
    return history.series("loss"), history.series("validation_loss")
