"""Cross entropy and log-normaliser over a vocabulary that is divided among tensor ranks.

Chunked over tokens: no full fp32 copy of the logits exists, forward or backward. The log-normaliser is a second, differentiable
output, so the z-loss (weight times its square) is plain arithmetic for the caller and not part of the negative log-likelihood.

On a GPU the arithmetic of a chunk is compiled into one pass over the logits each way: operation by operation it would read and write
them in fp32 some eight times, which costs a 1B model a tenth of its speed.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from megatron_exp.model.compiled import compiled_on_gpu, compiles

_CHUNK_ELEMENTS_COMPILED = 1 << 30
_CHUNK_ELEMENTS_CUDA = 1 << 26
_CHUNK_ELEMENTS_CPU = 1 << 19
"""Logits handled at a time: as many as 32 bits count; 256 MiB of fp32, enough to fill a GPU; 2 MiB of fp32, which stay in a CPU's cache
(1.8 times faster than 64 MiB)."""


def token_losses(logits: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood and log-normaliser of each token, in nats.

    Args:
        logits: [..., vocabulary / tp], any float type; this rank's columns.
        labels: int64 [...], ids of the whole vocabulary.
        group: the tensor-parallel group.

    Returns:
        fp32 [...] and fp32 [...], equal on all ranks of the group.
    """
    return _TokenLosses.apply(logits, labels, group)


def _chunks(logits: torch.Tensor) -> Iterator[slice]:
    elements = _CHUNK_ELEMENTS_COMPILED if compiles(logits) else _CHUNK_ELEMENTS_CUDA if logits.is_cuda else _CHUNK_ELEMENTS_CPU
    size = max(1, elements // logits.shape[1])
    return (slice(start, start + size) for start in range(0, logits.shape[0], size))


@compiled_on_gpu
def _read(rows: torch.Tensor, column: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-normaliser of each row, and its logit in a column."""
    wide = rows.float()
    return wide.logsumexp(-1), wide.gather(1, column[:, None])[:, 0]


@compiled_on_gpu
def _derive(rows: torch.Tensor, column: torch.Tensor, normalizer: torch.Tensor, by_both: torch.Tensor, by_score: torch.Tensor) -> torch.Tensor:
    """The gradient of rows, in their type: softmax times `by_both`, less `by_score` in a column."""
    softmax = (rows.float() - normalizer[:, None]).exp()
    is_column = torch.arange(rows.shape[1], device=rows.device) == column[:, None]
    return torch.where(is_column, softmax * by_both[:, None] - by_score[:, None], softmax * by_both[:, None]).to(rows.dtype)


def _derive_in_place(rows: torch.Tensor, column: torch.Tensor, normalizer: torch.Tensor, by_both: torch.Tensor, by_score: torch.Tensor) -> torch.Tensor:
    """The same as `_derive` with one copy of rows in fp32, for where nothing is compiled."""
    part = (rows.float() - normalizer[:, None]).exp_().mul_(by_both[:, None])
    return part.scatter_add_(1, column[:, None], -by_score[:, None])


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, torch.Tensor]:
        rows = logits.flatten(0, -2)
        column = labels.flatten() - group.rank() * rows.shape[1]
        is_ours = (column >= 0) & (column < rows.shape[1])
        column = column.where(is_ours, 0)
        normalizer, score = rows.new_empty((2, len(rows)), dtype=torch.float32)
        for chunk in _chunks(rows):
            normalizer[chunk], score[chunk] = _read(rows[chunk], column[chunk])
        score.mul_(is_ours)
        if group.size() > 1:
            normalizer, score = _combine(normalizer, score, group)
        ctx.save_for_backward(rows, column, is_ours, normalizer)
        return (normalizer - score).view(labels.shape), normalizer.view(labels.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        rows, column, is_ours, normalizer = ctx.saved_tensors
        by_loss, by_normalizer = (gradient.flatten().float() for gradient in gradients)
        result = torch.empty_like(rows)
        derive = _derive if compiles(rows) else _derive_in_place
        by_both, by_score = by_loss + by_normalizer, by_loss * is_ours
        for chunk in _chunks(rows):
            result[chunk] = derive(rows[chunk], column[chunk], normalizer[chunk], by_both[chunk], by_score[chunk])
        return result.view(*gradients[0].shape, -1), None, None


def _combine(normalizer: torch.Tensor, score: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole vocabulary's log-normaliser and label score from each rank's part: one maximum, one sum."""
    largest = normalizer.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    sums = torch.stack([(normalizer - largest).exp(), score])
    dist.all_reduce(sums, dist.ReduceOp.SUM, group)
    return largest + sums[0].log(), sums[1]


def is_most_likely(logits: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """bool [...]: whether no id has a larger logit than the label, nor an equal one and a lower id; arguments as for `token_losses`."""
    largest, best = logits.max(dim=-1)
    best = best + group.rank() * logits.shape[-1]
    if group.size() > 1:
        everywhere = largest.clone()
        dist.all_reduce(everywhere, dist.ReduceOp.MAX, group)
        best = best.where(largest == everywhere, torch.iinfo(best.dtype).max)
        dist.all_reduce(best, dist.ReduceOp.MIN, group)
    return best == labels
