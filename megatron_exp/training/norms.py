"""Sizes of the weights, summed over all processes that hold a part of them."""

import torch

from megatron_exp.model.build import LanguageModel
from megatron_exp.model.parts import PARTS, part_of
from megatron_exp.training.agreement import sum_over_processes


def weight_norms(model: LanguageModel) -> dict[str, float]:
    """L2 norm of the weights of the input embedding, of all layers between, and of the output layer (collective).

    Every weight counts once: one replica and one context rank count, and of a weight that all tensor ranks hold whole, the first.
    """
    layout = model.layout
    model.complete_weights()
    squares = {part: torch.zeros((), dtype=torch.float64, device=layout.device) for part in PARTS.values()}
    if layout.dp_rank == 0 and layout.cp_rank == 0:
        for chunk in model.chunks:
            for name, weight in chunk.named_parameters():
                if layout.tp_rank == 0 or getattr(weight, "tensor_model_parallel", False):
                    squares[part_of(name)] += torch.linalg.vector_norm(weight.detach(), dtype=torch.float32).double().square()
    total = sum_over_processes(layout, torch.stack(list(squares.values())).cpu())  # the only wait for the device
    return dict(zip(squares, total.sqrt().tolist(), strict=True))
