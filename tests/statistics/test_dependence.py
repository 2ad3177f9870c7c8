"""The dependence tests on simulated matrices: error rate, power, and that planted dependences are found where they are."""

import numpy as np
import pytest
from scipy.stats import binomtest

from megatron_exp.seeding import Words
from megatron_exp.statistics.dependence import (
    ALPHA,
    DEPENDENT,
    INDEPENDENT,
    NOT_TESTABLE,
    UNDECIDED,
    against_all,
    analyse_column,
    residual_spread,
    seeds_needed,
)
from tests.statistics.matrices import ALL, DESIGN, DIAGONAL, NONE, NUM_EXPERIMENTS, NUM_SEEDS, analysed, simulate

NUM_MATRICES = 2000


@pytest.fixture(scope="module")
def null():
    """Columns of matrices in which nothing depends on anything."""
    return analysed(simulate(NUM_MATRICES, Words.of(0, "null")))


def any_rejection(columns) -> np.ndarray:
    """bool [matrices]: whether a comparison of the family has a corrected p below alpha."""
    primary = np.stack([column.primary.p_corrected < ALPHA for column in columns], axis=-1)
    spill_over = np.concatenate([column.spill_over.p_corrected < ALPHA for column in columns], axis=-1)
    return primary.any(axis=-1) | spill_over.any(axis=-1)


def test_a_matrix_without_dependence_is_called_dependent_in_at_most_5_percent(null):
    rejected = int(any_rejection(null).sum())
    assert rejected <= ALPHA * NUM_MATRICES or binomtest(rejected, NUM_MATRICES, ALPHA).pvalue > 1e-4


@pytest.mark.parametrize("ratio", [1.5, 5.0])
def test_the_error_rate_holds_where_runs_with_the_experiment_vary_more_or_less_than_the_others(ratio):
    rejected = int(any_rejection(analysed(simulate(NUM_MATRICES, Words.of(0, "unequal", int(10 * ratio)), ratio=ratio))).sum())
    assert rejected <= ALPHA * NUM_MATRICES or binomtest(rejected, NUM_MATRICES, ALPHA).pvalue > 1e-4


def test_the_simultaneous_intervals_hold_together(null):
    missed = np.zeros(NUM_MATRICES, bool)
    for column in null:
        missed |= np.abs(column.primary.estimate) > column.primary.half_width
        missed |= (np.abs(column.spill_over.estimate) > column.spill_over.half_width).any(axis=-1)
    assert binomtest(int(missed.sum()), NUM_MATRICES, ALPHA, alternative="greater").pvalue > 1e-4


def test_a_fifth_of_the_diagonal_is_found_with_5_seeds_in_at_least_80_percent():
    columns = analysed(simulate(400, Words.of(0, "power"), suppressed={1: 0.2 * DIAGONAL}))
    found = columns[1].primary_verdict == DEPENDENT
    assert NUM_SEEDS == 5
    assert found.mean() >= 0.8
    assert columns[1].primary.estimate.mean() == pytest.approx(-0.2 * DIAGONAL, abs=0.01)


def test_a_spill_over_and_a_suppressor_are_found_in_their_cells_and_nowhere_else():
    planted = simulate(400, Words.of(0, "planted"), spill_over={(0, 2): 0.3 * DIAGONAL}, suppressed={1: 0.4 * DIAGONAL})
    columns = analysed(planted)
    cell = DESIGN.compared(2).tolist().index(0)
    assert (columns[2].spill_over_verdict[:, cell] == DEPENDENT).mean() > 0.95
    assert (columns[1].primary_verdict == DEPENDENT).mean() > 0.95
    assert (columns[2].primary_verdict == DEPENDENT).mean() > 0.9  # ALL holds the experiment that spills over
    elsewhere = [columns[0].primary_verdict, columns[3].primary_verdict, np.delete(columns[2].spill_over_verdict, cell, axis=1)]
    elsewhere += [columns[index].spill_over_verdict for index in (0, 1, 3)]
    assert np.concatenate([part.reshape(len(part), -1) == DEPENDENT for part in elsewhere], axis=1).any(axis=1).mean() < 0.1


def test_an_interval_inside_the_margin_says_independent_and_few_wide_ones_say_undecided():
    quiet = simulate(50, Words.of(0, "quiet"))
    mean = quiet.mean(axis=1, keepdims=True)
    column = analyse_column((mean + 0.01 * (quiet - mean))[..., 0] + 1e-6 * quiet[..., 0], DESIGN, 0, smallest_effect=0.2)
    assert set(column.primary_verdict) == {INDEPENDENT}
    assert (analysed(quiet)[0].primary_verdict == UNDECIDED).mean() > 0.8  # noise of 3% against a margin of 5%


def test_a_column_that_the_experiment_itself_does_not_move_is_not_testable():
    values = simulate(50, Words.of(0, "flat"))
    values[..., 0] -= DIAGONAL * DESIGN.holds[:, 0]
    column = analyse_column(values[..., 0], DESIGN, 0, 0.0)
    assert (column.primary_verdict == NOT_TESTABLE).mean() > 0.9
    assert (column.spill_over_verdict == NOT_TESTABLE).mean() > 0.9


def test_a_column_at_its_floor_is_never_called_independent():
    values = np.zeros((NUM_SEEDS, NUM_EXPERIMENTS + 3))
    values[:, DESIGN.holds[:, 0]] = 1.0 + 0.01 * Words.of(0, "floor").normals(2 * NUM_SEEDS).reshape(NUM_SEEDS, 2)
    column = analyse_column(values, DESIGN, 0, 0.0)
    assert column.is_testable
    assert set(column.spill_over_verdict.tolist()) == {UNDECIDED}
    assert set(column.spill_over.p_corrected.tolist()) == {1.0}


def test_leave_one_out_names_the_culprit():
    values = simulate(200, Words.of(0, "culprit"), suppressed={1: 0.4 * DIAGONAL})
    again = simulate(200, Words.of(0, "left out"), suppressed={row: 0.4 * DIAGONAL for row in range(4)}, blocks=Words.of(0, "culprit"))
    extra = again[:, :, :3, 1] + DIAGONAL * ~DESIGN.holds[:3, 1] - 0.4 * DIAGONAL  # three more runs of ALL
    extra[:, :, 0] += 0.4 * DIAGONAL  # without experiment 0, column 1 is itself again
    column = np.concatenate([values[..., 1], extra], axis=2)
    holds = np.concatenate([DESIGN.holds, np.ones((3, NUM_EXPERIMENTS), bool)])
    design = type(DESIGN)(holds=holds, alone=DESIGN.alone, all_row=ALL, none_row=NONE)
    found = against_all(column, design, 1, np.arange(NUM_EXPERIMENTS + 3, NUM_EXPERIMENTS + 6))
    assert (found.p_corrected[:, 0] < ALPHA).mean() > 0.95
    assert (found.p_corrected[:, 1:] < ALPHA).any(axis=1).mean() < 0.12


def test_the_residual_variance_ignores_differences_of_blocks_and_of_rows():
    values = np.arange(5.0)[:, None] * 10 + np.array([0.0, 3.0, -2.0])
    assert residual_spread(values).variance == pytest.approx(0.0)
    words = Words.of(0, "residuals")
    spread = residual_spread(words.normals(4000 * 15).reshape(4000, 5, 3) + values)
    assert spread.df[0] == 8
    assert spread.variance.mean() == pytest.approx(1.0, abs=0.05)


def test_seeds_needed_decide_as_often_as_promised():
    """From 5 seeds at which an effect is undecided to the number that makes its test succeed."""
    error = 0.03 * np.sqrt(2 / 5)
    needed = seeds_needed(0.08, error, 4, margin=0.05, num_seeds=5, family_size=8)
    assert needed is not None and 5 < needed < 20
    assert seeds_needed(0.08, error / 2, 4, margin=0.05, num_seeds=5, family_size=8) <= needed
    assert seeds_needed(0.05, error, 4, margin=0.05, num_seeds=5, family_size=8) is None  # exactly on the margin: never
    assert seeds_needed(0.0, float("nan"), 4, margin=0.05, num_seeds=5, family_size=8) is None
