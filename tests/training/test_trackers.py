"""Services for looking at metrics: what they get, and that nothing they do reaches the run."""

import logging
import sys
import threading
import types
from pathlib import Path

import pytest

from megatron_exp.training import trackers
from megatron_exp.training.metrics_log import MetricsLog
from megatron_exp.training.trackers import Detached
from megatron_exp.training.train import REQUEUE, train
from tests.training.processes import metrics


class Remembering:
    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.is_closed = False

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self.lines.append((step, numbers))

    def close(self) -> None:
        self.is_closed = True


def test_a_tracker_gets_every_number_under_the_name_of_tensorboard(tmp_path: Path) -> None:
    service = Remembering()
    log = MetricsLog(tmp_path, 1, 0, [Detached("a service", lambda: service)])
    log.write(1, {"loss": 2.0, "norms": {"input": 3.0}})
    log.close()
    assert service.lines == [(1, {"loss": 2.0, "norms/input": 3.0})]
    assert service.is_closed


def fake_wandb(fails_in: str) -> types.ModuleType:
    """A module that raises in one of its calls."""

    def call(name: str, answer: object = None) -> object:
        def called(*arguments: object, **options: object) -> object:
            if name == fails_in:
                raise RuntimeError(f"{name} is down")
            return answer

        return called

    run = types.SimpleNamespace(**{name: call(name) for name in ("define_metric", "log", "finish")})
    module = types.ModuleType("wandb")
    module.init = call("init", run)  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize("fails_in", ["init", "log", "finish", "import"])
def test_whatever_wandb_raises_is_logged_once_and_the_run_goes_on(
    manifest: Path, run: Path, fails_in: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None if fails_in == "import" else fake_wandb(fails_in))
    with caplog.at_level(logging.WARNING):
        assert train(manifest, run, overrides=["training.wandb_project=mine"], stop_at=3) == REQUEUE
    assert caplog.text.count("W&B gets no more metrics") == 1
    assert [line["step"] for line in metrics(run) if "loss" in line] == [1, 2, 3]


def test_a_tracker_that_hangs_delays_neither_writing_nor_the_end(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(trackers, "_MOST_WAITING", 3)
    for num_lines, why in ((10, "3 lines wait"), (1, "did not end within")):
        monkeypatch.setattr(trackers, "_CLOSING_SECONDS", 0.05)
        release = threading.Event()
        hanging = Detached("a service", release.wait)  # type: ignore[arg-type]
        for step in range(num_lines):
            hanging.write(step, {})
        hanging.close()
        release.set()
        assert why in caplog.text
        caplog.clear()
