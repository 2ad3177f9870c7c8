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
    counted: dict[str, list[torch.Tensor]] = {part: [] for part in PARTS.values()}
    if layout.dp_rank == 0 and layout.cp_rank == 0:
        for chunk in model.chunks:
            for name, weight in chunk.named_parameters():
                if layout.tp_rank == 0 or getattr(weight, "tensor_model_parallel", False):
                    counted[part_of(name)].append(weight.detach())
    squares = torch.stack([_sum_of_squares(weights, layout.device) for weights in counted.values()]).cpu()  # the only wait for the device
    return dict(zip(counted, sum_over_processes(layout, squares).sqrt().tolist(), strict=True))


def _sum_of_squares(weights: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Of all elements, float64 []; a GPU reads all weights in few kernels."""
    if not weights:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(weights, dtype=torch.float32)).double().square().sum()
