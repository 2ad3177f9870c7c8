"""Windows given as fractions of training."""

from hypothesis import given
from hypothesis import strategies as st

from megatron_exp.experiments.conformance import toy_context
from megatron_exp.experiments.windows import Window

fractions = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted)


@given(fractions, st.integers(1, 100_000))
def test_a_window_of_fractions_is_a_part_of_the_run_and_never_empty(part, steps):
    window = Window.of_fractions(part, steps)
    assert 0 <= window.start < window.end <= steps
    assert abs(window.start - part[0] * steps) <= 1 and abs(window.end - part[1] * steps) <= 1


def test_a_context_knows_the_steps_of_its_run():
    context = toy_context("windows")
    steps = context.geometry.steps
    assert context.window((0.0, 1.0)) == Window(0, steps)
    assert context.window((0.5, 1.0)) == Window(steps // 2, steps)
