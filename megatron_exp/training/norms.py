"""Sizes of the weights, summed over all processes that hold a part of them."""

import re
from collections.abc import Iterator
from typing import NamedTuple

import torch

from megatron_exp.model.build import LanguageModel
from megatron_exp.model.initialization import global_name
from megatron_exp.model.parts import PARTS, part_of
from megatron_exp.parallel.device import sent
from megatron_exp.training.agreement import sum_over_processes


class WeightNorms(NamedTuple):
    """L2 norms. parts: of the input embedding, of all between, and of the output layer. layers: of each layer by its number from 0 on."""

    parts: dict[str, float]
    layers: dict[str, float]


def weight_norms(model: LanguageModel) -> WeightNorms:
    """Norms of the whole model's weights (collective).

    Every weight counts once: one replica and one context rank count, and of a weight that all tensor ranks hold whole, the first.
    """
    model.complete_weights()
    parts = list(PARTS.values())
    places, weights = [], []
    for name, layer, weight in _counted(model):
        places.append(parts.index(part_of(name)) if layer is None else len(parts) + layer)
        weights.append(weight)
    squares = torch.zeros(len(parts) + model.shape.layers, dtype=torch.float64, device=model.layout.device)
    if weights:
        norms = torch.stack(torch._foreach_norm(weights, dtype=torch.float32))  # few kernels on a GPU
        squares.index_add_(0, sent(torch.tensor(places), squares.device), norms.double().square())
    total = sum_over_processes(model.layout, squares.cpu())  # the only wait for the device
    of_parts, of_layers = total[: len(parts)], total[len(parts) :]
    of_parts[parts.index(PARTS["decoder."])] += of_layers.sum()
    return WeightNorms(
        dict(zip(parts, of_parts.sqrt().tolist(), strict=True)),
        {str(layer): norm for layer, norm in enumerate(of_layers.sqrt().tolist())},
    )


def _counted(model: LanguageModel) -> Iterator[tuple[str, int | None, torch.Tensor]]:
    """Name, layer (None outside layers) and tensor of what this process counts."""
    layout = model.layout
    if layout.dp_rank or layout.cp_rank:
        return
    for chunk in model.chunks:
        for name, weight in chunk.named_parameters():
            if layout.tp_rank == 0 or getattr(weight, "tensor_model_parallel", False):
                layer = re.match(r"decoder\.layers\.(\d+)\.", global_name(chunk, name))
                yield name, int(layer[1]) if layer else None, weight.detach()
