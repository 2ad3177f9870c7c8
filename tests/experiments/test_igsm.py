import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_exp.experiments.igsm_check import check_solution, read_problem
from megatron_exp.experiments.igsm_draws import Draws, draws_of
from megatron_exp.experiments.igsm_problem import MODULUS, draw_problem
from megatron_exp.experiments.igsm_text import NUM_BINS, write
from megatron_exp.experiments.igsm_words import category_of, hierarchies
from megatron_exp.seeding import Words

WORDS = Words.of(0, "tests", "igsm")


def written(operations, num=60, most_edges=20):
    return [write(draw_problem(draws, operations, most_edges)) for draws in draws_of(WORDS.child(operations), 0, num)]


def operations_of(text):
    """Operations of the shortest solution, counted from the problem's text alone."""
    reading = read_problem(text)
    total = 0
    for parameter in reading.needed():
        stated = reading.stated.get(parameter)
        total += max(1, len(reading.parts(parameter)) + (stated is not None and stated.number is not None) - 1)
    return total


@pytest.mark.parametrize("operations", [*range(1, 13), 15, 20])
def test_every_problem_takes_exactly_the_operations_asked_for_and_its_solution_passes_the_checker(operations):
    for one in written(operations):
        assert operations_of(one.problem) == operations
        verdict = check_solution(one.problem, one.solution)
        assert verdict.is_right and verdict.num_right == verdict.num_steps and verdict.answer == one.answer, verdict.fault


def test_a_world_has_at_most_the_edges_allowed():
    for most in (2, 5, 12):
        assert all(one.problem.count("The number of each") <= most for one in written(2, 40, most))


def test_a_problem_is_a_function_of_key_and_stream_whatever_is_drawn_beside_it():
    together = {number: write(draw_problem(draws, 6)) for number, draws in enumerate(draws_of(WORDS, 0, 300))}
    for number in (0, 17, 255, 256, 299):
        assert write(draw_problem(Draws(WORDS.key, number), 6)) == together[number]


def test_things_are_named_in_one_category_only():
    names = [name for hierarchy in hierarchies() for category in hierarchy for names in category.lists for name in names]
    assert len(set(names)) == len(names) == len(category_of()) == 4 * 4 * 5 * 20
    assert not {name.split(" ", 1)[1] for name in names} & set(category_of().values())


def test_equal_traces_mean_equal_templates_and_short_solutions_keep_their_names():
    deep = {one.trace for one in written(8)}
    assert all(re.sub(r"instance|abstract|so|n|[-+*=.;0-9 ]", "", trace) == "" for trace in deep)
    assert len({one.trace for one in written(1)}) > 50, "there is one template of one operation"
    bins = Counter(one.trace_bin for one in written(5, 400))
    assert set(bins) <= set(range(NUM_BINS)) and len(bins) == NUM_BINS


@pytest.mark.parametrize("operations", [1, 3, 6, 10])
def test_a_wrong_number_anywhere_in_a_solution_is_found(operations):
    for one in written(operations, 6):
        for found in re.finditer(r"\d+", one.solution):
            other = str((int(found[0]) + 5) % MODULUS)
            faulty = one.solution[: found.start()] + other + one.solution[found.end() :]
            assert not check_solution(one.problem, faulty).is_right, faulty


def test_a_missing_an_unneeded_a_repeated_and_a_reordered_step_are_found():
    for one in written(8, 20):
        steps = [f"{step}." for step in one.solution.removesuffix(".").split(". ")]
        for place in range(len(steps)):
            assert not check_solution(one.problem, " ".join(steps[:place] + steps[place + 1 :])).is_right
        assert not check_solution(one.problem, " ".join([*steps, steps[0]])).is_right
        if len(steps) > 1:
            assert not check_solution(one.problem, " ".join([steps[-1], *steps[:-1]])).is_right
    problem = "The number of each A X's B Y equals 4. The number of each A X's C Z equals 3. How many B Y does A X have?"
    right, idle = "Define A X's B Y as p; so p = 4.", "Define A X's C Z as q; so q = 3."
    assert check_solution(problem, right).is_right
    verdict = check_solution(problem, f"{idle} {right}")
    assert not verdict.is_right and verdict.num_unnecessary == 1 and verdict.num_right == 2 and "not necessary" in verdict.fault


@pytest.mark.parametrize(
    ("solution", "fault"),
    [
        ("Define A X's B Y as p; so p = 4. Define A X's C Z as p; so p = 4 + p = 4 + 4 = 8.", "uses the letter p again"),
        ("Define A X's C Z as p; so p = 4 + q = 4 + 4 = 8.", "uses the letter q before it is defined"),
        ("Define A X's D V as p; so p = 4.", "does not have"),
        ("Define A X's B Y as p; so p = 4. Define A X's C Z as q; so q = 5 + p = 5 + 4 = 9.", "does not use"),
        ("Define A X's B Y as p; so p = 4. Define A X's C Z as q; so q = p = 4.", "does not use"),
        ("Define A X's B Y as p; so p = 4. Define A X's C Z as q; so q = 4 * p = 4 * 4 = 16.", "adds, subtracts or multiplies"),
        ("Define A X's B Y as p; q = 4.", "has no conclusion"),
        ("I think it is 8.", "is no definition"),
    ],
)
def test_the_first_fault_is_named(solution, fault):
    problem = (
        "The number of each A X's B Y equals 4. The number of each A X's C Z equals 4 more than each A X's B Y. How many C Z does A X have?"
    )
    assert fault in check_solution(problem, solution).fault
    assert check_solution(problem, "Define A X's B Y as u; so u = 4. Define A X's C Z as q; so q = 4 + u = 4 + 4 = 8.").is_right


@given(st.text(max_size=300) | st.text(alphabet="Define A X's B Y as p; so = +-*0123456789.", max_size=200))
@settings(max_examples=100, deadline=None)
def test_whatever_a_model_writes_gets_a_verdict(text):
    problem = "The number of each A X's B Y equals 4. How many B Y does A X have?"
    verdict = check_solution(problem, text)
    assert 0 <= verdict.num_right <= verdict.num_steps


def test_definitions_in_circles_are_refused_and_not_followed_forever():
    problem = "The number of each A X's B Y equals each A X's C Z. The number of each A X's C Z equals each A X's B Y. How many C Z does A X have?"
    assert "does not have" in check_solution(problem, "Define A X's B Y as p; so p = 4.").fault
