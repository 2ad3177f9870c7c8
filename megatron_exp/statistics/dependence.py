"""The statistics of a dependence matrix: which experiment changes the outcome of which, from a few repetitions of short runs.

Every column (the outcome of one experiment) is a two-way layout without repetition: Y[replicate, row] = run + block + error. A replicate is a block: all
its runs share base data, places and items, so what differs between blocks cancels in every comparison of rows.

Spread: residuals of the two-way layout, pooled per column over the runs that hold the column's experiment and, apart from them, over those that do not.
Where nothing is learnt, nothing varies (an accuracy that stays at zero), so pooling both kinds would call noise an effect: if runs with the experiment vary
1.5 times as much as the others, borrowing the others' degrees of freedom wherever the estimates look alike gives 7% of false positives instead of 5%.

Family: all comparisons of a matrix. Per column there is one of ALL against alone, and one of many rows against the shared reference `none`
(Dunnett, exact for the shared reference); these 2 x columns units share the error rate alpha equally, so every interval holds at once with
probability 1 - alpha and p-values and intervals agree.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from scipy.special import stdtr, stdtrit

from megatron_exp.statistics.dunnett import dunnett_critical, dunnett_p

ALPHA = 0.05


@dataclass(frozen=True, eq=False, kw_only=True)
class Design:
    """Rows of the runs and columns of the outcomes.

    holds: bool [rows, columns], whether the row's run holds the insertions of the column's experiment. alone: int [columns], the row of the
    column's experiment alone. all_row, none_row: the reference rows. others: rows compared with `none` wherever they do not hold the column.
    """

    holds: np.ndarray
    alone: np.ndarray
    all_row: int
    none_row: int

    @property
    def num_columns(self) -> int:
        return self.holds.shape[1]

    @cached_property
    def family_size(self) -> int:
        """Units that share the error rate: ALL against alone, and all rows against none, in every column."""
        return 2 * self.num_columns

    def compared(self, column: int) -> np.ndarray:
        """int: rows compared with `none` in a column: all that do not hold its experiment, but `none` itself."""
        rows = np.flatnonzero(~self.holds[:, column])
        return rows[rows != self.none_row]

    def rows_with(self, column: int) -> np.ndarray:
        """int: rows that hold the column's experiment."""
        return np.flatnonzero(self.holds[:, column])


class Spread(NamedTuple):
    """Variance of one run within a block, with its degrees of freedom; both of the shape of the batch."""

    variance: np.ndarray
    df: np.ndarray


class Comparison(NamedTuple):
    """Estimates with simultaneous intervals and p-values corrected over the matrix, arrays of the shape [..., rows compared]."""

    estimate: np.ndarray
    standard_error: np.ndarray
    half_width: np.ndarray
    p: np.ndarray
    p_corrected: np.ndarray
    df: np.ndarray


def residual_spread(values: np.ndarray) -> Spread:
    """The two-way residual variance of values [..., replicates, rows], with (replicates - 1)(rows - 1) degrees of freedom."""
    means = values.mean(axis=-2, keepdims=True) + values.mean(axis=-1, keepdims=True) - values.mean(axis=(-2, -1), keepdims=True)
    df = (values.shape[-2] - 1) * (values.shape[-1] - 1)
    squares = ((values - means) ** 2).sum(axis=(-2, -1))
    return Spread(squares / df if df else np.full(squares.shape, np.nan), np.full(squares.shape, df))


def diagonal(values: np.ndarray, design: Design, column: int) -> Comparison:
    """What the experiment alone changes of its own outcome, from pairs within blocks; p one-sided, corrected for the number of columns.

    The interval agrees with the test: its lower end is above zero where the corrected p is below alpha.

    values: float64 [..., replicates, rows] of one column.
    """
    differences = values[..., design.alone[column]] - values[..., design.none_row]
    num = differences.shape[-1]
    estimate = differences.mean(axis=-1)
    error = differences.std(axis=-1, ddof=1) / np.sqrt(num) if num > 1 else np.full(estimate.shape, np.nan)
    p = stdtr(num - 1, -_ratio(estimate, error)) if num > 1 else np.full(estimate.shape, np.nan)
    half = stdtrit(num - 1, 1.0 - ALPHA / design.num_columns) * error if num > 1 else error
    return Comparison(estimate, error, half, p, np.minimum(p * design.num_columns, 1.0), np.full(estimate.shape, num - 1))


def all_against_alone(values: np.ndarray, design: Design, column: int) -> Comparison:
    """The primary comparison of a column: what the other experiments together change of it. Shapes without a row axis."""
    spread = spread_with(values, design, column)
    estimate = (values[..., design.all_row] - values[..., design.alone[column]]).mean(axis=-1)
    error = np.sqrt(2.0 * spread.variance / values.shape[-2])
    p = 2.0 * stdtr(spread.df, -np.abs(_ratio(estimate, error)))
    half = stdtrit(spread.df, 1.0 - ALPHA / design.family_size / 2.0) * error
    return Comparison(estimate, error, half, p, np.minimum(p * design.family_size, 1.0), spread.df)


def against_none(values: np.ndarray, design: Design, column: int) -> Comparison:
    """Spill-over: every row without the column's experiment against `none`, in the order of `design.compared`."""
    rows = design.compared(column)
    spread = residual_spread(values[..., ~design.holds[:, column]])
    return _many_to_one(values, rows, design.none_row, spread, design.family_size)


def against_all(values: np.ndarray, design: Design, column: int, rows: np.ndarray) -> Comparison:
    """Leave-one-out rows against ALL: without which experiment does the column change back? Corrected within the column only.

    It explains a dependence that the family has found already, so it is no member of the family.
    """
    return _many_to_one(values, rows, design.all_row, spread_with(values, design, column), 1)


def spread_with(values: np.ndarray, design: Design, column: int) -> Spread:
    """Of the rows that hold the column's experiment."""
    return residual_spread(values[..., design.holds[:, column]])


def _many_to_one(values: np.ndarray, rows: np.ndarray, reference: int, spread: Spread, family_size: int) -> Comparison:
    estimate = (values[..., rows] - values[..., [reference]]).mean(axis=-2)
    error = np.broadcast_to(np.sqrt(2.0 * spread.variance / values.shape[-2])[..., None], estimate.shape)
    t = _ratio(estimate, error)
    p, critical = np.empty(estimate.shape), np.empty(estimate.shape)
    for df in np.unique(spread.df).tolist():
        here = spread.df == df
        p[here] = dunnett_p(t[here], len(rows), int(df))
        critical[here] = dunnett_critical(ALPHA / family_size, len(rows), int(df))
    df = np.broadcast_to(spread.df[..., None], estimate.shape)
    return Comparison(estimate, error, critical * error, 2.0 * stdtr(df, -np.abs(t)), np.minimum(p * family_size, 1.0), df)


def _ratio(estimate: np.ndarray, error: np.ndarray) -> np.ndarray:
    """estimate / error; 0 where there is neither difference nor spread."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((estimate == 0) & (error == 0), 0.0, estimate / error)


# ---- verdicts ----

INDEPENDENT, DEPENDENT, UNDECIDED, NOT_TESTABLE = "independent", "dependent", "undecided", "not testable"
RELATIVE_MARGIN = 0.05
"""Share of the diagonal below which a change counts as none."""
MOST_SEEDS = 1000
_Z_POWER = 0.8416212335729143
"""Normal quantile of a power of 80%."""


def verdicts(found: Comparison, margin: np.ndarray) -> np.ndarray:
    """For every comparison (shape of `found.estimate`, `margin` broadcast to it) whether it is independent, dependent or undecided.

    Without any spread nothing is independent: at a floor or a ceiling an interval of no width would claim a certainty that is not there.
    """
    far, size = np.abs(found.estimate) > margin, np.abs(found.estimate)
    inside = (size + found.half_width < margin) & (found.standard_error > 0)
    return np.where((found.p_corrected < ALPHA) & far, DEPENDENT, np.where(inside, INDEPENDENT, UNDECIDED))


def seeds_needed(estimate: float, standard_error: float, df: int, margin: float, num_seeds: int, family_size: int) -> int | None:
    """Replicates after which an undecided comparison would be decided with probability 80%, were the estimate the truth.

    family_size: all comparisons that share alpha, for the quantile (Bonferroni's, a little above Dunnett's). None: more than MOST_SEEDS.
    """
    size = abs(estimate)
    gap = size if size > margin else margin - size
    if not (standard_error > 0 and gap > 0):
        return None
    variance, df_per_seed = standard_error**2 * num_seeds, df / (num_seeds - 1)

    def enough(num: int) -> bool:
        critical = stdtrit(df_per_seed * (num - 1), 1.0 - ALPHA / family_size / 2.0)
        return bool((critical + _Z_POWER) * np.sqrt(variance / num) < gap)

    if not enough(MOST_SEEDS):
        return None
    low, high = num_seeds, MOST_SEEDS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


class Column(NamedTuple):
    """Everything that is said about one column; arrays of the batch's shape, with a last axis of rows compared for spill-over.

    primary_verdict and spill_over_verdict: INDEPENDENT, DEPENDENT, UNDECIDED or NOT_TESTABLE.
    """

    diagonal: Comparison
    margin: np.ndarray
    is_testable: np.ndarray
    primary: Comparison
    primary_verdict: np.ndarray
    spill_over: Comparison
    spill_over_verdict: np.ndarray


def analyse_column(values: np.ndarray, design: Design, column: int, smallest_effect: float) -> Column:
    """All tests of one column.

    Args:
        values: float64 [..., replicates, rows], at least two replicates, none missing.
        design: of the matrix.
        column: which one.
        smallest_effect: of interest, in the unit of the values.
    """
    own = diagonal(values, design, column)
    margin = np.maximum(RELATIVE_MARGIN * np.abs(own.estimate), smallest_effect)
    is_testable = own.p_corrected < ALPHA
    primary, spill_over = all_against_alone(values, design, column), against_none(values, design, column)
    first = np.where(is_testable, verdicts(primary, margin), NOT_TESTABLE)
    second = np.where(is_testable[..., None], verdicts(spill_over, margin[..., None]), NOT_TESTABLE)
    return Column(own, margin, is_testable, primary, first, spill_over, second)
