"""Speed is that of the model, whatever the layout, and what is written is what TensorBoard shows."""

import math
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_exp.config.schema import ModelConfig
from megatron_exp.model.parts import PARTS
from megatron_exp.model.presets import resolve_shape
from megatron_exp.stream.slot import Geometry
from megatron_exp.training.hooks import metrics
from megatron_exp.training.metrics_log import MetricsLog
from megatron_exp.training.norms import weight_norms
from tests.model.tiny import randomize, running, tiny_model


def a_run(world_size: int, seconds: float) -> Any:
    geometry = Geometry(sequence_length=4096, global_batch_size=512, steps=10)
    return SimpleNamespace(
        last=SimpleNamespace(seconds=seconds),
        plan=SimpleNamespace(base=SimpleNamespace(geometry=geometry)),
        model=SimpleNamespace(shape=resolve_shape(ModelConfig(preset="olmo2-1b"), 100_278, 4096)),
        layout=SimpleNamespace(world_size=world_size, device=None),
    )


def test_utilisation_is_the_share_of_what_all_processes_could_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "peak_flops", lambda device: 1e15)
    speed = metrics.Speed.of(a_run(world_size=8, seconds=4.0))
    tokens = 512 * 4096 / 4.0
    assert speed.tokens_per_second == tokens
    by_hand = 6 * (16 * (4 * 2048**2 + 3 * 2048 * 8192) + 100_352 * 2048) + 6 * 16 * 2048 * 4096
    assert speed.flops_per_second == pytest.approx(tokens * by_hand / 8)
    assert speed.mfu == pytest.approx(tokens * by_hand / 8e15)
    assert metrics.Speed.of(a_run(16, 4.0)).mfu == pytest.approx(speed.mfu / 2)
    monkeypatch.setattr(metrics, "peak_flops", lambda device: None)
    assert metrics.Speed.of(a_run(8, 4.0)).mfu is None


def test_tensorboard_shows_every_number_of_every_line(tmp_path: Any) -> None:
    log = MetricsLog(tmp_path, attempt=1, step=0)
    log.write(1, {"loss": 2.5, "norms": {"input": 1.0, "output": 3.0}})
    log.write(2, {"loss": 2.25})
    log.close()
    assert [orjson.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_bytes().splitlines()] == [2.5, 2.25]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(1, 2.5), (2, 2.25)]
    assert [event.value for event in board.Scalars("norms/output")] == [3.0]


def test_weight_norms_are_those_of_all_weights_of_a_part_and_of_a_layer():
    with running() as layout:
        model = tiny_model(layout)
        randomize(model)
        norms = weight_norms(model)
        weights = {name: weight.detach().double().square().sum() for name, weight in model.chunks[0].named_parameters()}
    for layer, norm in norms.layers.items():
        assert norm == pytest.approx(math.sqrt(sum(square for name, square in weights.items() if f".layers.{layer}." in name)))
    for start, part in PARTS.items():
        assert norms.parts[part] == pytest.approx(math.sqrt(sum(square for name, square in weights.items() if name.startswith(start))))
