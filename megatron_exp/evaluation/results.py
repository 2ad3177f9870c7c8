"""From responses to results: every experiment's own scores, corrected within their families, with verdicts."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from megatron_exp.evaluation import verdicts
from megatron_exp.experiments.loading import load_experiment
from megatron_exp.experiments.protocol import Outcome, Score
from megatron_exp.manifest.reader import Manifest
from megatron_exp.manifest.schema import RESULTS
from megatron_exp.scoring.responses import of_experiment
from megatron_exp.statistics.multiplicity import holm

_OF_SCORE = [name for name in RESULTS.names if name in Score.__dataclass_fields__]
"""Columns that are a score's own fields; `condition` and `outcome` among them."""
PRIMARY_FAMILY = "primary"


@dataclass(eq=False)
class Row:
    """One score with what the manifest says about it. outcome: None where its name was not pre-registered."""

    experiment: str
    score: Score
    outcome: Outcome | None
    tested: bool
    failed_control: bool = False
    p_corrected: float = float("nan")
    verdict: str | None = None

    @property
    def family(self) -> str | None:
        """The family its test belongs to; None where it is not tested."""
        if not self.tested or self.outcome is None:
            return None
        return PRIMARY_FAMILY if self.outcome.family == "primary" else f"secondary of {self.experiment}"

    @property
    def is_primary(self) -> bool:
        return self.outcome is not None and self.outcome.family == "primary"


@dataclass(frozen=True, eq=False)
class Results:
    """Rows of all evaluated experiments and the number of hypotheses in each family."""

    rows: Sequence[Row]
    family_sizes: dict[str, int]

    def table(self) -> pa.Table:
        """RESULTS, in the order of the rows."""
        return pa.Table.from_pylist([_columns(row) for row in self.rows], schema=RESULTS)

    def verdict(self, experiment: str) -> str | None:
        """The experiment's verdict; None where no primary outcome was tested."""
        found = [row.verdict for row in self.rows if row.experiment == experiment and row.is_primary and row.verdict is not None]
        return verdicts.experiment_verdict(found)

    def outcomes(self, experiment: str) -> list[dict[str, Any]]:
        """The rows of an experiment for results.json: as in the table, with family and reason; null where a number does not exist."""
        return [
            {
                "family": row.family,
                "reason": row.score.reason,
                **{name: _json(value) for name, value in _columns(row).items() if name != "experiment"},
            }
            for row in self.rows
            if row.experiment == experiment
        ]


def score_experiments(manifest: Manifest, names: Sequence[str], responses: pa.Table, state: int) -> Results:
    """Let every named experiment score its responses, then correct and judge.

    Args:
        manifest: items and pre-registered analyses.
        names: experiments evaluated; those of the manifest left out keep their places in the primary family.
        responses: RESPONSES.
        state: the last state evaluated.
    """
    entries = {entry.name: entry for entry in manifest.config.experiments}
    items = manifest.items()
    rows: list[Row] = []
    for name in names:
        outcomes = [Outcome(**outcome) for outcome in manifest.analyses[name]["outcomes"]]
        mine = of_experiment(responses, name)
        scores = load_experiment(entries[name]).score(of_experiment(items, name), mine)
        rows += experiment_rows(name, outcomes, list(scores), last_state(mine, state))
    left_out = [outcome for name in manifest.experiments if name not in names for outcome in manifest.analyses[name]["outcomes"]]
    sizes = correct(
        rows, num_left_out=sum(outcome["family"] == "primary" and not verdicts.is_control(outcome["name"]) for outcome in left_out)
    )
    judge(rows)
    return Results(rows, sizes)


def last_state(responses: pa.Table, state: int) -> int:
    """What "final" means to an experiment: the last state it asked run or twin about; `state` where it asked nothing."""
    steps = responses["step"].filter(pc.not_equal(responses["model"].cast(pa.string()), "external"))
    return pc.max(steps).as_py() if len(steps) else state


def experiment_rows(name: str, outcomes: Sequence[Outcome], scores: Sequence[Score], state: int) -> list[Row]:
    """The scores of one experiment, with a row that says so for every pre-registered test it gave no score for."""
    registered = {outcome.name: outcome for outcome in outcomes}
    rows = [_row(name, score, registered.get(score.outcome), state) for score in scores]
    done = {row.score.outcome for row in rows if row.tested}
    for outcome in outcomes:
        if outcome.family != "descriptive" and outcome.name not in done and not verdicts.is_control(outcome.name):
            step = verdicts.tested_state(outcome, state)
            nothing = Score(
                outcome=outcome.name,
                condition="",
                step=step,
                n=0,
                num_clusters=0,
                estimate=math.nan,
                reason="there were no answers to score",
            )
            rows.append(_row(name, nothing, outcome, state))
    return sorted(rows, key=lambda row: (row.score.outcome, row.score.condition, row.score.step))


def _row(name: str, score: Score, outcome: Outcome | None, state: int) -> Row:
    return Row(name, score, outcome, verdicts.is_tested(score, outcome, state), verdicts.control_failed(score, outcome, state))


def correct(rows: Sequence[Row], num_left_out: int) -> dict[str, int]:
    """Fill in the p-values corrected by Holm within each family; returns the families' sizes.

    A test that could not be done keeps its place in its family, and so do `num_left_out` primary hypotheses of experiments that are
    not evaluated now: looking at fewer experiments makes no p-value smaller.
    """
    sizes = {}
    for family in sorted({row.family for row in rows if row.family}):
        members = [row for row in rows if row.family == family]
        others = num_left_out if family == PRIMARY_FAMILY else 0
        corrected = holm([row.score.p for row in members] + [float("nan")] * others)
        for row, p in zip(members, corrected[: len(members)].tolist(), strict=True):
            row.p_corrected = p
        sizes[family] = len(corrected)
    return sizes


def judge(rows: Sequence[Row]) -> None:
    """Fill in the verdicts of the tested rows and of the controls."""
    failed = {row.experiment for row in rows if row.failed_control}
    for row in rows:
        if verdicts.is_control(row.score.outcome):
            row.verdict = verdicts.CONTROL_FAILED if row.failed_control else verdicts.NOT_DETECTED
        elif row.tested and row.outcome is not None:
            void = row.experiment in failed
            row.verdict = verdicts.CONTROL_FAILED if void else verdicts.row_verdict(row.score, row.outcome, row.p_corrected)


def unscored_counts(responses: pa.Table, name: str) -> dict[str, dict[str, int]]:
    """{model: {reason: number of responses}} of what could not be scored."""
    rows = of_experiment(responses, name).select(["model", "reason"]).to_pylist()
    counted = Counter((row["model"], row["reason"]) for row in rows if row["reason"])
    result: dict[str, dict[str, int]] = {}
    for (model, reason), number in sorted(counted.items()):
        result.setdefault(model, {})[reason] = number
    return result


def _columns(row: Row) -> dict[str, Any]:
    return {
        "experiment": row.experiment,
        **{name: getattr(row.score, name) for name in _OF_SCORE},
        "primary": row.is_primary,
        "p_corrected": row.p_corrected,
        "side": row.outcome.side if row.outcome else None,
        "verdict": row.verdict,
    }


def _json(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
