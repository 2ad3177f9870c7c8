"""What Transformer Engine remembers between steps under delayed scaling: the largest values seen, and the scales made from them.

Reading a model runs the same layers, so without care the texts of probes would enter the scales that training goes on with.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch

_DIRECTIONS = ("scaling_fwd", "scaling_bwd")
_REMEMBERED = ("amax_history", "scale", "scale_inv")


@contextlib.contextmanager
def preserved_scaling(modules: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Put back, at the end, what the layers remembered at the beginning; nothing happens where none remembers anything.

    In place, because Transformer Engine keeps references to these tensors. What a layer first made inside is of no consequence: it has
    then not been trained with FP8 yet, and its memory is set back to what it starts with (history 0, scale 1).
    """
    before = {id(tensor): (tensor, tensor.clone()) for _, tensor in _remembered(modules)}  # held, so that no other gets its id
    try:
        yield
    finally:
        for name, tensor in _remembered(modules):
            if id(tensor) in before:
                tensor.copy_(before[id(tensor)][1])
            else:
                tensor.fill_(0.0 if name == "amax_history" else 1.0)


def _remembered(modules: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    for owner in modules:
        for module in owner.modules():
            for direction in _DIRECTIONS:
                meta = getattr(module, "fp8_meta", {}).get(direction)
                for name in _REMEMBERED:
                    tensor = getattr(meta, name, None)
                    if isinstance(tensor, torch.Tensor):
                        yield name, tensor
