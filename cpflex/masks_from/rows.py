"""Masks by rows: every query sees the keys of a few intervals, which are tables of the queries.

This is the form that most formats come down to. The planner proves its tiles from the least and greatest bound of a
range of queries, so the tables cost what the mask's boundary costs, whatever the format they were read from.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from cpflex.masks import MaskFn, MaskMod

# B batch, H query heads (1 of either: the same for all), n intervals, R rows

MAX_INTERVALS = 16
"""Intervals of keys that a query may see in a mask by rows; each is a part of the mask's program."""

RowOf = Callable[[Tensor], Tensor]


def by_rows(
    starts: Tensor,  # integers [B, H, n, R], rising along n where an interval is not empty
    ends: Tensor,  # integers [B, H, n, R], exclusive
    kv_len: int,
    name: str,
    lengths: Collection[int | tuple[int, int]],
    row_of: RowOf | None = None,
) -> MaskMod:
    """A query sees ``starts[i] <= kv_idx < ends[i]`` for any i. Intervals of a row do not overlap.

    Args:
        row_of: the row of a query's position; the position itself if None.
    """
    starts, ends = _joined(starts.int(), ends.int(), kv_len)
    rules = [_rule(start, end, kv_len) for start, end in zip(starts.unbind(2), ends.unbind(2), strict=True)]

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        row = q if row_of is None else row_of(q)
        seen = rules[0](b, h, row, k)
        for rule in rules[1:]:
            seen = seen | rule(b, h, row, k)
        return seen

    return MaskMod(mask_mod, name, lengths)


def _joined(starts: Tensor, ends: Tensor, kv_len: int) -> tuple[Tensor, Tensor]:
    """Intervals that touch made one; empty ones as (kv_len, 0), which widens no range of bounds; one slot at least."""
    starts, ends = starts.clamp(0, kv_len), ends.clamp(0, kv_len)
    for i in range(starts.shape[2]):
        for before in range(i):
            touches = (starts[:, :, i] < ends[:, :, i]) & (starts[:, :, before] < ends[:, :, before])
            touches &= ends[:, :, before] == starts[:, :, i]
            starts[:, :, i] = torch.where(touches, starts[:, :, before], starts[:, :, i])
            ends[:, :, before] = torch.where(touches, 0, ends[:, :, before])
    empty = starts >= ends
    starts, ends = starts.masked_fill(empty, kv_len), ends.masked_fill(empty, 0)
    used = (~empty).any(dim=3).any(dim=1).any(dim=0)
    used[0] |= not used.any()
    return starts[:, :, used], ends[:, :, used]


def _rule(start: Tensor, end: Tensor, kv_len: int) -> MaskFn:
    """One interval; a bound that no row needs is left out."""
    empty = start >= end
    if ((start == 0) | empty).all():
        below = element_of(end)
        return lambda b, h, row, k: k < below(b, h, row)
    if ((end == kv_len) | empty).all():
        above = element_of(start)
        return lambda b, h, row, k: k >= above(b, h, row)
    low, high = element_of(start), element_of(end)
    return lambda b, h, row, k: (k >= low(b, h, row)) & (k < high(b, h, row))


def element_of(table: Tensor) -> Callable[..., Tensor]:
    """Reads a table [B, H, ...] at (b, h, ...); what is the same for all of a batch or for all heads is kept once."""
    table = _kept_once(_kept_once(table, 0), 1)
    by_b, by_h = (size > 1 for size in table.shape[:2])
    if by_b and by_h:
        whole = table.contiguous()
        return lambda b, h, *at: whole[(b, h, *at)]
    if by_b:
        of_b = table[:, 0].contiguous()
        return lambda b, h, *at: of_b[(b, *at)]
    if by_h:
        of_h = table[0].contiguous()
        return lambda b, h, *at: of_h[(h, *at)]
    same = table[0, 0].clone(memory_format=torch.contiguous_format)
    return lambda b, h, *at: same[at]


def _kept_once(table: Tensor, dim: int) -> Tensor:
    first = table.narrow(dim, 0, 1)
    return first if table.shape[dim] > 1 and bool((table == first).all()) else table


def runs_of_table(table: Tensor, most: int) -> tuple[Tensor, Tensor] | None:
    """Runs of True along the last dim of a bool [B, H, R, C]: starts, ends int64 [B, H, n, R]; None if a row has more
    than ``most``.
    """
    begins, stops = table.clone(), table.clone()
    begins[..., 1:] &= ~table[..., :-1]
    stops[..., :-1] &= ~table[..., 1:]
    count = begins.sum(dim=-1)
    if int(count.max()) > most:
        return None
    return slots(begins.nonzero()[:, 3], stops.nonzero()[:, 3] + 1, count)


def runs_of_pairs(
    row: Tensor,  # int64 [N], rising
    col: Tensor,  # int64 [N], rising within a row, none twice
    shape: tuple[int, int, int],  # B, H, R; a row counts through all of them
    most: int,
) -> tuple[Tensor, Tensor] | None:
    """`runs_of_table` of the table that is True at the pairs."""
    begins = torch.ones_like(row, dtype=torch.bool)
    begins[1:] = (row[1:] != row[:-1]) | (col[1:] != col[:-1] + 1)
    first = begins.nonzero()[:, 0]
    last = torch.cat([first[1:], first.new_tensor([len(row)])[: len(first)]]) - 1
    count = torch.bincount(row[first], minlength=shape[0] * shape[1] * shape[2])
    if int(count.max()) > most:
        return None
    return slots(col[first], col[last] + 1, count.view(shape))


def slots(starts: Tensor, ends: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Runs in the order of their rows -> [B, H, n, R], the n-th run of each row; ``count``: runs of each row."""
    per_row = count.reshape(-1)
    row = torch.repeat_interleave(torch.arange(len(per_row), device=count.device), per_row)
    slot = torch.arange(len(row), device=count.device) - (per_row.cumsum(0) - per_row)[row]
    made = []
    for bounds in (starts, ends):
        table = bounds.new_zeros(len(per_row), max(1, int(per_row.max())))
        table[row, slot] = bounds
        made.append(table.view(*count.shape, -1).transpose(2, 3))
    return made[0], made[1]
