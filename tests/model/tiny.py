"""The smallest real model, and batches for it."""

import contextlib
from collections.abc import Iterator, Sequence

import torch

from megatron_exp.config.schema import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_exp.model.build import LanguageModel, build_model
from megatron_exp.model.optimizer import Optimizer, build_optimizer
from megatron_exp.model.precision import Precision
from megatron_exp.model.presets import ModelShape, resolve_shape
from megatron_exp.model.step import MicroBatch, StepResult, micro_batch_rows, train_step
from megatron_exp.parallel.layout import Layout, start_parallel

VOCABULARY = 384
LENGTH = 32
ROWS = 4


@contextlib.contextmanager
def running(parallel: ParallelConfig | None = None) -> Iterator[Layout]:
    layout = start_parallel(parallel or ParallelConfig(), threads=1)
    try:
        yield layout
    finally:
        layout.stop()


def tiny_shape(**overrides: int) -> ModelShape:
    numbers = {"layers": 2, "hidden": 32, "heads": 4, "ffn": 48, **overrides}
    return resolve_shape(ModelConfig(**numbers), VOCABULARY, LENGTH)


def tiny_model(layout: Layout, precision: Precision = "fp32", seed: int = 0, **overrides: int) -> LanguageModel:
    return build_model(tiny_shape(**overrides), layout, precision, seed)


def randomize(model: LanguageModel) -> None:
    """Weights large enough for the logits to differ, norms away from 1."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.chunks[0].parameters():
            drawn = (
                torch.rand(parameter.shape, generator=generator)
                if parameter.dim() == 1
                else torch.randn(parameter.shape, generator=generator)
            )
            parameter.copy_(0.5 + drawn if parameter.dim() == 1 else 0.2 * drawn)


def trainable(layout: Layout, precision: Precision = "fp32", seed: int = 0, **overrides: int) -> tuple[LanguageModel, Optimizer]:
    model = tiny_model(layout, precision, seed, **overrides)
    return model, build_optimizer(model, OptimizerConfig())


def tokens_of(step: int, rows: int = ROWS) -> torch.Tensor:
    """int64 [rows, LENGTH + 1]."""
    return torch.randint(0, VOCABULARY, (rows, LENGTH + 1), generator=torch.Generator().manual_seed(step))


def mask_of(step: int, rows: int = ROWS) -> torch.Tensor:
    """uint8 [rows, LENGTH] with a different number of counted positions in every row."""
    mask = torch.ones((rows, LENGTH), dtype=torch.uint8)
    for row in range(rows):
        mask[row, LENGTH - (step + 5 * row) % 13 :] = 0
    return mask


def train(
    model: LanguageModel,
    optimizer: Optimizer,
    steps: Sequence[int],
    micro_batch_size: int | None = None,
    noise: Sequence[Sequence] = (),
    rate: float | None = None,
) -> list[StepResult]:
    """Updates on the rows of each step that belong to this process."""
    size = micro_batch_size or ROWS // model.layout.dp_size
    results = []
    for step in steps:
        optimizer.set_learning_rate(rate or 1e-2 / (step + 1))
        tokens, mask = tokens_of(step), mask_of(step)
        rows = [list(part) for part in micro_batch_rows(model.layout, ROWS, size)]
        batches = [MicroBatch(tokens[part], mask[part], [noise[row] for row in part] if noise else ()) for part in rows]
        results.append(train_step(model, optimizer, batches))
    return results


def weights(model: LanguageModel) -> list[torch.Tensor]:
    return [parameter.detach().clone() for chunk in model.chunks for parameter in chunk.parameters()]


def same_weights(one: LanguageModel, other: LanguageModel) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))
