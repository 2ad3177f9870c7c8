"""How much of every experiment a run must hold for its own effect to be seen: begin with the share asked for, double it where it is too little."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_exp.dependence.bench import Bench
from megatron_exp.dependence.matrix import Values
from megatron_exp.dependence.rows import NONE, PILOT_SEEDS
from megatron_exp.statistics.dependence import residual_spread

logger = logging.getLogger(__name__)

CLEAR = 4.0
"""The effect of an experiment on its own outcome must be this many standard deviations of one run: with 5 replicates it is then clear."""


def raised(bench: Bench, largest: float, fixed: frozenset[str] = frozenset()) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Fractions at which every column's own effect is clear, or the largest allowed, and what was found on the way. fixed: experiments whose share was given.

    Every round trains `none` and the experiments not yet clear, alone, in two replicates that the test itself does not use.
    """
    fractions, found = dict(bench.fractions), list[dict[str, Any]]()
    waiting, number = [name for name in bench.columns if name not in fixed], 0
    while waiting and any(fractions[name] < largest for name in waiting):
        trial = dataclasses.replace(bench, directory=bench.directory / "pilot" / str(number), fractions=dict(fractions), _blocks={})
        ratios = _clearness(trial, waiting)
        found.append({"fractions": {name: fractions[name] for name in waiting}, "clearness": ratios})
        waiting = [name for name in waiting if ratios[name] < CLEAR and fractions[name] < largest]
        for name in waiting:
            fractions[name] = min(2.0 * fractions[name], largest)
            logger.info(
                "%s: its own effect is %.1f standard deviations of a run; its share is raised to %.2g", name, ratios[name], fractions[name]
            )
        number += 1
    return fractions, found


def _clearness(bench: Bench, names: list[str]) -> Mapping[str, float]:
    """Own effect over the standard deviation of a run, per column."""
    rows = [NONE, *names]
    table = pa.concat_tables([bench.cell(row, seed)[0] for seed in range(PILOT_SEEDS) for row in rows])
    values = Values(table, rows, list(bench.columns), range(PILOT_SEEDS))
    result = {}
    for name in names:
        mine = values.array[:, :, list(bench.columns).index(name)]
        own = rows.index(name)
        pairs = mine[:, own] - mine[:, 0]
        others = np.delete(mine, own, axis=1)
        variances = [pairs.var(ddof=1) / 2.0, float(residual_spread(others).variance) if others.shape[1] > 1 else 0.0]
        sd = float(np.sqrt(max(variances)))
        ratio = float(pairs.mean()) / sd if sd > 0 else (np.inf if pairs.mean() > 0 else 0.0)
        result[name] = float(np.nan_to_num(min(ratio, 1e6), nan=0.0))
    return result
