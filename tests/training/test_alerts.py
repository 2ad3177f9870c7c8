"""Alerts: what is unusual is said once, what is planned is not, and nothing that an experiment asks is looked at."""

import math
import threading
from pathlib import Path

import numpy as np
import orjson
import pytest

from megatron_exp.checkpoint.catalogue import list_checkpoints
from megatron_exp.errors import UserError
from megatron_exp.manifest.reader import Manifest
from megatron_exp.model.step import StepResult
from megatron_exp.run_record import RunRecord, Series
from megatron_exp.seeding import Words
from megatron_exp.training import loop
from megatron_exp.training.alerts import Drift, Spikes, Waits, planned_exceptions
from megatron_exp.training.hooks.alerts import StallWatch
from megatron_exp.training.train import REQUEUE, train
from tests.training.toy import STEPS

LOSSES = 4.0 + 0.02 * Words.of(0, "losses").normals(400)


def kinds(spikes: Spikes, losses: np.ndarray, first: int = 1, gradient_norm: float = 1.0) -> list[tuple[str, int]]:
    return [(alert.kind, alert.step) for step, loss in enumerate(losses, first) for alert in spikes.look(step, float(loss), gradient_norm)]


def test_usual_noise_and_a_falling_loss_raise_no_alert() -> None:
    assert kinds(Spikes({}), LOSSES) == []
    assert kinds(Spikes({}), LOSSES + 6 * np.exp(-np.arange(400) / 50)) == []


def test_a_spike_is_one_alert_and_the_next_episode_another() -> None:
    losses = LOSSES.copy()
    losses[200:205] += 1.0
    losses[300] += 1.0
    assert kinds(Spikes({}), losses) == [("loss_spike", 201), ("loss_spike", 301)]


def test_a_planned_exception_is_no_spike_and_is_not_remembered() -> None:
    losses = LOSSES.copy()
    losses[200:290] += 1.0
    planned = Spikes({step: "forgetting" for step in range(200, 290)})
    assert kinds(planned, losses) == []
    assert planned.state["loss"] == [*LOSSES[290 - 90 - 18 : 200], *LOSSES[290:]]


def test_a_gradient_norm_ten_times_the_usual_is_an_alert() -> None:
    spikes = Spikes({})
    assert kinds(spikes, LOSSES[:100]) == []
    assert kinds(spikes, LOSSES[100:101], 101, gradient_norm=11.0) == [("gradient_spike", 101)]


def test_alerts_after_a_resume_are_those_of_the_uninterrupted_run() -> None:
    losses = LOSSES.copy()
    losses[198:203] += 1.0
    whole, first = Spikes({}), Spikes({})
    kinds(first, losses[:200])
    resumed = Spikes({}, orjson.loads(orjson.dumps(first.state)))
    kinds(whole, losses[:200])
    assert kinds(resumed, losses[200:], 201) == kinds(whole, losses[200:], 201)


def series(values: np.ndarray) -> Series:
    return Series(np.arange(len(values)), values)


def drifts(drift: Drift, values: np.ndarray) -> list[int]:
    return [alert.step for step, value in enumerate(values) for alert in drift.look(step, float(value))]


def test_a_constant_difference_from_the_twin_is_no_drift_and_a_growing_one_is() -> None:
    twin, noise = 3.0 + np.exp(-np.arange(60) / 20), 0.001 * Words.of(0, "validation").normals(60)
    assert drifts(Drift("loss", [series(twin)], 1), twin + 0.05 + noise) == []
    grown = twin + 0.05 + noise + np.where(np.arange(60) > 40, 0.1, 0.0)
    assert drifts(Drift("loss", [series(twin)], 1), grown)[:1] == [41]


def test_several_twins_widen_the_band_by_their_own_spread() -> None:
    twins = [series(np.full(30, 3.0)), series(np.full(30, 3.2))]
    values = np.full(30, 3.05)
    values[20:] += 0.2
    assert drifts(Drift("loss", twins, 1), values) == []
    assert drifts(Drift("loss", twins[:1], 1), values) == [20]


def test_after_a_resume_the_same_twins_are_judged_as_before_and_other_ones_anew() -> None:
    twins = [series(np.full(60, 3.0)), series(3.2 + 0.01 * np.arange(60))]
    values = np.full(60, 3.05)
    values[40:] += 0.3
    first, grown = Drift("loss", twins, 3), Drift("loss", twins, 3)
    drifts(first, values[:38])
    state = orjson.loads(orjson.dumps(first.state))
    drifts(grown, values[:38])
    resumed = Drift("loss", twins, 3, state)
    later = [(step, float(values[step])) for step in range(38, 60)]
    assert [list(resumed.look(*one)) for one in later] == [list(grown.look(*one)) for one in later]
    for others in (twins[:1], [*twins, twins[0]], twins[::-1]):
        again = Drift("loss", others, 3, state)
        assert (again.state["waiting"], again.state["past"]) == ([], [])
        assert all(not list(again.look(*one)) for one in later[:2])


def late_states(waits: list[float]) -> list[int]:
    rule = Waits()
    return [alert.step for step, waited in enumerate(waits, start=1) for alert in rule.look(step, waited, waited + 0.1)]


def test_data_that_is_late_is_one_alert_and_a_cold_start_is_none() -> None:
    assert late_states([9.0] + [0.0] * 200) == []
    assert late_states([0.0] + [1.0] * 5) == []
    assert late_states([0.0] + [0.1] * 200) == [33]


def test_states_without_a_twin_are_not_judged() -> None:
    assert drifts(Drift("loss", [series(np.full(10, 3.0))], 1), np.full(30, 9.0)) == [0]


def test_planned_exceptions_are_the_swapped_batches_and_not_single_noised_slots(manifest: Path) -> None:
    opened = Manifest.open(manifest)
    rows = [row for row in opened.insertions().to_pylist() if row["experiment"] == "forgetting"]
    planned = planned_exceptions(opened, frozenset({"watermarks"}))
    assert planned == {row["step"]: "forgetting" for row in rows}
    assert planned_exceptions(opened, frozenset({"forgetting", "watermarks"})) == {}


def test_a_stall_is_said_once() -> None:
    said: list[object] = []
    heard = threading.Event()
    watch = StallWatch(lambda attempt, alert: (said.append((attempt, alert.kind, alert.step)), heard.set()), shortest_seconds=0.05)
    watch.start(2, 7)
    assert heard.wait(10)
    watch.stop()
    assert said == [(2, "stall", 7)]


def broken_in(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = loop.train_step
    made = []

    def train_step(model, optimizer, micro_batches):
        made.append(real(model, optimizer, micro_batches))
        return StepResult(math.nan, 0.0, 1.0, 1) if len(made) == step + 1 else made[-1]

    monkeypatch.setattr(loop, "train_step", train_step)


def test_a_loss_that_is_no_number_stops_the_run_without_a_checkpoint(manifest: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_in(7, monkeypatch)
    with pytest.raises(UserError, match="has diverged: in step 7 the loss was nan"):
        train(manifest, run, overrides=["training.checkpoint.every=2", "training.checkpoint.keep=[8]"])
    assert [step for step, _ in list_checkpoints(run)] == [4, 6]
    record = RunRecord.open(run)
    assert [(alert["kind"], alert["step"]) for alert in record.alerts()] == [("not_finite", 8)]
    assert record.record["attempts"][-1]["state"] == "failed"
    assert "has diverged" in record.record["attempts"][-1]["error"]["message"]


@pytest.mark.parametrize(("section", "changes"), [("seeds", {"order": 6199}), ("pool", {"slots": 25}), ("corpus", {"first_slot": 4})])
def test_a_run_on_other_data_is_no_twin(manifest: Path, whole_run: Path, run: Path, section: str, changes: dict[str, int]) -> None:
    record = orjson.loads((whole_run / "run.json").read_bytes())
    record["config"][section] |= changes
    other = run.parent / "other"
    other.mkdir()
    (other / "run.json").write_bytes(orjson.dumps(record))
    with pytest.raises(UserError, match="--against .*differs in the order of the data"):
        train(manifest, run, against=[other])
    assert not run.exists()


def test_a_run_is_compared_with_its_twin(manifest: Path, whole_run: Path, run: Path) -> None:
    assert train(manifest, run, against=[whole_run], stop_at=6) == REQUEUE
    state = orjson.loads(next((run / "checkpoints").glob("step-*6/checkpoint.json")).read_bytes())["extra"]["hooks"]["alerts"]
    assert state["validation_loss"]["past"] == [0.0], "the same run is nowhere apart from itself; state 0 is before the first update"
    assert len(state["spikes"]["loss"]) + len(planned_exceptions(Manifest.open(manifest), frozenset()).keys() & set(range(6))) == 6
    assert STEPS > 6
