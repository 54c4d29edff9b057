"""Idle tokens: a rank's keys that no query of any rank sees, and its queries that see no key of any rank.

What they hold must reach nothing, and 0 * NaN is NaN: they are cleared where a call begins. A token that sees itself is
settled by one look at the diagonal of the mask, which is every token of most masks; for the others the mask is searched
along the other axis by intervals, from the whole sequence down to single tokens. Where keys are another sequence, a
token is looked at together with those that may correspond to it: at equal positions from the first or the last, and in
proportion.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cpflex.mods.evaluate import evaluate
from cpflex.mods.graph import Mod
from cpflex.mods.intervals import FULL, PARTIAL, TileClassifier
from cpflex.sharding.joined import Joined, Keys
from cpflex.sharding.layout import Layout
from cpflex.tile_mask import Idle

AT_ONCE = 1 << 20
"""Pairs of the diagonal that are evaluated at once."""

MOST_INTERVALS = 1 << 18
"""Pieces of the sequence that one search looks at; what is then left counts as seen, and is not cleared."""


def find_idle(mod: Mod, layout: Layout, rank: int, batch_size: int, num_heads: int, keys: Keys | None = None) -> Idle:
    """The idle ones of a rank's tokens, pads among them.

    Args:
        keys: the layout of the keys; that of the queries if None. One shard if every rank holds all of them.
    """
    if keys is None:
        sees_itself = _seen_at(mod, layout.positions(rank), layout.positions(rank), batch_size, num_heads)
        return Idle(*(_idle_of(mod, layout, rank, layout, axis, sees_itself) for axis in ("q", "kv")))
    tables = []
    for axis, own, other, place in (("q", keys, layout, rank % keys.world_size), ("kv", layout, keys, rank)):
        positions, found = own.positions(place), None
        for likely in _counterparts(positions, own, other):
            q, kv = (likely, positions) if axis == "q" else (positions, likely)
            seen = _seen_at(mod, q, kv, batch_size, num_heads)
            found = seen if found is None else found | seen
        assert found is not None, "there are several that may correspond"
        tables.append(_idle_of(mod, own, place, other, axis, found))
    return Idle(*tables)


def _counterparts(positions: np.ndarray, own: Keys, other: Keys) -> list[np.ndarray]:
    in_proportion = other.start + (positions - own.start) * other.seq_len // own.seq_len
    likely = positions, positions + other.end - own.end, in_proportion
    return [np.clip(one, other.start, other.end - 1) for one in likely]


def _idle_of(mod: Mod, own: Keys, rank: int, other: Keys, axis: str, settled: np.ndarray) -> Tensor:
    """Of one axis, that of the keys while queries are searched (``axis="q"``), or the other way round.

    Args:
        own, rank: whose tokens are asked about; ``other``: the sequence that is searched.
        settled: tokens that are known to take part, bool [1 or B, 1 or Hq, S_local].
    """
    positions = own.positions(rank)
    is_pad = positions >= own.end
    b, h, token = np.nonzero(~settled & ~is_pad)
    idle = np.broadcast_to(is_pad, settled.shape).copy()
    if len(token):
        idle[b, h, token] = ~_finds(mod, positions[token], b, h, axis, _spans(other))
    return torch.from_numpy(idle) if idle.any() else torch.zeros(0, dtype=torch.bool)


def _spans(layout: Keys) -> tuple[tuple[int, int], ...]:
    """Positions where tokens are, (start, stop); pads may be among them."""
    if isinstance(layout, Joined):
        return layout.spans
    return ((layout.start, layout.padded_end),)


def _seen_at(mod: Mod, q: np.ndarray, kv: np.ndarray, batch_size: int, num_heads: int) -> np.ndarray:
    """The mask at pairs of positions, bool [1 or B, 1 or Hq, S_local]."""
    batch_size, num_heads = batch_size if mod.uses("b") else 1, num_heads if mod.uses("h") else 1
    b, h = torch.arange(batch_size).view(-1, 1, 1), torch.arange(num_heads).view(-1, 1)
    at_once, pieces = max(1, AT_ONCE // (batch_size * num_heads)), []
    for q_at, kv_at in zip(*(torch.from_numpy(x).split(at_once) for x in (q, kv)), strict=True):
        seen = evaluate(mod.graph, mod.captured, {"b": b, "h": h, "q_idx": q_at, "kv_idx": kv_at})[0]
        pieces.append(seen.expand(batch_size, num_heads, len(q_at)).numpy())
    return np.concatenate(pieces, axis=2)


def _finds(
    mod: Mod, fixed: np.ndarray, b: np.ndarray, h: np.ndarray, axis: str, spans: tuple[tuple[int, int], ...]
) -> np.ndarray:
    """Whether any query (``axis="q"``) in the spans sees the key at each ``fixed``, or any key is seen by the query
    there.
    """
    classify = TileClassifier(mod)
    found = np.zeros(len(fixed), dtype=bool)
    left = np.tile(np.arange(len(fixed)), len(spans))
    lo, hi = (np.repeat(ends, len(fixed)) for ends in zip(*((start, stop - 1) for start, stop in spans), strict=True))
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
        points = left[is_point]
        found[points[_evaluated(mod, lo[is_point], at[is_point], b[points], h[points], axis)]] = True
        split = is_open & (lo < hi)
        left, lo, hi = left[split], lo[split], hi[split]
        middle = (lo + hi) // 2
        left, lo, hi = np.tile(left, 2), np.append(lo, middle + 1), np.append(middle, hi)
    return found


def _evaluated(mod: Mod, moving: np.ndarray, fixed: np.ndarray, b: np.ndarray, h: np.ndarray, axis: str) -> np.ndarray:
    q, kv = (moving, fixed) if axis == "q" else (fixed, moving)
    inputs = {name: torch.from_numpy(x) for name, x in (("b", b), ("h", h), ("q_idx", q), ("kv_idx", kv))}
    return evaluate(mod.graph, mod.captured, inputs)[0].expand(len(fixed)).numpy()
