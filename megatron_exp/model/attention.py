"""Causal attention by PyTorch's scaled_dot_product_attention: no score matrix is kept, and context parallelism works on any device.

Shapes: s positions of this rank, b rows, n query heads, g key and value heads, d head width, c context-parallel ranks.
"""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from torch.nn.functional import scaled_dot_product_attention

from megatron_exp.parallel.slices import rank_positions


class CausalAttention(torch.nn.Module):
    """Takes the place of megatron's DotProductAttention: queries [s, b, n, d], keys and values [s, b, g, d] to [s, b, n * d]."""

    def __init__(self, config: TransformerConfig, **unused: Any):
        super().__init__()
        del unused
        self.context_size = config.context_parallel_size

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None, **unused: Any) -> torch.Tensor:
        del attention_mask, unused
        visible = None
        if self.context_size > 1:
            group = parallel_state.get_context_parallel_group()
            # The backward of this gather is a reduce-scatter: every rank's queries send their gradient to the owner of a key.
            key, value = (gather_from_sequence_parallel_region(part, True, group) for part in (key, value))
            visible = self._visible(group.rank(), key.shape[0], query.device)
        query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        grouped = query.shape[1] != key.shape[1]
        # With keys of earlier positions kept, there is one query only: the last position, which sees them all.
        causal = visible is None and query.shape[2] == key.shape[2]
        mixed = scaled_dot_product_attention(query, key, value, attn_mask=visible, is_causal=causal, enable_gqa=grouped)
        return mixed.permute(2, 0, 1, 3).flatten(2)

    def _visible(self, rank: int, length: int, device: torch.device) -> torch.Tensor:
        """bool [s, c * s]: whether a key, in the order in which the ranks hold them, is at or before a query."""
        held = [rank_positions(length, other, self.context_size, device) for other in range(self.context_size)]
        return held[rank][:, None] >= torch.cat(held)[None, :]
