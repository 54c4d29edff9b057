"""Tables: the squares of a mask -> one TileMask for each step of a rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cpflex.mods.evaluate import evaluate
from cpflex.mods.graph import Mod
from cpflex.mods.intervals import EMPTY, FULL, PARTIAL
from cpflex.planning.squares import Squares, repeat
from cpflex.tile_mask import Axis, Runs, TileMask

EXACT_ELEMENTS = 1 << 21
"""Mask elements that the plan of one mask kind may evaluate to settle tiles that intervals left open."""

MAX_RUNS = 1 << 26
"""Runs of tiles of one rank: more would take too many gigabytes to make. Dense causal attention of a billion tokens on
1,024 ranks has more."""


def make_tile_masks(
    mod: Mod,
    squares: Squares,
    tiles: Axis,
    keys: Axis,
    q_tiles: np.ndarray,
    blocks: Sequence[np.ndarray],
    batch_size: int = 1,
    num_heads: int = 1,
    exact_elements: int = EXACT_ELEMENTS,
) -> list[TileMask]:
    """One TileMask per block of visiting keys. Tiles that intervals left open are evaluated, within a budget for all
    blocks.

    Args:
        squares: at least the squares whose rows are in ``q_tiles``.
        tiles, keys: of the queries, and of the keys.
        q_tiles: tiles of the local queries, rising.
        blocks: tiles of the keys of each step, in their order there; a tile that a query sees is in one of them.
    """
    is_local = np.zeros(tiles.num_tiles, dtype=bool)
    is_local[q_tiles] = True
    open_rows, open_cols = (x[is_local[squares.partial[0]]] for x in squares.partial)
    verdicts, unproven = _evaluate_tiles(
        mod, (tiles, keys), (open_rows, open_cols), batch_size, num_heads, exact_elements
    )
    is_full, is_partial = verdicts == FULL, verdicts == PARTIAL
    full_rows, full_cols, sides = squares.full
    kinds = (
        (
            np.append(full_rows, open_rows[is_full]),
            np.append(full_cols, open_cols[is_full]),
            np.append(sides, np.ones_like(open_rows[is_full])),
        ),
        (open_rows[is_partial], open_cols[is_partial], np.ones_like(open_rows[is_partial])),
    )

    col_of, step_of = (np.full(keys.num_tiles, -1) for _ in range(2))
    for step, block in enumerate(blocks):
        col_of[block], step_of[block] = np.arange(len(block)), step
    unproven_steps = np.bincount(step_of[open_cols[unproven]], minlength=len(blocks))
    by_q, by_kv = [], []
    for rows, cols, sides in kinds:
        step, row, num_rows, col, num_cols = _rectangles(rows, cols, sides, q_tiles, col_of, step_of)
        by_q.append(_runs(step, row, num_rows, col, num_cols, [len(q_tiles)] * len(blocks)))
        by_kv.append(_runs(step, col, num_cols, row, num_rows, [len(block) for block in blocks]))

    q_first, q_starts = _axis(tiles, q_tiles)
    return [
        TileMask(q_first, kv[0], q_starts, kv[1], full_q, partial_q, full_kv, partial_kv, int(count))
        for kv, full_q, partial_q, full_kv, partial_kv, count in zip(
            (_axis(keys, block) for block in blocks), *by_q, *by_kv, unproven_steps, strict=True
        )
    ]


def _axis(tiles: Axis, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
    """Position of the first token and start of each tile of an axis, int32."""
    starts = np.append(0, np.cumsum(tiles.length[chosen]))
    return torch.from_numpy(tiles.lo[chosen].astype(np.int32)), torch.from_numpy(starts.astype(np.int32))


def _rectangles(
    rows: np.ndarray,
    cols: np.ndarray,
    sides: np.ndarray,
    q_tiles: np.ndarray,
    col_of: np.ndarray,
    step_of: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Squares of the whole mask -> (step, first row, number of rows, first column, number of columns), local to the
    step.
    """
    # local queries are in rising order: the rows that a square has in common with them are neighbours there
    first_row, end_row = np.searchsorted(q_tiles, rows), np.searchsorted(q_tiles, rows + sides)
    local = end_row > first_row
    first_row, num_rows, cols = first_row[local], (end_row - first_row)[local], cols[local]
    end = np.minimum(cols + sides[local], len(col_of))
    # columns that are neighbours in the block that holds them too
    follows = np.append(False, (np.diff(col_of) == 1) & (np.diff(step_of) == 0))
    run = np.cumsum(~follows) - 1
    run_ends = np.append(np.flatnonzero(~follows)[1:], len(col_of))
    run_starts = np.append(0, run_ends[:-1])
    first_run = run[cols]
    square, nth = repeat(run[end - 1] - first_run + 1)
    nth = first_run[square] + nth
    first = np.maximum(cols[square], run_starts[nth])
    num_cols = np.minimum(end[square], run_ends[nth]) - first
    step = step_of[first]
    assert (step >= 0).all(), "a tile that a query sees visits at some step"
    return step, first_row[square], num_rows[square], col_of[first], num_cols


def _runs(
    step: np.ndarray,
    row: np.ndarray,
    num_rows: np.ndarray,
    first: np.ndarray,
    count: np.ndarray,
    rows_of_step: list[int],
) -> list[Runs]:
    """Rectangles -> per step, runs by row, neighbours joined."""
    if num_rows.sum() > MAX_RUNS:
        raise NotImplementedError(
            f"the tables of this plan would be made of {int(num_rows.sum()):,} runs of tiles; {MAX_RUNS:,} are "
            "supported - share so long a sequence among more ranks, or mask more of it"
        )
    rectangle, nth = repeat(num_rows)
    step, row, first, count = step[rectangle], row[rectangle] + nth, first[rectangle], count[rectangle]
    order = np.lexsort((first, row, step))
    step, row, first, count = (x[order] for x in (step, row, first, count))
    begins = np.ones(len(row), dtype=bool)
    begins[1:] = (step[1:] != step[:-1]) | (row[1:] != row[:-1]) | (first[1:] != (first + count)[:-1])
    begin = np.flatnonzero(begins)
    total = np.add.reduceat(count, begin) if len(begin) else count
    step, row, first = step[begin], row[begin], first[begin]
    bounds = np.searchsorted(step, np.arange(len(rows_of_step) + 1))
    runs = []
    for index, rows in enumerate(rows_of_step):
        here = slice(bounds[index], bounds[index + 1])
        offsets = np.append(0, np.cumsum(np.bincount(row[here], minlength=rows)))
        runs.append(Runs(*(torch.from_numpy(x.astype(np.int32)) for x in (offsets, first[here], total[here]))))
    return runs


def _evaluate_tiles(
    mod: Mod,
    axes: tuple[Axis, Axis],
    listed: tuple[np.ndarray, np.ndarray],
    batch_size: int,
    num_heads: int,
    budget: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Exact verdicts of the listed tiles while the budget lasts, PARTIAL for the rest; and which are the rest, bool."""
    rows, cols = listed
    verdicts = np.full(len(rows), PARTIAL, dtype=np.int8)
    copies = (batch_size if mod.uses("b") else 1) * (num_heads if mod.uses("h") else 1)
    q_side, kv_side = (int(axis.length.max()) for axis in axes)
    affordable = min(len(rows), budget // (q_side * kv_side * copies))
    inputs = {
        "b": torch.arange(batch_size if mod.uses("b") else 1).view(-1, 1, 1, 1, 1),
        "h": torch.arange(num_heads if mod.uses("h") else 1).view(-1, 1, 1, 1),
    }
    group = max(1, (1 << 20) // (q_side * kv_side * copies))  # tiles at once: what stays in cache

    def positions(tiles: Axis, side: int, chosen: np.ndarray) -> Tensor:
        # a short tile repeats its last token, which changes no verdict
        return torch.from_numpy(np.minimum(tiles.lo[chosen][:, None] + np.arange(side), tiles.hi[chosen][:, None]))

    for begin in range(0, affordable, group):
        chosen = slice(begin, min(begin + group, affordable))
        inputs["q_idx"] = positions(axes[0], q_side, rows[chosen])[:, :, None]
        inputs["kv_idx"] = positions(axes[1], kv_side, cols[chosen])[:, None, :]
        seen = evaluate(mod.graph, mod.captured, inputs)[0]
        seen = seen.broadcast_to(torch.broadcast_shapes(seen.shape, (1, 1, chosen.stop - begin, q_side, kv_side)))
        seen = seen.transpose(0, 2).flatten(1)
        verdicts[chosen] = np.where(seen.all(1).numpy(), FULL, np.where(seen.any(1).numpy(), PARTIAL, EMPTY))
    return verdicts, np.arange(len(rows)) >= affordable
