"""Work: which program of a kernel computes what, in which order. Tables made once per tile mask, and the device
functions that read them.

A program owns a block of rows of one head and walks over blocks of columns. Rows are queries and columns keys, or the
reverse in the kernel of dK/dV. Its columns are runs of consecutive tokens, so a table follows the boundary of the mask
and not its area. FULL runs are cut to whole blocks, walked without any mask; their rests join the PARTIAL runs, where
the mask is evaluated and columns are bounds-checked.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from cpflex.tile_mask import Runs, TileMask

ITEM_FIELDS = tl.constexpr(8)
"""Of an item: first row, end row; first run, end run, blocks of the masked walk; the same three of the full walk."""

MASKED_COST = 1.5
"""A block whose mask is evaluated, in FULL blocks; only the order of the programs depends on it."""


@dataclass(frozen=True)
class Work:
    """What the programs of one kernel compute, on the device."""

    items: Tensor  # int32 [num_items * ITEM_FIELDS], most work first
    runs: Tensor  # int32 [runs + 1, 2], first and end column of each
    num_items: int


def work_by_query(tile_mask: TileMask, device: torch.device, block_q: int, block_kv: int, idle_rows: bool) -> Work:
    """Blocks of queries that walk over keys; ``idle_rows``: those that see no key too."""
    m = tile_mask
    return _cached(m, "query", m.q_starts, m.kv_starts, m.full, m.partial, device, block_q, block_kv, idle_rows)


def work_by_key(tile_mask: TileMask, device: torch.device, block_kv: int, block_q: int, idle_rows: bool) -> Work:
    """Blocks of keys that walk over queries; ``idle_rows``: those that no query sees too."""
    m = tile_mask
    by_kv = (m.kv_starts, m.q_starts, m.full_by_kv, m.partial_by_kv)
    return _cached(m, "key", *by_kv, device, block_kv, block_q, idle_rows)


def _cached(tile_mask: TileMask, axis: str, *arguments) -> Work:
    known = vars(tile_mask).setdefault("_work", {})  # lives and dies with the tile mask
    key = (axis, *arguments[4:])
    if key not in known:
        known[key] = make_work(*arguments)
    return known[key]


def make_work(
    row_starts: Tensor,  # int32 [row tiles + 1]
    col_starts: Tensor,  # int32 [column tiles + 1]
    full: Runs,
    partial: Runs,
    device: torch.device,
    block_rows: int,
    block_cols: int,
    idle_rows: bool,
) -> Work:
    rows, cols = row_starts.numpy().astype(np.int64), col_starts.numpy().astype(np.int64)
    num_tiles = len(rows) - 1
    full_row, full_first, full_end = _tokens(full, cols)
    partial_row, partial_first, partial_end = _tokens(partial, cols)
    whole_end = full_end - (full_end - full_first) % block_cols

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
        blocks = np.bincount(row, weights=-(-(end - first) // block_cols), minlength=num_tiles).astype(np.int64)
        fields += [bounds[:-1], bounds[1:], blocks]
        runs.append(np.stack([first, end], axis=1))
        num_runs += len(row)
    runs.append(np.zeros((1, 2), dtype=np.int64))  # what a walk over nothing looks at

    pieces = -(-np.diff(rows) // block_rows)
    tile = np.repeat(np.arange(num_tiles), pieces)
    first_row = rows[tile] + (np.arange(len(tile)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * block_rows
    end_row = np.minimum(first_row + block_rows, rows[tile + 1])
    cost = fields[2] * MASKED_COST + fields[5]
    chosen = np.argsort(-cost[tile], kind="stable")
    if not idle_rows:
        chosen = chosen[cost[tile[chosen]] > 0]
    items = np.stack([first_row, end_row, *(field[tile] for field in fields)], axis=1)[chosen]

    table = np.concatenate([items.reshape(-1), np.concatenate(runs).reshape(-1)]).astype(np.int32)
    on_device = torch.from_numpy(table).to(device)
    return Work(on_device[: items.size], on_device[items.size :].view(-1, 2), len(items))


def _tokens(runs: Runs, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row tile, first token, end token) of each run."""
    offsets, first, count = (x.numpy().astype(np.int64) for x in (runs.offsets, runs.first, runs.count))
    return np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)), starts[first], starts[first + count]


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
