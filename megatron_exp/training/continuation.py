"""Many short trainings from one loaded checkpoint, each bitwise what a process of its own would give."""

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

from megatron_exp.checkpoint.catalogue import read_record
from megatron_exp.checkpoint.state import load_checkpoint
from megatron_exp.config.schema import Config, TrainingConfig
from megatron_exp.model.build import build_model
from megatron_exp.model.optimizer import build_optimizer
from megatron_exp.model.presets import ModelShape, find_preset
from megatron_exp.model.schedule import Schedule
from megatron_exp.model.snapshot import Snapshot
from megatron_exp.model.step import micro_batch_rows, train_step
from megatron_exp.parallel.layout import Layout
from megatron_exp.scoring.engine import Scorer
from megatron_exp.stream.slot import Geometry
from megatron_exp.training.data import Feed, Stream

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Continuation:
    """A checkpoint in memory. `train` starts from it again every time; the state left behind is what `scorer` asks.

    learning_rate: of every update. num_steps, step_seconds: all updates made so far and the time they took, waiting for data included.
    """

    layout: Layout
    scorer: Scorer
    learning_rate: float
    _start: Snapshot
    _training: TrainingConfig
    num_steps: int = field(default=0, init=False)
    step_seconds: float = field(default=0.0, init=False)

    @classmethod
    def open(cls, checkpoint: Path, shape: ModelShape, training: TrainingConfig, layout: Layout, learning_rate: float) -> "Continuation":
        """Load weights and, where the checkpoint has it, optimizer state (else moments begin at zero).

        Raises UserError where the checkpoint is damaged or of another model.
        """
        model = build_model(shape, layout, training.precision, 0, training.fp8_recipe)
        if read_record(checkpoint)["optimizer"] is None:
            load_checkpoint(checkpoint, model, None)
            optimizer = build_optimizer(model, training.optimizer)
            logger.info("%s holds weights only: the optimizer begins without moments", checkpoint)
        else:
            optimizer = build_optimizer(model, training.optimizer)
            load_checkpoint(checkpoint, model, optimizer)
        return cls(layout, Scorer(model), learning_rate, Snapshot(model, optimizer), training)

    def train(self, stream: Stream, shard_names: list[str]) -> list[float]:
        """Train from the checkpoint through all steps of a stream's geometry; the loss of every step."""
        self._start.restore()
        model, optimizer = self._start.model, self._start.optimizer
        geometry: Geometry = stream.geometry
        rows = micro_batch_rows(self.layout, geometry.global_batch_size, self._training.micro_batch_size)
        feed = Feed(stream, rows, model.shape.vocabulary_size, shard_names)
        losses = []
        try:
            optimizer.set_learning_rate(self.learning_rate)
            began = time.perf_counter()
            for step in range(geometry.steps):
                losses.append(train_step(model, optimizer, feed.batch(step).micro_batches).loss)
            self.step_seconds += time.perf_counter() - began
        finally:
            feed.close()
        self.num_steps += geometry.steps
        return losses


def rate_at(config: Config, state: int) -> float:
    """The learning rate of the update that follows a state of a run, or of its last one in the final state."""
    geometry = Geometry(**config.geometry.model_dump())
    schedule = Schedule.of(config.training.schedule, find_preset(config.model.preset).peak_lr, geometry)
    return schedule.learning_rate(min(state, geometry.steps - 1))
