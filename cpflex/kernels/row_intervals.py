"""The mask of a step as intervals of visiting keys of each query, as kernels take it that know masks of no other form.

Where a query sees one interval of positions, it sees one interval of each piece of consecutive visiting keys.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cpflex.kernels.call import OR_PORTABLE
from cpflex.mods.graph import Mod
from cpflex.mods.row_bounds import row_bounds
from cpflex.tile_mask import CPU, TileMask

# B batch, Hq query heads, S local queries, n endpoints, P pieces of keys


def row_intervals(tile_mask: TileMask, mask: Mod, batch_size: int, num_heads: int) -> Tensor:
    """int32 [1 or Hq, n, B * S], n odd: query i sees the visiting keys [0, F0) and [F1, F2) and [F3, F4) ..., counted
    from the first that visits; the intervals rise, and those that are empty lie at the end.

    Raises:
        NotImplementedError: the mask does not show that each query sees one interval of positions.
    """
    first_key, shift, begin, end = _pieces(tile_mask)
    queries = tile_mask.q_positions.to(CPU).long()
    bounds = row_bounds(
        mask.map_captured(lambda t: t.detach().to(CPU)),
        *(len(queries), int((end + shift).max())),
        *(batch_size, num_heads),
        queries=queries,
        first_key=first_key,
    )
    if bounds is None:
        raise NotImplementedError(f"backend 'cudnn' needs a mask of one interval of keys for each query{OR_PORTABLE}")
    lo, hi = (x[None] - torch.from_numpy(shift).view(-1, 1, 1, 1) for x in bounds)  # [P, 1 or B, 1 or Hq, S]
    begin, end = (torch.from_numpy(x).view(-1, 1, 1, 1) for x in (begin, end))
    lo, hi = (torch.minimum(torch.maximum(x, begin), end) for x in (lo, hi))
    endpoints = _endpoints(lo, hi, int(end.max()))  # [n, 1 or B, 1 or Hq, S]
    spread = endpoints.expand(-1, batch_size, -1, -1).permute(2, 0, 1, 3)
    return spread.reshape(spread.shape[0], spread.shape[1], -1).int().contiguous()


def _pieces(tile_mask: TileMask) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """(the least position, then of each piece of consecutive keys: position minus place, first place, end place)."""
    starts, first = tile_mask.kv_starts.numpy().astype(np.int64), tile_mask.kv_first.numpy().astype(np.int64)
    shift = first - starts[:-1]
    cuts = np.flatnonzero(np.diff(shift)) + 1
    at = np.concatenate([[0], cuts])
    return int(first.min()), shift[at], starts[at], starts[np.append(cuts, len(first))]


def _endpoints(lo: Tensor, hi: Tensor, kv_len: int) -> Tensor:
    """[n, ...] of intervals [P, ...] that rise, some empty."""
    is_empty = hi <= lo
    order = is_empty.int().argsort(dim=0, stable=True)
    most = max(1, int((~is_empty).sum(dim=0).max()))
    lo, hi = (x.masked_fill(is_empty, kv_len).gather(0, order)[:most] for x in (lo, hi))
    none = lo[0] == hi[0]
    if (none | (lo[0] == 0)).all():
        first, lo, hi = hi[:1].masked_fill(none, 0), lo[1:], hi[1:]
    else:
        first = torch.zeros_like(hi[:1])
    return torch.cat([first, torch.stack([lo, hi], dim=1).flatten(0, 1)])
