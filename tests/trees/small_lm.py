"""A small transformer in plain torch, whose attention is given to it: dense on one sequence, or cpflex's on a tree."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cpflex

# B batch, S tokens, Hq query heads, H heads of keys and values, D their dim

VOCAB, WIDTH, HEADS, KV_HEADS, DIM, WINDOW = 13, 24, 4, 2, 8, 5

Attend = Callable[[str, Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
"""(kind of the layer, q [B, Hq, S, D], k, v [B, H, S, D], sinks [Hq] or None) -> [B, Hq, S, D]"""

MODELS: dict[str, dict[str, Any]] = {
    "causal": {"kinds": ("full", "full")},
    "window": {"kinds": ("window", "window")},
    "Gemma": {"kinds": ("window", "window", "full")},
    "gpt-oss": {"kinds": ("window", "full"), "sinks": True},
}


class Layer(nn.Module):
    def __init__(self, kind: str, sinks: bool) -> None:
        super().__init__()
        self.kind = kind
        self.q = nn.Linear(WIDTH, HEADS * DIM, bias=False)
        self.kv = nn.Linear(WIDTH, 2 * KV_HEADS * DIM, bias=False)
        self.out = nn.Linear(HEADS * DIM, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.sinks = nn.Parameter(torch.randn(HEADS)) if sinks else None

    def forward(self, x: Tensor, position_ids: Tensor, attend: Attend) -> Tensor:
        normed = F.rms_norm(x, (WIDTH,))
        q = self.q(normed).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
        k, v = self.kv(normed).unflatten(-1, (2 * KV_HEADS, DIM)).transpose(1, 2).chunk(2, dim=1)
        seen = attend(self.kind, rotated(q, position_ids), rotated(k, position_ids), v, self.sinks)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(F.silu(self.up(F.rms_norm(x, (WIDTH,)))))


class SmallLM(nn.Module):
    def __init__(self, kinds: tuple[str, ...], sinks: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Layer(kind, sinks) for kind in kinds)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens: Tensor, position_ids: Tensor, attend: Attend) -> Tensor:  # [B, S] -> [B, S, V]
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, position_ids, attend)
        return self.head(F.rms_norm(x, (WIDTH,)))


def small_lm(name: str) -> SmallLM:
    """The same on every rank, also where ranks are threads, which share torch's own generator."""
    model, random = SmallLM(**MODELS[name]), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name_of, x in model.named_parameters():
            size = 1.0 if "embedding" in name_of or "sinks" in name_of else 0.5 / math.sqrt(x.shape[-1])
            x.copy_(size * torch.randn(x.shape, generator=random))
    return model


def rotated(x: Tensor, position_ids: Tensor) -> Tensor:
    """RoPE by the given positions."""
    rates = 10000.0 ** (-torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
    angles = (position_ids.double()[..., None] * rates)[:, None]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def dense(kind: str, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
    """Of one sequence, in the precision of q."""
    at = torch.arange(q.shape[2])
    apart = at[:, None] - at
    seen = (apart >= 0) & (apart < (WINDOW if kind == "window" else q.shape[2]))
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
    scores = (q @ k.mT / math.sqrt(DIM)).masked_fill(~seen, -torch.inf)
    if sinks is None:
        return scores.softmax(dim=-1) @ v
    column = sinks[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1] @ v


def on(plan: cpflex.Plan) -> Attend:
    """cpflex's, of this rank's tokens."""

    def attend(kind: str, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        out, lse = cpflex.flex_attention(q, k, v, block_mask=plan[kind], enable_gqa=True, return_lse=True)
        return out if sinks is None else out * torch.sigmoid(lse - sinks[:, None]).unsqueeze(-1)

    return attend


def plan_of(packed: cpflex.trees.PackedTree, name: str, group: Any) -> cpflex.Plan:
    """With the kinds of layers that the model has."""
    along = cpflex.tree(packed.tree)
    masks = {"full": along, "window": along & cpflex.sliding_window(WINDOW, positions=packed.position_ids)}
    return cpflex.make_plan({kind: masks[kind] for kind in MODELS[name]["kinds"]}, packed.seq_len, group)
