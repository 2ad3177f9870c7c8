"""Which experiments of a manifest are rows and columns of its test, and why some are not."""

from collections.abc import Collection
from dataclasses import dataclass

from megatron_exp.dependence.rows import check_names
from megatron_exp.errors import UserError
from megatron_exp.experiments.dependence import Dependence
from megatron_exp.experiments.loading import load_experiment
from megatron_exp.manifest.reader import Manifest


@dataclass(frozen=True, eq=False)
class Tested:
    """rows: experiments that are inserted. columns: those with an outcome. not_inserted, not_measured: name to reason."""

    rows: list[str]
    columns: dict[str, Dependence]
    not_inserted: dict[str, str]
    not_measured: dict[str, str]


def tested(manifest: Manifest, only: Collection[str] = ()) -> Tested:
    """What of a manifest can be tested, of the experiments in `only` where some are named.

    Raises UserError where that is fewer than two experiments with one outcome, or a name is unknown.
    """
    unknown = sorted(set(only) - {entry.name for entry in manifest.config.experiments})
    if unknown:
        raise UserError(f"The manifest {manifest.path} has no experiment {', '.join(unknown)} to be tested. Name some of those it has.")
    rows: list[str] = []
    columns: dict[str, Dependence] = {}
    not_inserted: dict[str, str] = {}
    not_measured: dict[str, str] = {}
    for entry in manifest.config.experiments:
        if not entry.enabled:
            not_inserted[entry.name] = "disabled in the manifest"
            continue
        if only and entry.name not in only:
            not_inserted[entry.name] = "not among those asked for"
            continue
        experiment = load_experiment(entry)
        outcome = experiment.dependence
        if "reference" in experiment.needed:
            not_inserted[entry.name] = (
                outcome.untestable or "what it does follows from a reference model over the whole run, not from short runs"
            )
            continue
        rows.append(entry.name)
        if outcome.untestable:
            not_measured[entry.name] = outcome.untestable
        else:
            columns[entry.name] = outcome
    check_names(rows)
    if len(rows) < 2 or not columns:
        listed = "; ".join(f"{name}: {reason}" for name, reason in (not_inserted | not_measured).items())
        raise UserError(
            f"The manifest {manifest.path} has {len(rows)} experiments that can be inserted in a dependence test and {len(columns)} whose outcome can be "
            f"followed; at least two and one are needed.{f' Left out: {listed}.' if listed else ''}"
        )
    return Tested(rows, columns, not_inserted, not_measured)
