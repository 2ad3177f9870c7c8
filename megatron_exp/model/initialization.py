"""Initial weights that are a function of (seed, global parameter name, global element): the same in every layout.

Each rank makes only its own slice. Matrices are normal with standard deviation 0.02 cut off at 3 of them, norms are 1 (OLMo-2).
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes

from megatron_exp import seeding
from megatron_exp.model.presets import INIT_STD, INIT_TRUNCATION
from megatron_exp.model.random import grid_truncated_normals
from megatron_exp.parallel.layout import Layout

_DIVIDED_BY_ROWS = ("word_embeddings.weight", "linear_qkv.weight", "linear_fc1.weight", "output_layer.weight")
_DIVIDED_BY_COLUMNS = ("linear_proj.weight", "linear_fc2.weight")
_CHUNK_ELEMENTS = 1 << 21
"""Elements made at a time: the generator needs about 100 bytes for each."""


class _Piece(NamedTuple):
    """Rows `local` of a rank's matrix are the rows from `first_row` on, columns `columns`, of the global matrix."""

    local: slice
    first_row: int
    columns: range


@torch.no_grad()
def initialize(model: GPTModel, layout: Layout, seed: int) -> None:
    """Give every parameter of this rank its initial value, and tell megatron how it is divided."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        _mark_division(name, parameter)
        key = seeding.key(seed, "init", global_name(model, name))
        for piece in _pieces(name, parameter, layout):
            _fill(parameter, piece, key)


def global_name(model: GPTModel, name: str) -> str:
    """The name of a parameter with its layer counted over all pipeline stages."""
    found = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
    if not found:
        return name
    return f"decoder.layers.{model.decoder.layers[int(found[1])].layer_number - 1}.{found[2]}"


def _mark_division(name: str, parameter: torch.nn.Parameter) -> None:
    """The mark that megatron's own initialisation would leave; gradient norms count unmarked parameters on one tensor rank only."""
    if not hasattr(parameter, "tensor_model_parallel"):
        set_tensor_model_parallel_attributes(parameter, True, 1 if name.endswith(_DIVIDED_BY_COLUMNS) else 0, 1)


def _pieces(name: str, parameter: torch.nn.Parameter, layout: Layout) -> Iterator[_Piece]:
    rows, columns = parameter.shape
    if name.endswith("linear_fc1.weight"):  # gate above up, each divided by itself
        half = rows // 2
        yield _Piece(slice(0, half), layout.tp_rank * half, range(columns))
        yield _Piece(slice(half, rows), (layout.tp_size + layout.tp_rank) * half, range(columns))
    elif name.endswith(_DIVIDED_BY_COLUMNS):
        yield _Piece(slice(0, rows), 0, range(layout.tp_rank * columns, (layout.tp_rank + 1) * columns))
    else:
        assert name.endswith(_DIVIDED_BY_ROWS), f"how is {name} divided over tensor ranks?"
        yield _Piece(slice(0, rows), layout.tp_rank * rows, range(columns))


def _fill(parameter: torch.nn.Parameter, piece: _Piece, key: int) -> None:
    rows_at_once = max(1, _CHUNK_ELEMENTS // len(piece.columns))
    for start in range(piece.local.start, piece.local.stop, rows_at_once):
        stop = min(start + rows_at_once, piece.local.stop)
        first = piece.first_row + start - piece.local.start
        rows = torch.arange(first, first + stop - start, device=parameter.device)
        parameter[start:stop] = INIT_STD * grid_truncated_normals(key, rows, piece.columns, INIT_TRUNCATION)
