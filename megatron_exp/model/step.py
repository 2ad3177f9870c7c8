"""One update of the weights, and forward passes for scoring, in any layout.

Every function here is collective: all ranks of a model replica (tensor, context and pipeline groups) call it together with the
same batch. Only the data-parallel replicas differ in what they are given.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from megatron_exp.model.build import LanguageModel
from megatron_exp.parallel.layout import Layout

if TYPE_CHECKING:
    from megatron_exp.model.optimizer import Optimizer
    from megatron_exp.overlay.overlay import NoiseSpec


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the model together.

    tokens: int64 [b, S + 1], the last is only a label. loss_mask: uint8 [b, S], 1 where the loss of a position counts.
    noise: per row, what is added to its input embeddings.
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
        UserError: where the global batch cannot be divided.
    """
    raise NotImplementedError


def train_step(model: LanguageModel, optimizer: "Optimizer", micro_batches: Sequence[MicroBatch]) -> StepResult:
    """Forward, backward and update over this replica's micro-batches, at the optimizer's current learning rate."""
    raise NotImplementedError


def forward_losses(model: LanguageModel, tokens: torch.Tensor) -> torch.Tensor:
    """fp32 [b, S] negative log-likelihood in nats of tokens[:, 1:], given int64 [b, S + 1]; on every rank of the replica.

    S is free, up to the model's. Training state is untouched; noise is off.
    """
    raise NotImplementedError


def next_token_logits(model: LanguageModel, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """fp32 [b, vocabulary] logits of what follows tokens[i, positions[i]], given int64 [b, L] and [b]; on every rank of the replica.

    What stands right of a row's position is not seen (attention is causal), so ragged prompts are padded on the right.
    """
    raise NotImplementedError


def greedy_tokens(model: LanguageModel, prompts: Sequence[np.ndarray], num_tokens: int) -> np.ndarray:
    """int64 [num_prompts, num_tokens]: the most likely continuation, token by token; ties go to the lower id."""
    raise NotImplementedError


def embedding_gradients(model: LanguageModel, tokens: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
    """fp32 [b, S, hidden]: for each row, the gradient of its summed unmasked losses by its input embeddings; on every rank.

    No parameter receives a gradient: training state is untouched.
    """
    raise NotImplementedError
