"""The torch twin of `megatron_exp.seeding.philox`: the same integer words on any device, and normals made from them."""

import math

import torch

from megatron_exp.model.compiled import compiled_on_gpu
from megatron_exp.parallel.device import sent

_Word = int | torch.Tensor
_MASK_32 = 0xFFFFFFFF
_MULTIPLIER_0 = 0xD2511F53
_MULTIPLIER_1 = 0xCD9E8D57
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_ROUNDS = 10


def philox(key: int, c0: torch.Tensor, c1: torch.Tensor, c2: int, c3: int) -> torch.Tensor:
    """Philox4x32-10 of a 64-bit key and four 32-bit counter words; c0 and c1 are int64 tensors that broadcast.

    Returns int64 [..., 4] with values in [0, 2**32): torch has no unsigned arithmetic, and products wrap the same way.
    """
    return _philox(key & _MASK_32, (key >> 32) & _MASK_32, c0, c1, c2, c3)


def _philox(k0: _Word, k1: _Word, c0: torch.Tensor, c1: torch.Tensor, c2: _Word, c3: _Word) -> torch.Tensor:
    """`philox` with the halves of the key apart; what is the same for all counters is a number or a tensor [] that holds one."""
    x0, x1 = torch.broadcast_tensors(c0 & _MASK_32, c1 & _MASK_32)
    x2, x3 = torch.zeros_like(x0) + (c2 & _MASK_32), torch.zeros_like(x0) + (c3 & _MASK_32)
    for round_index in range(_ROUNDS):
        r0 = (k0 + round_index * _WEYL_0) & _MASK_32
        r1 = (k1 + round_index * _WEYL_1) & _MASK_32
        p0, p1 = x0 * _MULTIPLIER_0, x2 * _MULTIPLIER_1
        x0, x1, x2, x3 = ((p1 >> 32) & _MASK_32) ^ x1 ^ r0, p1 & _MASK_32, ((p0 >> 32) & _MASK_32) ^ x3 ^ r1, p0 & _MASK_32
    return torch.stack([x0, x1, x2, x3], dim=-1)


def grid_words(key: int, rows: torch.Tensor, columns: range, stream: int = 0) -> torch.Tensor:
    """One 32-bit word for each (row, column) of an endless grid: int64 [len(rows), len(columns)].

    A word depends on (key, stream, row, column) alone, so any slice of a grid can be made by itself. stream: 64 bits.
    """
    first, last = columns.start // 4, -(-columns.stop // 4)
    blocks = torch.arange(first, last, dtype=torch.int64, device=rows.device)
    words = philox(key, blocks[None, :], rows[:, None].to(torch.int64), stream & _MASK_32, stream >> 32)
    return words.flatten(1)[:, columns.start - 4 * first : columns.stop - 4 * first]


def grid_normals(key: int, rows: torch.Tensor, columns: int, stream: int = 0) -> torch.Tensor:
    """fp32 [len(rows), columns] standard normals by Box-Muller in float64; equal to 1e-6 on any device.

    Columns 2i and 2i + 1 share a pair of words (sine and cosine of one angle).
    """
    blocks = torch.arange(-(-columns // 4), dtype=torch.int64, device=rows.device)
    words = torch.tensor([word for number in (key, stream) for word in (number & _MASK_32, (number >> 32) & _MASK_32)])
    return _block_normals(rows.to(torch.int64), blocks, sent(words, rows.device))[:, :columns]


@compiled_on_gpu  # one kernel in place of some 160, which a small model would feel in each step with noise
def _block_normals(rows: torch.Tensor, blocks: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """fp32 [len(rows), 4 len(blocks)] of `grid_normals`; words: int64 [4], the halves of key and stream, low ones first."""
    k0, k1, c2, c3 = words.unbind()
    uniforms = (_philox(k0, k1, blocks[None, :], rows[:, None], c2, c3).flatten(1).double() + 0.5) * 2.0**-32
    radius = torch.sqrt(-2.0 * torch.log(uniforms[:, 0::2]))
    angle = 2.0 * math.pi * uniforms[:, 1::2]
    return torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1).flatten(1).float()


def grid_truncated_normals(key: int, rows: torch.Tensor, columns: range, bound: float) -> torch.Tensor:
    """fp32 [len(rows), len(columns)] standard normals cut off at +-bound, by the inverse of the distribution function."""
    tail = 0.5 * math.erfc(bound / math.sqrt(2.0))
    uniforms = (grid_words(key, rows, columns).double() + 0.5) * 2.0**-32
    return (math.sqrt(2.0) * torch.erfinv(2.0 * (tail + uniforms * (1.0 - 2.0 * tail)) - 1.0)).float()
