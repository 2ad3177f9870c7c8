"""The whole training state of this process kept in memory, to be taken back any number of times, bit by bit."""

from collections.abc import Iterator
from typing import Any

import torch

from megatron_exp.errors import UserError
from megatron_exp.model.build import LanguageModel
from megatron_exp.model.optimizer import Optimizer


class Snapshot:
    """Weights, optimizer tensors and step counters as they are now; `restore` puts them back into the same objects.

    Raises UserError where a precision keeps a history that cannot be put back.
    """

    def __init__(self, model: LanguageModel, optimizer: Optimizer):
        if model.precision == "fp8" and model.config.fp8_recipe == "delayed":
            raise UserError(
                "training.fp8_recipe is delayed, whose scaling factors follow from earlier steps and cannot be put back exactly. Set fp8_recipe to "
                "tensorwise or blockwise for this."
            )
        self.model, self.optimizer = model, optimizer
        self._tensors = [tensor.detach().clone() for tensor in self._live_tensors()]
        self._groups = [{name: value for name, value in group.items() if _is_number(value)} for group in optimizer.groups()]

    @torch.no_grad()
    def restore(self) -> None:
        """Make model and optimizer what they were."""
        for tensor, kept in zip(self._live_tensors(), self._tensors, strict=True):
            tensor.copy_(kept)
        for group, numbers in zip(self.optimizer.groups(), self._groups, strict=True):
            group.update(numbers)
        self.optimizer.zero_grad()

    def _live_tensors(self) -> Iterator[torch.Tensor]:
        for chunk in self.model.chunks:
            yield from (parameter.data for parameter in chunk.parameters())
            yield from chunk.buffers()
        yield from self.optimizer.tensors()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)
