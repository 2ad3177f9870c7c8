"""Noise on the input embeddings of single rows: addressed by (key, slot, position, channel), made on the device, never stored."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from megatron.core.models.gpt import GPTModel

from megatron_exp.model.random import grid_normals
from megatron_exp.parallel.layout import Layout
from megatron_exp.parallel.slices import embedding_positions

if TYPE_CHECKING:
    from megatron_exp.stream.base import NoiseSpec


def noise_tensor(
    key: int, slot: int, sequence_length: int, hidden: int, device: torch.device | str = "cpu", positions: torch.Tensor | None = None
) -> torch.Tensor:
    """fp32 [S, hidden] of standard normals, or only the rows of `positions` int64 [p]; any slice equals that part of the whole."""
    rows = torch.arange(sequence_length, device=device) if positions is None else positions
    return grid_normals(key, rows, hidden, stream=slot)


def applied_noise(
    specs: "Sequence[NoiseSpec]",
    sequence_length: int,
    hidden: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """[S, hidden] (or [p, hidden]) as training adds it to one row: the scaled sum, rounded once to the embeddings' type."""
    total = sum(spec.scale * noise_tensor(spec.key, spec.slot, sequence_length, hidden, device, positions) for spec in specs)
    assert isinstance(total, torch.Tensor), "a row without noise has nothing to apply"
    return total.to(dtype)


class EmbeddingNoise:
    """Adds noise to what the embedding of the first pipeline stage returns, for the micro-batch at hand only."""

    def __init__(self, chunks: Sequence[GPTModel], layout: Layout):
        self._layout = layout
        self._rows: Sequence[Sequence[NoiseSpec]] = ()
        for chunk in chunks:
            if chunk.pre_process:
                chunk.embedding.register_forward_hook(self._add, with_kwargs=True)

    def set(self, rows: "Sequence[Sequence[NoiseSpec]]") -> None:
        """The noise of each row of the next forward; rows beyond the list have none."""
        self._rows = rows

    def clear(self) -> None:
        """No noise from here on."""
        self._rows = ()

    def _add(self, module: torch.nn.Module, args: tuple, kwargs: dict, embeddings: torch.Tensor) -> torch.Tensor | None:
        """Embeddings [s of this rank, b, hidden]; the token ids [b, s] tell how long the sequence is."""
        del module, args
        if not any(self._rows):
            return None
        length = kwargs["input_ids"].shape[1] * self._layout.cp_size
        positions = embedding_positions(self._layout, length)
        noise = torch.zeros_like(embeddings)
        for row, specs in enumerate(self._rows):
            if specs:
                noise[:, row] = applied_noise(specs, length, embeddings.shape[2], embeddings.dtype, embeddings.device, positions)
        return embeddings + noise
