"""Rules: the paper's numbers, a PI controller that holds a line, and what both refuse."""

import math

import pytest

from megatron_exp.control.loop import Loop, State
from megatron_exp.control.rules import Answer, HalveOrDouble, ProportionalIntegral, Rule, Situation, find_rule
from megatron_exp.errors import UserError


def situation(number, value, *, aim=0.04, share=0.5, largest=8192, memory=()):
    return Situation(number, value, aim, share, largest, memory)


def loop(rule, **changes):
    values = {"interval": 1000, "bank_size": 40_000, "first": 1, "largest": 8192, "target": 0.08, "num_steps": 100_000}
    return Loop(experiment="ka", probe="target", asked=(0,), arm="main", rule=rule, **(values | changes))


@pytest.mark.parametrize(
    ("share", "number", "value", "wanted"),
    [
        (0.05, 1024, 0.01, 2048),
        (0.05, 1024, 0.5, 512),
        (0.05, 1024, 0.041, 1024),
        (0.05, 7, 0.5, 3),
        (0.19, 1024, 0.01, 2048),  # at step 19,000 itself there is no cap yet
        (0.20, 1024, 0.01, 1280),
        (0.20, 1024, 0.5, 768),
        (0.20, 100, 0.01, 200),
        (0.59, 1024, 0.01, 1280),
        (0.60, 1024, 0.01, 1088),
        (0.60, 1024, 0.5, 960),
    ],
)
def test_the_papers_rule_halves_or_doubles_within_caps(share, number, value, wanted):
    assert HalveOrDouble().answer(situation(number, value, share=share)).number == wanted


def test_the_aim_is_a_line_to_the_target_and_the_band_is_five_percent():
    rule = HalveOrDouble()
    assert rule.aim(0.08, 0.25) == 0.02
    assert [rule.answer(situation(8, value, aim=1.0)).number for value in (0.949, 0.951, 1.049, 1.051)] == [16, 8, 8, 4]


def test_what_is_measured_is_the_mean_probability():
    assert HalveOrDouble().measure([math.log(0.5), math.log(0.1), -800.0]) == pytest.approx(0.2)


def test_a_number_stays_between_one_and_the_largest_and_the_bank_is_handed_out_round_and_round():
    one = loop(HalveOrDouble(), largest=10, bank_size=7)
    state, numbers, handed = None, [], []
    for step in one.states[:12]:
        state = one.decide(state, {0: -50.0 if step < 6000 else 0.0}, step)
        numbers.append(state.number)
        handed += [(state.index + i) % one.bank_size for i in range(state.number)]
    assert numbers == [1, 2, 4, 8, 10, 10, 5, 2, 1, 1, 1, 1]
    assert handed == [i % 7 for i in range(sum(numbers))]


def test_the_first_interval_is_declared_and_an_unscored_query_leaves_the_number_alone():
    one = loop(HalveOrDouble(), first=6)
    start = one.decide(None, {}, 0)
    assert (start.number, start.value, start.handed) == (6, None, 0)
    held = one.decide(start, {0: None}, 1000)
    assert (held.number, held.value, held.handed, held.index) == (6, None, 6, 6)
    assert one.decide(held, {0: -50.0}, 2000).number == 12


def test_a_state_survives_json():
    state = State(3, 4, 5, 1, None, 0.25, (0.1, -3.0))
    assert State.of(state.record()) == state


class Learner:
    """Knows what it was shown lately: log v follows log of the copies with a delay, as in a model that forgets."""

    def __init__(self):
        self.level = math.log(1e-6)

    def interval(self, number):
        self.level += 0.5 * (math.log(1e-4 * number) - self.level)
        return self.level


def mean_error(rule):
    """Mean |log(value / aim)| in the second half of training."""
    one, learner, state, errors, nats = loop(rule), Learner(), None, [], 0.0
    for step in one.states:
        state = one.decide(state, {0: nats}, step)
        if step >= 50_000:
            errors.append(abs(math.log(state.value / state.aim)))
        nats = learner.interval(state.number)
    return sum(errors) / len(errors)


def test_the_pi_controller_holds_the_line_where_halving_and_doubling_without_caps_oscillates():
    pi, uncapped = mean_error(ProportionalIntegral()), mean_error(HalveOrDouble(caps=((0.0, None),)))
    assert pi < 0.1
    assert pi < uncapped / 2


def test_the_pi_controller_leaves_one_although_rounding_would_hold_it_there():
    rule, number, memory = ProportionalIntegral(integral=0.05, proportional=0.0), 1, ()
    for _ in range(20):
        number, memory = rule.answer(situation(number, 1e-9, memory=memory))
    assert number > 2


def test_the_pi_controller_does_not_wind_up_at_the_limit():
    rule, number, memory = ProportionalIntegral(), 1, ()
    for _ in range(200):
        number, memory = rule.answer(situation(number, 1e-9, largest=64, memory=memory))
    assert number == 64
    number, memory = rule.answer(situation(number, 0.4, memory=memory, largest=64))
    assert number < 40


class Constant(Rule):
    """A rule of somebody else."""

    copies: int = 3

    def answer(self, now):
        return Answer(self.copies)


NOT_A_RULE = 1


def test_a_rule_of_somebody_else_is_found_by_module_and_class():
    assert find_rule("tests.control.test_rules:Constant", {"copies": 5}).copies == 5


@pytest.mark.parametrize(
    ("name", "parameters", "words"),
    [
        ("halve", {}, "There is no rule 'halve'. There are halve_or_double"),
        ("halve_or_double", {"uper": 2}, "uper: Extra inputs.*It takes upper, lower, caps"),
        ("halve_or_double", {"caps": [[0.2, 4]]}, "caps must begin at 0 and rise"),
        ("halve_or_double", {"lower": 2.0}, "lower 2.0 is above upper"),
        ("no_such_module:Rule", {}, "cannot be imported"),
        ("tests.control.test_rules:NOT_A_RULE", {}, "defines no subclass"),
        ("tests.control.test_rules:Missing", {}, "defines no subclass"),
    ],
)
def test_an_unknown_rule_or_parameter_is_refused(name, parameters, words):
    with pytest.raises(UserError, match=words):
        find_rule(name, parameters)
