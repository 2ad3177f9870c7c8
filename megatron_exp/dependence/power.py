"""Before the run: what could each primary outcome of a manifest detect?"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_exp.experiments.loading import load_experiment
from megatron_exp.experiments.protocol import Experiment, Outcome, Score
from megatron_exp.manifest.reader import Manifest
from megatron_exp.scoring.responses import of_experiment
from megatron_exp.seeding import Words
from megatron_exp.statistics.normal import smallest_detectable_effect

NUM_DRAWS = 30
POWER = 0.8


@dataclass(frozen=True, kw_only=True)
class Power:
    """Of one primary outcome. spread: standard deviation of the estimate where there is no effect, in `unit`, over simulated runs.

    mde: effect found with probability 80% at the level left by the correction over all primaries (Holm's first step). paper: effect reported by the source of
    the experiment, where known. warning: empty, or why the outcome is out of reach.
    """

    experiment: str
    outcome: str
    unit: str
    n: int
    num_clusters: int
    spread: float | None
    mde: float | None
    smallest_effect: float
    paper: float | None
    warning: str


def power_of(manifest: Manifest, num_draws: int = NUM_DRAWS) -> list[Power]:
    """Every primary outcome of a manifest, from its experiments' own simulations of runs without an effect."""
    items, probes = manifest.items(), manifest.probes()
    entries = {entry.name: load_experiment(entry) for entry in manifest.config.experiments if entry.name in manifest.experiments}
    primaries = {name: [outcome for outcome in one.analysis.outcomes if outcome.family == "primary"] for name, one in entries.items()}
    family = sum(not outcome.name.startswith("control:") for outcomes in primaries.values() for outcome in outcomes)
    result = []
    for name, experiment in entries.items():
        mine = of_experiment(items, name), of_experiment(probes, name)
        draws = [_simulated(experiment, *mine, Words.of(0, "power", name, draw)) for draw in range(num_draws)]
        result += [_power(name, experiment, outcome, [draw.get(outcome.name) for draw in draws], family) for outcome in primaries[name]]
    return result


def _simulated(experiment: Experiment, items: pa.Table, probes: pa.Table, words: Words) -> dict[str, Score]:
    """Scores by outcome; of several the last one, which is the final state's or the last condition's."""
    return {score.outcome: score for score in experiment.score(items, experiment.simulate(items, probes, 0.0, words))}


def _power(name: str, experiment: Experiment, outcome: Outcome, scores: list[Score | None], family: int) -> Power:
    found = [score for score in scores if score is not None and np.isfinite(score.estimate)]
    spread = float(np.std([score.estimate for score in found], ddof=1)) if len(found) > 2 else None
    mde = smallest_detectable_effect(spread, outcome.side, 0.05 / max(family, 1), POWER) if spread is not None else None
    paper = experiment.paper_effects.get(outcome.name)
    first = next((score for score in scores if score is not None), None)
    return Power(
        experiment=name,
        outcome=outcome.name,
        unit=outcome.unit,
        n=first.n if first else 0,
        num_clusters=first.num_clusters if first else 0,
        spread=spread,
        mde=mde,
        smallest_effect=outcome.smallest_effect,
        paper=paper,
        warning=_warning(mde, outcome.smallest_effect, paper),
    )


def _warning(mde: float | None, smallest_effect: float, paper: float | None) -> str:
    if mde is None:
        return "no estimate could be simulated"
    reasons: Iterator[Any] = (
        text
        for value, text in (
            (paper, "the effect its source reports is out of reach"),
            (smallest_effect, "the smallest effect of interest is out of reach"),
        )
        if value is not None and mde > abs(value)
    )
    return "; ".join(reasons)
