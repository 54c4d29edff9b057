"""shard and unshard along the sequence dim, differentiable, exact adjoints under "total loss = sum of the ranks'
losses".
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpflex.links.protocol import Links, swap
from cpflex.sharding.layout import Layout


def shard(x: Tensor, dim: int, layout: Layout, rank: int, pad_value: float | int | bool | None) -> Tensor:
    """The rank's tokens of a tensor that every rank holds whole. Nothing is sent; the gradient is zero elsewhere.

    Args:
        x: ``x.shape[dim] == seq_len``.
        pad_value: value of the tokens from ``seq_len`` on.

    Raises:
        ValueError: another length, or padding is needed and ``pad_value`` is None.
    """
    if _length(x, dim) != layout.seq_len:
        raise ValueError(f"dim {dim} must have the plan's seq_len={layout.seq_len} tokens; got shape {tuple(x.shape)}")
    positions = torch.from_numpy(layout.positions(rank)).to(x.device)
    local = x.index_select(dim, positions.clamp(max=layout.end - 1) - layout.start)
    if layout.num_chunks * layout.chunk_len == layout.seq_len:
        return local
    if pad_value is None:
        raise ValueError(
            f"seq_len={layout.seq_len} is padded to {layout.num_chunks * layout.chunk_len} tokens, for equal local "
            "lengths; pass pad_value=..., for instance 0 for token ids and -100 for labels"
        )
    is_pad = (positions >= layout.end).view([-1] + [1] * (x.ndim - 1 - dim % x.ndim))
    return local.masked_fill(is_pad, pad_value)


def unshard(x: Tensor, dim: int, layout: Layout, rank: int, links: Links | None) -> Tensor:
    """All ranks' tokens in their original order, pads dropped. Backward sums the ranks' gradients in rank
    order, in fp32 or in the dtype of ``x``, the wider.

    Args:
        x: ``x.shape[dim] == local_len``; equal shapes and dtypes on all ranks.
    """
    if _length(x, dim) != layout.local_len:
        raise ValueError(
            f"dim {dim} must have the plan's local_len={layout.local_len} tokens; got shape {tuple(x.shape)}"
        )
    return _Unshard.apply(x, dim % x.ndim, layout, rank, links)  # type: ignore[return-value]


def _length(x: Tensor, dim: int) -> int:
    if not isinstance(x, Tensor):
        raise TypeError(f"what is sharded must be a Tensor; got {type(x).__name__}")
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"dim {dim} must be one of the tensor's; got shape {tuple(x.shape)}")
    return x.shape[dim]


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, dim: int, layout: Layout, rank: int, links: Links | None) -> Tensor:
        ctx.args = (dim, layout, rank, links, x.dtype)
        parts = _swap([x.contiguous()] * layout.world_size, rank, links)
        whole = x.new_empty([*x.shape[:dim], layout.num_chunks * layout.chunk_len, *x.shape[dim + 1 :]])
        for owner, part in enumerate(parts):
            whole.index_copy_(dim, torch.from_numpy(layout.positions(owner) - layout.start).to(x.device), part)
        return whole.narrow(dim, 0, layout.seq_len).contiguous()

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        dim, layout, rank, links, dtype = ctx.args
        grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
        parts = [shard(grad, dim, layout, owner, pad_value=0.0).contiguous() for owner in range(layout.world_size)]
        total = torch.stack(_swap(parts, rank, links)).sum(dim=0)
        return total.to(dtype), None, None, None, None


def _swap(parts: list[Tensor], rank: int, links: Links | None) -> list[Tensor]:
    """Send ``parts[r]`` to each rank r; what each rank sent here, by rank."""
    received = [parts[rank] if peer == rank else torch.empty_like(parts[rank]) for peer in range(len(parts))]
    if links is not None:
        swap(parts, received, links)
    return received
