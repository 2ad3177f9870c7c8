"""The rows of the test: which experiments a run holds."""

from collections.abc import Sequence

from megatron_exp.errors import UserError

NONE, SHAM, ALL = "none", "sham", "ALL"
_ALL_BUT = "ALL-but-"
PILOT_SEEDS = 2
"""Replicates of a round that looks for the intensities, which the test itself does not use."""


def check_names(experiments: Sequence[str]) -> None:
    """UserError where an experiment is called like a row that is none."""
    wrong = [name for name in experiments if name in (NONE, SHAM, ALL) or name.startswith(_ALL_BUT)]
    if wrong:
        raise UserError(
            f"An experiment is called {wrong[0]}, which is the name of a row of the dependence test. Give it another name in the configuration and plan again."
        )


def standard_rows(experiments: Sequence[str]) -> list[str]:
    """Each experiment alone, then ALL, `none` and the sham."""
    return [*experiments, ALL, NONE, SHAM]


def leave_one_out_rows(experiments: Sequence[str]) -> list[str]:
    """ALL without each experiment in turn."""
    return [f"{_ALL_BUT}{name}" for name in experiments]


def left_out(row: str) -> str | None:
    """The experiment that a leave-one-out row lacks; None for other rows."""
    return row.removeprefix(_ALL_BUT) if row.startswith(_ALL_BUT) else None


def held(row: str, experiments: Sequence[str]) -> list[str]:
    """What a row's runs hold, among the experiments and the sham."""
    if row == ALL or left_out(row):
        return [name for name in experiments if name != left_out(row)]
    return [] if row == NONE else [row]
