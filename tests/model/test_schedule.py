"""The learning rate has the shape that the config names."""

import math

import pytest

from megatron_exp.config.schema import ScheduleConfig
from megatron_exp.errors import UserError
from megatron_exp.model.schedule import Schedule
from megatron_exp.stream.slot import Geometry

GEOMETRY = Geometry(sequence_length=16, global_batch_size=4, steps=100)


def rates(**config: object) -> list[float]:
    schedule = Schedule.of(ScheduleConfig.model_validate({"peak_lr": 2e-3, **config}), 1e-3, GEOMETRY)
    return [schedule.learning_rate(step) for step in range(GEOMETRY.steps)]


def test_warm_up_grows_linearly_to_the_peak_and_starts_above_zero() -> None:
    values = rates(kind="constant", warmup_steps=10)
    assert values[:10] == pytest.approx([2e-3 * (step + 1) / 10 for step in range(10)])
    assert set(values[10:]) == {2e-3}


def test_cosine_falls_from_the_peak_to_the_final_factor_over_the_run() -> None:
    values = rates(kind="cosine", warmup_steps=20, final_factor=0.1)
    assert values[19] == 2e-3
    assert values[59] == pytest.approx((2e-3 + 2e-4) / 2)
    assert values[-1] == pytest.approx(2e-4)
    assert all(later < earlier for earlier, later in zip(values[19:], values[20:], strict=False))


def test_a_horizon_behind_the_last_step_makes_the_cosine_nearly_flat() -> None:
    horizon_steps = 10_000
    values = rates(kind="cosine", horizon_tokens=horizon_steps * 16 * 4, final_factor=0.0)
    assert values[-1] == pytest.approx(2e-3 * (1 + math.cos(math.pi * 100 / horizon_steps)) / 2)


def test_a_horizon_before_the_last_step_leaves_the_rate_at_its_lowest() -> None:
    assert rates(kind="cosine", horizon_tokens=50 * 16 * 4, final_factor=0.1)[50:] == pytest.approx([2e-4] * 50)


@pytest.mark.parametrize("kind", ["cosine", "constant"])
def test_from_decay_start_on_the_rate_is_a_line_that_would_be_zero_after_the_last_step(kind: str) -> None:
    values, base = rates(kind=kind, decay_start=60), rates(kind=kind)
    assert values[:61] == base[:61]
    assert values[60:] == pytest.approx([base[60] * (100 - step) / 40 for step in range(60, 100)])
    assert values[-1] > 0


def test_the_preset_gives_the_peak_where_the_config_names_none() -> None:
    assert Schedule.of(ScheduleConfig(kind="constant"), 7e-4, GEOMETRY).learning_rate(50) == 7e-4


@pytest.mark.parametrize(
    "config",
    [
        {"warmup_steps": 101},
        {"warmup_steps": 50, "decay_start": 40},
        {"decay_start": 100},
        {"warmup_steps": 10, "horizon_tokens": 10 * 16 * 4},
    ],
)
def test_moments_that_do_not_follow_each_other_are_refused(config: dict[str, object]) -> None:
    with pytest.raises(UserError, match="training.schedule"):
        rates(**config)
