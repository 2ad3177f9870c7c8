"""How far two models are apart in their weights, read tensor by tensor from their checkpoints, whatever layouts wrote them."""

import math
from pathlib import Path

import torch

from megatron_exp.checkpoint.catalogue import require_sound
from megatron_exp.checkpoint.stored import Place, StoredTensors
from megatron_exp.errors import UserError
from megatron_exp.model.parts import PARTS, part_of


def weight_distance(first: Path, second: Path) -> dict[str, dict[str, float]]:
    """{input, hidden, output: {distance: L2 norm of the difference, norm: L2 norm of the second's weights}} of two checkpoints of one shape.

    Raises UserError where a checkpoint is damaged or they hold other weights.
    """
    for path in (first, second):
        require_sound(path)
    ours, theirs = StoredTensors(first), StoredTensors(second)
    names = _weights(ours)
    if {name: ours.sizes[name] for name in names} != {name: theirs.sizes[name] for name in _weights(theirs)}:
        raise UserError(
            f"{first} and {second} hold weights of other names or sizes, so no distance exists. Give checkpoints of one model shape."
        )
    squares = {part: [0.0, 0.0] for part in PARTS.values()}
    for name in names:
        place = Place(name, tuple(ours.sizes[name]))
        weight = theirs.read(place).float()
        total = squares[part_of(name)]
        total[0] += _square(ours.read(place).float() - weight)
        total[1] += _square(weight)
    return {part: {"distance": math.sqrt(apart), "norm": math.sqrt(size)} for part, (apart, size) in squares.items()}


def _weights(stored: StoredTensors) -> list[str]:
    """Names of model weights; optimizer state and other objects are stored beside them."""
    return sorted(name for name in stored.sizes if name.startswith(tuple(PARTS)) and not name.endswith("_extra_state"))


def _square(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float32).double().square())
