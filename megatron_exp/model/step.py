"""One update of the weights, in any layout.

Collective: all ranks call it together; the ranks of a model replica (tensor, context and pipeline groups) pass the same rows.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_exp.errors import UserError
from megatron_exp.model.build import LanguageModel
from megatron_exp.model.optimizer import Optimizer, data_parallel_group
from megatron_exp.model.presets import Z_LOSS_WEIGHT
from megatron_exp.parallel.device import received, sent
from megatron_exp.parallel.layout import Layout
from megatron_exp.parallel.slices import batch_positions

if TYPE_CHECKING:
    from megatron_exp.stream.base import NoiseSpec


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the model together.

    tokens: int64 [b, S + 1], the last is only a label. loss_mask: uint8 [b, S], 1 where the loss of a position counts.
    Both have no content (device "meta") on a stage that reads no data, see `Layout.reads_data`.
    noise: per row, what is added to its input embeddings; may be left empty.
    """

    tokens: torch.Tensor
    loss_mask: torch.Tensor
    noise: "Sequence[Sequence[NoiseSpec]]" = ()


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What an update saw, equal on every rank.

    loss: mean negative log-likelihood in nats over the global batch's unmasked tokens. z_loss: mean of the weighted squared
    log-normaliser that is trained with it. grad_norm: of the whole gradient before clipping. num_tokens: unmasked tokens.
    """

    loss: float
    z_loss: float
    grad_norm: float
    num_tokens: int


def micro_batch_rows(layout: Layout, global_batch_size: int, micro_batch_size: int) -> list[range]:
    """The rows of a step's global batch that this process's replica reads, one range per micro-batch.

    Micro-batch m of replica r holds rows (m * dp + r) * size onwards, so the global batch is the same set in any layout.

    Raises:
        UserError: where the global batch cannot be divided, or not into as many micro-batches as interleaved stages need.
    """
    at_once = micro_batch_size * layout.dp_size
    if global_batch_size % at_once:
        raise UserError(
            f"geometry.global_batch_size = {global_batch_size} cannot be divided into micro-batches of training.micro_batch_size = {micro_batch_size} "
            f"on {layout.dp_size} data-parallel replicas: {at_once} slots go through at once. Choose a micro_batch_size so that the product divides it."
        )
    starts = range(layout.dp_rank * micro_batch_size, global_batch_size, at_once)
    if layout.virtual_size > 1 and len(starts) % layout.pp_size:
        raise UserError(
            f"training.parallel.virtual = {layout.virtual_size} lets the {layout.pp_size} pipeline stages take turns over groups of {layout.pp_size} "
            f"micro-batches, but a replica has {len(starts)} of them in a step. Choose geometry.global_batch_size and training.micro_batch_size so that their "
            f"number is a multiple of training.parallel.pp, or leave virtual out."
        )
    return [range(start, start + micro_batch_size) for start in starts]


def train_step(model: LanguageModel, optimizer: Optimizer, micro_batches: Sequence[MicroBatch]) -> StepResult:
    """Forward, backward and update over this replica's micro-batches (all of one shape), at the optimizer's current learning rate."""
    optimizer.zero_grad()
    sums = get_forward_backward_func()(
        forward_step_func=lambda batches, chunk: _forward(model, next(batches), chunk),
        data_iterator=[iter(micro_batches) for _ in model.training_chunks],
        model=model.training_chunks,
        num_microbatches=len(micro_batches),
        seq_length=micro_batches[0].loss_mask.shape[1],
        micro_batch_size=len(micro_batches[0].tokens),
        forward_only=False,
    )
    model.noise.clear()
    seen = received(_reduced(model.layout, sums))  # before the update, whose end need not be waited for
    gradient_norm = optimizer.step()
    loss, z_loss, num_tokens = seen().tolist()
    return StepResult(loss / num_tokens, z_loss / num_tokens, gradient_norm, int(num_tokens))


def _forward(model: LanguageModel, batch: MicroBatch, chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """One micro-batch through one chunk, as megatron's schedules ask; the second value turns the output into a loss."""
    if not model.layout.reads_data:
        return chunk(None, None, None), None  # megatron asks for a loss on the last stage only
    inputs, labels, mask = split_batch(model.layout, batch.tokens, batch.loss_mask)
    model.noise.set(batch.noise)
    output = chunk(inputs, None, None, labels=labels)
    return output, lambda losses: _summed_loss(losses, mask)


def split_batch(layout: Layout, tokens: torch.Tensor, loss_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, labels and mask [b, s] of the positions this process computes, from tokens [b, S + 1] and mask [b, S].

    Labels are made from whole slots, before the sequence is divided over context-parallel ranks.
    """
    tokens, loss_mask = sent(tokens, layout.device), sent(loss_mask, layout.device)
    positions = batch_positions(layout, loss_mask.shape[1]) if layout.cp_size > 1 else slice(None)  # all, without a kernel
    return tokens[:, :-1][:, positions], tokens[:, 1:][:, positions], loss_mask[:, positions]


def _summed_loss(losses: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss to minimise, number of tokens, and what is logged: sums of likelihood and z-loss. Megatron divides by the global number."""
    counted = mask.to(losses.dtype)
    nll = (losses[..., 0] * counted).sum()
    z_loss = Z_LOSS_WEIGHT * (losses[..., 1].square() * counted).sum()
    num_tokens = mask.sum(dtype=torch.int32)
    # Detached copies in float64: the schedules change the loss in place.
    logged = torch.stack([nll, z_loss, num_tokens]).detach().double()
    return nll + z_loss, num_tokens, logged


def _reduced(layout: Layout, sums: list[torch.Tensor]) -> torch.Tensor:
    """float64 [3]: the sums of all micro-batches of all replicas, from the last pipeline stage to every rank."""
    total = torch.stack(sums).sum(0) if layout.is_last_stage else torch.zeros(3, dtype=torch.float64, device=layout.device)
    dist.all_reduce(total, group=data_parallel_group())
    return from_last_stage(layout, total)


def from_last_stage(layout: Layout, value: torch.Tensor) -> torch.Tensor:
    """The last pipeline stage's tensor on every stage; the others pass one of the same shape and type, which is filled."""
    if layout.pp_size > 1:
        group = parallel_state.get_pipeline_model_parallel_group()
        dist.broadcast(value, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    return value
