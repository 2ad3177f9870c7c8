"""OLMo-2's normalisations for megatron-core: RMSNorm, the norm behind a residual branch, and the full-width query and key norm.

Shapes: s sequence (scattered over tensor ranks under sequence parallelism), b rows, h hidden, n heads of this rank, d head width.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region, reduce_from_tensor_model_parallel_region
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megatron_exp.model.compiled import compiled_on_gpu
from megatron_exp.parallel.device import current_device


def _new_weight(width: int, config: TransformerConfig) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(width, dtype=config.params_dtype, device=current_device()))


@compiled_on_gpu
def _mean_of_squares(hidden: torch.Tensor) -> torch.Tensor:
    return hidden.float().pow(2).mean(-1, keepdim=True)


@compiled_on_gpu
def _sum_of_squares(hidden: torch.Tensor) -> torch.Tensor:
    return hidden.float().pow(2).sum(-1, keepdim=True)


@compiled_on_gpu
def _scaled(hidden: torch.Tensor, square: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = hidden.float() * torch.rsqrt(square)
    return (weight.float() * wide).to(hidden.dtype)


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension, in fp32, rounded once at the end as in transformers' Olmo2RMSNorm.

    megatron-core's own wrapper refuses sequence parallelism.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = _new_weight(hidden_size, config)
        # Under sequence parallelism a rank sees part of the positions: megatron then sums this gradient over the tensor ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return _scaled(hidden, _mean_of_squares(hidden) + self.eps, self.weight)


class PostNormAdd(torch.nn.Module):
    """residual + norm(branch): takes the place of megatron's bias-dropout-add, so the transformer layer itself stays unmodified.

    Called as megatron calls that: `module(training, fused)((branch, None), residual, dropout)`.
    """

    def __init__(self, config: TransformerConfig, norm: type | ModuleSpec):
        super().__init__()
        self.norm = build_module(norm, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool) -> Callable[..., torch.Tensor]:
        del training, fused
        return self._add

    def _add(self, branch_and_bias: tuple[torch.Tensor, Any], residual: torch.Tensor, dropout: float) -> torch.Tensor:
        del dropout
        return residual + self.norm(branch_and_bias[0])


class FullWidthQKNorm(torch.nn.Module):
    """RMSNorm over all heads of the queries (or keys) together, also where the heads are divided among tensor ranks.

    Input and output [s, b, n, d]. The weight is this rank's slice, in the natural order of the heads.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, num_heads: int):
        super().__init__()
        self.eps = eps
        self.width = num_heads * hidden_size
        self.divided = config.tensor_model_parallel_size > 1
        self.weight = _new_weight(self.width // config.tensor_model_parallel_size, config)
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        hidden = heads.flatten(-2)
        squares = _sum_of_squares(hidden)
        if self.divided:
            # Summed forward and backward: the heads of every rank depend on the total, so its gradient comes from every rank.
            squares = copy_to_tensor_model_parallel_region(reduce_from_tensor_model_parallel_region(squares))
        return _scaled(hidden, squares / self.width + self.eps, self.weight).view_as(heads)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict[str, Any]:
        """The weight as one global vector divided over tensor ranks."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )
