"""Local tokens in blocks, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from cpflex.recurrent.chain import Blocks

# B batch, S_local tokens, N blocks, C places of a block, H heads, ... what a head has


def to_blocks(
    x: Tensor,  # [B, S_local, H, ...]
    blocks: Blocks,
) -> Tensor:  # [B, N, H, C, ...], in fp32 or wider
    """0 at places without a token and at tokens of no document, whatever they hold."""
    absent = ~blocks.real.view(*blocks.real.shape, *[1] * (x.ndim - 2))
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    placed = wide.index_select(1, blocks.tokens).masked_fill(absent, 0.0)
    return placed.unflatten(1, (len(blocks.first), -1)).transpose(2, 3)


def from_blocks(
    y: Tensor,  # [B, N, H, C, ...]
    blocks: Blocks,
    dtype: torch.dtype,
) -> Tensor:  # [B, S_local, H, ...]
    """0 at tokens of no document."""
    local = y.transpose(2, 3).flatten(1, 2).index_select(1, blocks.places)
    absent = ~blocks.tells.view(*blocks.tells.shape, *[1] * (local.ndim - 2))
    return local.masked_fill(absent, 0.0).to(dtype)
