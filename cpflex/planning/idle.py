"""Idle tokens: a rank's keys that no query of any rank sees, and its queries that see no key of any rank.

What they hold must reach nothing, and 0 * NaN is NaN: they are cleared where a call begins. A token that sees itself is
settled by one look at the diagonal of the mask, which is every token of most masks; for the others the mask is searched
along the other axis by intervals, from the whole sequence down to single tokens.
"""

from __future__ import annotations

import numpy as np
import torch

from cpflex.mods.evaluate import evaluate
from cpflex.mods.graph import Mod
from cpflex.mods.intervals import FULL, PARTIAL, TileClassifier
from cpflex.sharding.layout import Layout
from cpflex.tile_mask import Idle

AT_ONCE = 1 << 20
"""Pairs of the diagonal that are evaluated at once."""

MOST_INTERVALS = 1 << 18
"""Pieces of the sequence that one search looks at; what is then left counts as seen, and is not cleared."""


def find_idle(mod: Mod, layout: Layout, rank: int, batch_size: int, num_heads: int) -> Idle:
    """The idle ones of a rank's tokens, pads among them."""
    positions, padded_len = layout.positions(rank), layout.num_chunks * layout.chunk_len
    sees_itself = _diagonal(mod, positions, batch_size, num_heads)
    is_pad = positions >= layout.seq_len
    b, h, token = np.nonzero(~sees_itself & ~is_pad)
    tables = []
    for axis in ("q", "kv"):
        idle = np.broadcast_to(is_pad, sees_itself.shape).copy()
        if len(token):
            idle[b, h, token] = ~_finds(mod, positions[token], b, h, axis, padded_len)
        tables.append(torch.from_numpy(idle) if idle.any() else torch.zeros(0, dtype=torch.bool))
    return Idle(*tables)


def _diagonal(mod: Mod, positions: np.ndarray, batch_size: int, num_heads: int) -> np.ndarray:
    """The mask at equal positions, bool [1 or B, 1 or Hq, S_local]."""
    batch_size, num_heads = batch_size if mod.uses("b") else 1, num_heads if mod.uses("h") else 1
    b, h = torch.arange(batch_size).view(-1, 1, 1), torch.arange(num_heads).view(-1, 1)
    pieces = []
    for at in torch.from_numpy(positions).split(max(1, AT_ONCE // (batch_size * num_heads))):
        seen = evaluate(mod.graph, mod.captured, {"b": b, "h": h, "q_idx": at, "kv_idx": at})[0]
        pieces.append(seen.expand(batch_size, num_heads, len(at)).numpy())
    return np.concatenate(pieces, axis=2)


def _finds(mod: Mod, fixed: np.ndarray, b: np.ndarray, h: np.ndarray, axis: str, padded_len: int) -> np.ndarray:
    """Whether any query (``axis="q"``) sees the key at each ``fixed``, or any key is seen by the query there."""
    classify = TileClassifier(mod)
    found = np.zeros(len(fixed), dtype=bool)
    left, lo, hi = np.arange(len(fixed)), np.zeros_like(fixed), np.full_like(fixed, padded_len - 1)
    looked_at = 0
    while len(left):
        looked_at += len(left)
        if looked_at > MOST_INTERVALS:
            found[left] = True
            break
        at, heads = fixed[left], {"b": (b[left], b[left]), "h": (h[left], h[left])}
        verdict = classify(lo, hi, at, at, **heads) if axis == "q" else classify(at, at, lo, hi, **heads)
        found[left[verdict == FULL]] = True
        is_open = (verdict == PARTIAL) & ~found[left]
        is_point = is_open & (lo == hi)
        found[left[is_point]] |= _evaluated(mod, lo[is_point], at[is_point], b[left[is_point]], h[left[is_point]], axis)
        split = is_open & (lo < hi)
        left, lo, hi = left[split], lo[split], hi[split]
        middle = (lo + hi) // 2
        left, lo, hi = np.tile(left, 2), np.append(lo, middle + 1), np.append(middle, hi)
    return found


def _evaluated(mod: Mod, moving: np.ndarray, fixed: np.ndarray, b: np.ndarray, h: np.ndarray, axis: str) -> np.ndarray:
    q, kv = (moving, fixed) if axis == "q" else (fixed, moving)
    inputs = {name: torch.from_numpy(x) for name, x in (("b", b), ("h", h), ("q_idx", q), ("kv_idx", kv))}
    return evaluate(mod.graph, mod.captured, inputs)[0].expand(len(fixed)).numpy()
