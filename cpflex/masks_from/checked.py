"""What readers ask of the tensors that they are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cpflex.masks import is_count, is_integral


def integers(value: Any, name: str, shape: str) -> Tensor:
    """``value`` as a tensor of integers, where it is one; its number of dims is that of ``shape``: "[num_docs + 1]"."""
    tensor = torch.as_tensor(value)
    if not is_integral(tensor):
        raise ValueError(f"{name} must be integers {shape}; got {tensor.dtype} {tuple(tensor.shape)}")
    if tensor.ndim != shape.count(",") + 1:
        raise ValueError(f"{name} must be {shape}; got shape {tuple(tensor.shape)}")
    return tensor.detach()


def cu_seqlens(value: Tensor | Sequence[int], name: str) -> Tensor:
    """Where sequences start, and the end: from 0, never falling. int64 [num_seqs + 1]."""
    bounds = integers(value, name, "[num_seqs + 1]").long()
    if bounds.numel() < 2 or bounds[0] != 0 or (bounds.diff() < 0).any() or bounds[-1] == 0:
        raise ValueError(
            f"{name} must start at 0 and never fall: the start of each sequence, then the length of all, at least 1"
        )
    return bounds


def length(value: object, name: str) -> int:
    """A number of tokens."""
    if not is_count(value, 1):
        raise ValueError(f"{name} must be an integer of at least 1; got {value!r}")
    return value  # type: ignore[return-value]


def by_head(table: Tensor, num_heads: int | None, name: str) -> Tensor:
    """A table [B, H, ...] of key heads (or of one) for the query heads: each is repeated for its group.

    Args:
        num_heads: query heads; None if the table has one head, or those of the queries.
    """
    heads = table.shape[1]
    if num_heads is None or heads in (1, num_heads):
        return table
    if not is_count(num_heads, 1) or num_heads % heads:
        raise ValueError(f"{name} has {heads} heads; num_heads={num_heads!r} must be a multiple of that")
    return table.repeat_interleave(num_heads // heads, dim=1)
