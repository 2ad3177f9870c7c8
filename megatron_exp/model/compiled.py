"""Arithmetic that a GPU runs as one kernel instead of one per operation."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

_Arguments = ParamSpec("_Arguments")
_Value = TypeVar("_Value")


def compiles(tensor: torch.Tensor) -> bool:
    """Whether functions of this tensor run compiled: on a GPU, but not under `training.deterministic`.

    The compiler tries several orders of a sum and keeps the fastest, which may be another one in the next process, and then a resumed
    run would no longer be equal bit for bit.
    """
    return tensor.is_cuda and not torch.are_deterministic_algorithms_enabled()


def compiled_on_gpu(function: Callable[_Arguments, _Value]) -> Callable[_Arguments, _Value]:
    """`function` of tensors alone, compiled by PyTorch where its first argument says so (`compiles`), else as it is.

    Tensors alone, because a number would become an input that is computed with on the CPU, for which a C++ compiler is called.
    """
    compiled = torch.compile(function, dynamic=True)  # compiles at the first call, and not again for another number of rows

    @functools.wraps(function)
    def call(*arguments: _Arguments.args, **named: _Arguments.kwargs) -> _Value:
        first = arguments[0]
        assert isinstance(first, torch.Tensor)
        return compiled(*arguments, **named) if compiles(first) else function(*arguments, **named)

    return call
