"""Which positions of a sequence a rank holds, under context and sequence parallelism. Shapes are stated per function."""

import torch

from megatron_exp.parallel.layout import Layout


def rank_positions(length: int, rank: int, context_size: int, device: torch.device | None = None) -> torch.Tensor:
    """int64 [length / context_size]: the positions of a context-parallel rank, chunks r and 2c - 1 - r of 2c (balanced causal work)."""
    positions = torch.arange(length, device=device)
    if context_size == 1:
        return positions
    chunks = positions.chunk(2 * context_size)
    return torch.cat([chunks[rank], chunks[2 * context_size - 1 - rank]])


def batch_positions(layout: Layout, length: int) -> torch.Tensor:
    """int64 [length / cp]: the positions of a batch that this process feeds to its model."""
    return rank_positions(length, layout.cp_rank, layout.cp_size, layout.device)


def embedding_positions(layout: Layout, length: int) -> torch.Tensor:
    """int64: the positions whose embeddings this process holds (sequence parallelism divides them once more, in order)."""
    positions = batch_positions(layout, length)
    return positions.chunk(layout.tp_size)[layout.tp_rank] if layout.sequence_parallel else positions


def length_multiple(layout: Layout) -> int:
    """A sequence length must be a multiple of this to be divided."""
    context = 2 * layout.cp_size if layout.cp_size > 1 else 1
    return context * (layout.tp_size if layout.sequence_parallel else 1)
