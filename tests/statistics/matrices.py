"""Simulated dependence matrices: a model whose outcomes are known, with heavy-tailed noise on items that runs of a block share."""

import numpy as np

from megatron_exp.seeding import Words
from megatron_exp.statistics.dependence import Column, Design, analyse_column

NUM_EXPERIMENTS, NUM_SEEDS, NUM_ITEMS = 4, 5, 16
NONE, SHAM, ALL = NUM_EXPERIMENTS, NUM_EXPERIMENTS + 1, NUM_EXPERIMENTS + 2
DIAGONAL, BLOCK_SD, RUN_SD = 1.0, 0.2, 0.03
"""Run noise of 3% of the diagonal; blocks differ much more, which pairing has to remove."""

HOLDS = np.zeros((NUM_EXPERIMENTS + 3, NUM_EXPERIMENTS), bool)
HOLDS[:NUM_EXPERIMENTS] = np.eye(NUM_EXPERIMENTS, dtype=bool)
HOLDS[ALL] = True
DESIGN = Design(holds=HOLDS, alone=np.arange(NUM_EXPERIMENTS), all_row=ALL, none_row=NONE)


def simulate(
    num: int,
    words: Words,
    *,
    spill_over: dict[tuple[int, int], float] | None = None,
    suppressed: dict[int, float] | None = None,
    ratio: float = 1.0,
    blocks: Words | None = None,
) -> np.ndarray:
    """float64 [num, seeds, rows, columns].

    spill_over: {(row, column): effect} of an experiment on another's outcome wherever it is inserted. suppressed: {column: loss} in ALL. ratio: how much more
    runs with the column's experiment vary than those without. blocks: draws of the block effects, to be shared. The noise of an item in a run has Student's
    distribution with 4 degrees of freedom.
    """
    shape = (num, NUM_SEEDS, NUM_EXPERIMENTS + 3, NUM_EXPERIMENTS)
    total = int(np.prod(shape))
    uniforms = words.child("items").uniforms(total * NUM_ITEMS).reshape(total, NUM_ITEMS)
    items = student_4(uniforms).mean(axis=1).reshape(shape) / np.sqrt(2.0 / NUM_ITEMS)  # variance 1
    scale = RUN_SD * np.where(HOLDS, ratio, 1.0)
    drawn = (blocks or words).child("blocks").normals(num * NUM_SEEDS * NUM_EXPERIMENTS).reshape(num, NUM_SEEDS, 1, NUM_EXPERIMENTS)
    values = DIAGONAL * HOLDS + BLOCK_SD * drawn + scale * items
    for (row, column), effect in (spill_over or {}).items():
        values[:, :, [row, ALL], column] += effect
    for column, loss in (suppressed or {}).items():
        values[:, :, ALL, column] -= loss
    return values


def analysed(values: np.ndarray) -> list[Column]:
    """Every column of simulated matrices."""
    return [analyse_column(values[..., column], DESIGN, column, 0.0) for column in range(NUM_EXPERIMENTS)]


def student_4(uniforms: np.ndarray) -> np.ndarray:
    """Quantiles of Student's distribution with 4 degrees of freedom (infinite kurtosis, variance 2), in closed form."""
    alpha = 4.0 * uniforms * (1.0 - uniforms)
    return np.sign(uniforms - 0.5) * 2.0 * np.sqrt(np.cos(np.arccos(np.sqrt(alpha)) / 3.0) / np.sqrt(alpha) - 1.0)
