"""A decoder-only transformer that knows no ranks: its attention is passed in, its positions come with the tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

# B batch, S local tokens, E model dim, H query heads, G heads of keys and values, D head dim

KINDS = ("sliding", "full")
"""Mask kinds of the layers, in turn."""

ROPE_BASE = 10000.0

Attend = Callable[[Tensor, Tensor, Tensor, str], Tensor]
"""(q [B, H, S, D], k [B, G, S, D], v [B, G, S, D], mask kind) -> [B, H, S, D]."""


@dataclass(frozen=True)
class Shape:
    """Sizes of the model, and the dtype in which it multiplies and attends.

    Parameters, their gradients, the residual stream and the loss stay in the parameters' dtype.
    """

    vocab_size: int
    num_layers: int
    dim: int
    num_heads: int
    num_kv_heads: int
    dtype: torch.dtype = torch.float32

    @property
    def kinds(self) -> list[str]:
        """The mask kind of each layer."""
        return [KINDS[layer % len(KINDS)] for layer in range(self.num_layers)]


class Linear(nn.Linear):
    """No bias; multiplies in the dtype of its input."""

    def __init__(self, num_in: int, num_out: int, std: float) -> None:
        super().__init__(num_in, num_out, bias=False)
        nn.init.normal_(self.weight, std=std)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype))


class Attention(nn.Module):
    def __init__(self, shape: Shape, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.head_dim = shape.dim // shape.num_heads
        kv_dim = self.head_dim * shape.num_kv_heads
        std = shape.dim**-0.5
        self.query = Linear(shape.dim, shape.dim, std)
        self.key = Linear(shape.dim, kv_dim, std)
        self.value = Linear(shape.dim, kv_dim, std)
        self.out = Linear(shape.dim, shape.dim, std / (2 * shape.num_layers) ** 0.5)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        q, k, v = (
            rearrange(project(x), "b s (h d) -> b h s d", d=self.head_dim)
            for project in (self.query, self.key, self.value)
        )
        out = attend(rotate(q, *rotation), rotate(k, *rotation), v, self.kind)
        return self.out(rearrange(out, "b h s d -> b s (h d)"))


class FeedForward(nn.Module):
    """relu(x W)^2 V (Primer, arXiv:2109.08668)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.up = Linear(shape.dim, 4 * shape.dim, shape.dim**-0.5)
        self.down = Linear(4 * shape.dim, shape.dim, (4 * shape.dim * 2 * shape.num_layers) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)).square())


class Layer(nn.Module):
    def __init__(self, shape: Shape, kind: str) -> None:
        super().__init__()
        self.dtype = shape.dtype
        self.attention_norm = nn.RMSNorm(shape.dim)
        self.attention = Attention(shape, kind)
        self.feed_forward_norm = nn.RMSNorm(shape.dim)
        self.feed_forward = FeedForward(shape)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        x = x + self.attention(self.attention_norm(x).to(self.dtype), rotation, attend)
        return x + self.feed_forward(self.feed_forward_norm(x).to(self.dtype))


class Transformer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocab_size, shape.dim)
        self.layers = nn.ModuleList(Layer(shape, kind) for kind in shape.kinds)
        self.norm = nn.RMSNorm(shape.dim)
        # small: the first prediction is nearly uniform, the first loss nearly log(vocab_size)
        self.head = Linear(shape.dim, shape.vocab_size, 0.1 * shape.dim**-0.5)

    def forward(
        self,
        tokens: Tensor,  # int64 [B, S]
        position_ids: Tensor,  # int64 [B, S]
        attend: Attend,
    ) -> Tensor:  # logits [B, S, vocab_size], in the dtype of the parameters
        x = self.embedding(tokens)
        rotation = rope(position_ids, self.shape.dim // self.shape.num_heads, x.dtype)
        for layer in self.layers:
            x = layer(x, rotation, attend)
        return self.head(self.norm(x).to(self.shape.dtype)).to(x.dtype)


def rope(position_ids: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [B, 1, S, D / 2] of rotary position embedding (arXiv:2104.09864), for positions in any order."""
    # fp64: at position 1e6 an fp32 angle is wrong in its second digit
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=position_ids.device) / head_dim
    angles = position_ids[:, None, :, None] * ROPE_BASE**-exponents
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, S, D], its two halves turned against each other, in x's dtype."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
