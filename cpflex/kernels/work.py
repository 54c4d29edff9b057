"""Work: which program of a kernel computes what, in which order. Tables made once per plan, for all its steps, and the
device functions that read them.

A program owns a block of rows of one head and walks over blocks of columns. Rows are queries and columns keys, or the
reverse in the kernel of dK/dV. Its columns are runs of consecutive tokens, so a table follows the boundary of the mask
and not its area. FULL runs are cut to whole blocks, walked without any mask; their rests join the PARTIAL runs, where
the mask is evaluated and columns are bounds-checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from cpflex.kernels import tuning
from cpflex.kernels.tables import copy_at_once
from cpflex.tile_mask import Runs, Siblings, TileMask

ITEM_FIELDS = tl.constexpr(8)
"""Of an item: first row, end row; first run, end run, blocks of the masked walk; the same three of the full walk."""

MASKED_COST = 1.5
"""A block whose mask is evaluated, in FULL blocks; only the order of the programs depends on it."""


class Blocks(NamedTuple):
    """How a kernel cuts a tile mask: what its rows are, "query" or "key", and the rows and columns of a block."""

    rows_are: str
    rows: int
    cols: int
    consecutive: bool = False
    """Columns of a run have consecutive positions: one that goes on in another chunk is cut in two."""
    short_are_masked: bool = False
    """Blocks of fewer rows have no full walk: their mask is evaluated everywhere, and with it where rows end."""


class Work(NamedTuple):
    """What the programs of one kernel compute in one step, on the device."""

    items: Tensor  # int32 [num_items * ITEM_FIELDS], most work first, rows without work last
    runs: Tensor  # int32 [runs + 1, 2], first and end column of each
    num_items: int
    num_busy: int
    """Items with work."""


@dataclass(frozen=True)
class WorkTable:
    """The work of all steps, as one table of items, step by step, then the runs of all."""

    blocks: Blocks
    table: Tensor  # int32
    num_items: list[int]  # of each step
    num_busy: list[int]

    def split(self, table: Tensor) -> list[Work]:
        """The work of each step, from the table on a device."""
        *items, runs = table.split([*(ITEM_FIELDS.value * n for n in self.num_items), self.num_runs_fields])
        runs = runs.view(-1, 2)
        return [Work(*step) for step in zip(items, [runs] * len(items), self.num_items, self.num_busy, strict=True)]

    @property
    def num_runs_fields(self) -> int:
        return len(self.table) - ITEM_FIELDS.value * sum(self.num_items)


def work_by_query(tile_mask: TileMask, block_q: int, block_kv: int) -> Work:
    """Blocks of queries that walk over keys."""
    return _work(tile_mask, Blocks("query", block_q, block_kv))


def work_of_consecutive_keys(tile_mask: TileMask, block_q: int, block_kv: int) -> Work:
    """Blocks of queries that walk over keys; the positions of a run follow from that of its first key."""
    return _work(tile_mask, Blocks("query", block_q, block_kv, consecutive=True))


def work_of_consecutive_queries(
    tile_mask: TileMask, block_kv: int, block_q: int, short_are_masked: bool = False
) -> Work:
    """Blocks of keys that walk over queries; the positions of a run follow from that of its first query."""
    return _work(tile_mask, Blocks("key", block_kv, block_q, True, short_are_masked))


def work_by_key(tile_mask: TileMask, block_kv: int, block_q: int) -> Work:
    """Blocks of keys that walk over queries."""
    return _work(tile_mask, Blocks("key", block_kv, block_q))


def _work(tile_mask: TileMask, blocks: Blocks) -> Work:
    siblings = tile_mask.siblings or Siblings((tile_mask,))
    if blocks not in siblings.works:
        add_work(siblings, [blocks], tile_mask.device)
    return siblings.works[blocks][tile_mask.index]


def add_work(siblings: Siblings, wanted: Sequence[Blocks], device: torch.device) -> None:
    """Make what is not there yet, for all steps, and bring it to the device by one copy."""
    works = work_tables(siblings.masks, [blocks for blocks in wanted if blocks not in siblings.works])
    moved = copy_at_once([work.table for work in works], device, siblings) if works else []
    siblings.works.update((work.blocks, work.split(table)) for work, table in zip(works, moved, strict=True))


def foreseen_blocks(device: torch.device) -> list[Blocks]:
    """What the kernels of 16-bit tensors may ask for on a device."""
    found, capability = [], tuning.capability_of(device)
    for (architecture, which, *_), row in tuning.GLUON.items():
        if architecture == capability and tuning.triton_release() in row.releases:
            rows_are, rows, cols = row.config.blocks
            found.append(Blocks(rows_are, rows, cols, consecutive=True, short_are_masked=which == "onepass"))
    for (which, *_), config in tuning.rows_for(capability, torch.bfloat16).items():
        if which in tuning.PAGE_PASSES:
            continue
        by_query = Blocks("query", config.block_q, config.block_kv)
        by_key = Blocks("key", config.block_kv, config.block_q)
        found += {"dkdv": [by_key], "captured": [by_query, by_key]}.get(which, [by_query])
    return list(dict.fromkeys(found))


def work_tables(tile_masks: Sequence[TileMask], wanted: Iterable[Blocks]) -> list[WorkTable]:
    """The work of all steps, for each way to cut it."""
    sides: dict[tuple[str, bool], _Side] = {}
    tables = []
    for blocks in wanted:
        which = blocks.rows_are, blocks.consecutive
        if which not in sides:
            sides[which] = _side(tile_masks, *which)
        tables.append(_work_table(sides[which], blocks))
    return tables


class _Side(NamedTuple):
    """The tile masks of all steps one after the other, as runs of tokens per row tile."""

    step: np.ndarray  # of each row tile
    first_row: np.ndarray
    end_row: np.ndarray
    full: tuple[np.ndarray, np.ndarray, np.ndarray]  # row tile, first column, end column of each run
    partial: tuple[np.ndarray, np.ndarray, np.ndarray]
    num_steps: int


def _side(tile_masks: Sequence[TileMask], rows_are: str, consecutive: bool) -> _Side:
    by_query = rows_are == "query"
    rows, cols = (
        [_int64(s) for s in starts] for starts in zip(*((m.q_starts, m.kv_starts) for m in tile_masks), strict=True)
    )
    if not by_query:
        rows, cols = cols, rows
    num_tiles = [len(starts) - 1 for starts in rows]
    jumps = None
    if consecutive:
        firsts = [m.kv_first if by_query else m.q_first for m in tile_masks]
        jumps = [_jumps(first, starts) for first, starts in zip(firsts, cols, strict=True)]
    full, partial = (
        _tokens([getattr(m, name if by_query else f"{name}_by_kv") for m in tile_masks], cols, jumps)
        for name in ("full", "partial")
    )
    first, end = np.concatenate([x[:-1] for x in rows]), np.concatenate([x[1:] for x in rows])
    return _Side(np.repeat(np.arange(len(rows)), num_tiles), first, end, full, partial, len(rows))


def _jumps(first: Tensor, starts: np.ndarray) -> np.ndarray:
    """Tiles whose first position is not the one after the last of the tile before."""
    shift = _int64(first) - starts[:-1]
    return np.flatnonzero(np.diff(shift)) + 1


def _tokens(
    runs: Sequence[Runs], starts: Sequence[np.ndarray], jumps: Sequence[np.ndarray] | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row tile, first token, end token) of each run; row tiles are counted over all steps, tokens from 0 in each.

    Args:
        jumps: tiles of each step at which a run is cut.
    """
    offsets = np.concatenate([np.diff(_int64(r.offsets)) for r in runs])
    first, count = (np.concatenate([_int64(getattr(r, name)) for r in runs]) for name in ("first", "count"))
    lengths = [len(x) for x in starts]
    base = np.repeat(np.cumsum(lengths) - lengths, [len(r.first) for r in runs])
    all_starts = np.concatenate(starts)
    begin: np.ndarray = first + base
    end: np.ndarray = begin + count
    row = np.repeat(np.arange(len(offsets)), offsets)
    if jumps is not None:
        cuts = np.concatenate([jump + at for jump, at in zip(jumps, np.cumsum(lengths) - lengths, strict=True)])
        row, begin, end = _cut(row, begin, end, cuts)
    return row, all_starts[begin], all_starts[end]


def _cut(
    row: np.ndarray, begin: np.ndarray, end: np.ndarray, cuts: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Runs ``begin : end`` of rows, cut wherever one of ``cuts``, which rise, is inside."""
    low, high = np.searchsorted(cuts, begin, side="right"), np.searchsorted(cuts, end, side="left")
    pieces = high - low + 1
    run = np.repeat(np.arange(len(row)), pieces)
    nth = np.arange(len(run)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    at = np.append(cuts, 0)
    firsts = np.where(nth == 0, begin[run], at[np.maximum(low[run] + nth - 1, 0)])
    ends = np.where(nth == pieces[run] - 1, end[run], at[np.minimum(low[run] + nth, len(cuts))])
    return row[run], firsts, ends


def _int64(x: Tensor) -> np.ndarray:
    return x.numpy().astype(np.int64)


def _work_table(side: _Side, blocks: Blocks) -> WorkTable:
    num_tiles = len(side.step)
    full_row, full_first, full_end = side.full
    partial_row, partial_first, partial_end = side.partial
    whole_end = full_end - (full_end - full_first) % blocks.cols
    if blocks.short_are_masked:
        is_short = (side.end_row - side.first_row) % blocks.rows != 0
        whole_end = np.where(is_short[full_row], full_first, whole_end)

    whole, rest = whole_end > full_first, full_end > whole_end
    masked = (
        np.append(partial_row, full_row[rest]),
        np.append(partial_first, whole_end[rest]),
        np.append(partial_end, full_end[rest]),
    )
    order = np.lexsort((masked[1], masked[0]))
    walks = [tuple(x[order] for x in masked), (full_row[whole], full_first[whole], whole_end[whole])]

    fields, runs, num_runs = [], [], 0
    for row, first, end in walks:
        bounds = num_runs + np.searchsorted(row, np.arange(num_tiles + 1))
        num_blocks = np.bincount(row, weights=-(-(end - first) // blocks.cols), minlength=num_tiles).astype(np.int64)
        fields += [bounds[:-1], bounds[1:], num_blocks]
        runs.append(np.stack([first, end], axis=1))
        num_runs += len(row)
    runs.append(np.zeros((1, 2), dtype=np.int64))  # what a walk over nothing looks at

    pieces = -(-(side.end_row - side.first_row) // blocks.rows)
    tile = np.repeat(np.arange(num_tiles), pieces)
    first_row = (
        side.first_row[tile] + (np.arange(len(tile)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * blocks.rows
    )
    end_row = np.minimum(first_row + blocks.rows, side.end_row[tile])
    cost, step = (fields[2] * MASKED_COST + fields[5])[tile], side.step[tile]
    items = np.stack([first_row, end_row, *(field[tile] for field in fields)], axis=1)[np.lexsort((-cost, step))]

    table = np.concatenate([items.reshape(-1), np.concatenate(runs).reshape(-1)]).astype(np.int32)
    counts = (np.bincount(x, minlength=side.num_steps).tolist() for x in (step, step[cost > 0]))
    return WorkTable(blocks, torch.from_numpy(table), *counts)


@triton.jit
def locate(num_items, num_heads, heads_at_once, group_size):
    """(item, head) of this program; ``num_heads`` and ``heads_at_once`` count groups of ``group_size`` adjacent heads.

    A section of heads, as many as the L2 cache holds K and V of, runs from its largest to its smallest item; then the
    next section.
    """
    pid = tl.program_id(0)
    section_size = num_items * heads_at_once * group_size
    section = pid // section_size
    pid -= section * section_size
    first_head = section * heads_at_once
    width = tl.minimum(heads_at_once, num_heads - first_head) * group_size
    return pid // width, first_head * group_size + pid % width


@triton.jit
def begin_walk(runs_ptr, first_run, end_run):
    """The walk at its first block: (start, end) of the current run, then the run after it and its (start, end).

    The next run is read one block ahead, so that no address waits for a load. After the last run comes the first again.
    """
    start = tl.load(runs_ptr + 2 * first_run)
    end = tl.load(runs_ptr + 2 * first_run + 1)
    next_run = tl.where(first_run + 1 < end_run, first_run + 1, first_run)
    next_start = tl.load(runs_ptr + 2 * next_run)
    next_end = tl.load(runs_ptr + 2 * next_run + 1)
    return start, end, next_run, next_start, next_end


@triton.jit
def advance(start, end, next_run, next_start, next_end, runs_ptr, first_run, end_run, BLOCK: tl.constexpr):
    """The walk one block further, and whether it began anew."""
    start += BLOCK
    exhausted = start >= end
    begins_anew = exhausted & (next_run == first_run)
    start = tl.where(exhausted, next_start, start)
    end = tl.where(exhausted, next_end, end)
    following = tl.where(next_run + 1 < end_run, next_run + 1, first_run)
    next_run = tl.where(exhausted, following, next_run)
    next_start = tl.load(runs_ptr + 2 * next_run)
    next_end = tl.load(runs_ptr + 2 * next_run + 1)
    return start, end, next_run, next_start, next_end, begins_anew
