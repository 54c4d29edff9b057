"""TileMask: what one (local queries, visiting keys) pair has to compute, as runs of tiles.

A tile is at most `TILE` consecutive tokens of one chunk, on either axis. Tiles where the mask is false everywhere are
not listed; FULL ones skip the mask; PARTIAL ones evaluate it at the tokens' positions. Classification goes from coarse
squares to tiles: its cost follows the boundary of the mask, not its area.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpflex.mods.evaluate import evaluate
from cpflex.mods.graph import Mod
from cpflex.mods.intervals import EMPTY, FULL, PARTIAL

TILE = 128
"""Tokens on a side of a tile."""

CPU = torch.device("cpu")

EXACT_ELEMENTS = 1 << 21
"""Mask elements that the plan of one mask kind may evaluate to settle tiles that intervals left open."""

MAX_RUNS = 1 << 26
"""Runs of tiles of one rank: more would take too many gigabytes to make. Dense causal attention of a billion tokens on
1,024 ranks has more."""

Classify = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""(q_lo, q_hi, kv_lo, kv_hi), positions, inclusive -> verdicts EMPTY / PARTIAL / FULL."""


@dataclass(frozen=True)
class Tiles:
    """The whole padded sequence cut into tiles, none of which straddles two chunks. Both axes of the mask are cut
    alike.
    """

    chunk_len: int
    num_chunks: int
    tile_len: int = TILE

    @property
    def per_chunk(self) -> int:
        return -(-self.chunk_len // self.tile_len)

    @property
    def num_tiles(self) -> int:
        return self.num_chunks * self.per_chunk

    @cached_property
    def lo(self) -> np.ndarray:
        """First position of each tile, int64."""
        tile = np.arange(self.num_tiles)
        return tile // self.per_chunk * self.chunk_len + tile % self.per_chunk * self.tile_len

    @cached_property
    def hi(self) -> np.ndarray:
        """Last position of each tile, int64."""
        return np.append(self.lo[1:], self.num_chunks * self.chunk_len) - 1

    @cached_property
    def length(self) -> np.ndarray:
        """Tokens of each tile, int64."""
        return self.hi - self.lo + 1

    @cached_property
    def chunk(self) -> np.ndarray:
        """Chunk of each tile, int64."""
        return np.arange(self.num_tiles) // self.per_chunk

    def of_chunks(self, chunks: Iterable[int]) -> np.ndarray:
        """Tiles of the chunks, in the order given."""
        first = np.fromiter(chunks, dtype=np.int64) * self.per_chunk
        return (first[:, None] + np.arange(self.per_chunk)).reshape(-1)


@dataclass(frozen=True)
class Squares:
    """The tiles that are not EMPTY: FULL ones as squares of tiles, (first row, first column, side); PARTIAL ones
    singly.
    """

    full: tuple[np.ndarray, np.ndarray, np.ndarray]
    partial: tuple[np.ndarray, np.ndarray]

    def rows(self, tiles: Tiles) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(row, first column, end column) of each row of each square, PARTIAL and FULL; squares overhang the last
        tile.
        """
        (rows, cols, sides), (partial_rows, partial_cols) = self.full, self.partial
        sides = np.append(sides, np.ones_like(partial_rows))
        return _lines(np.append(rows, partial_rows), np.append(cols, partial_cols), sides, tiles)


def classify_squares(
    classify: Classify, tiles: Tiles, rows: np.ndarray | None = None, cols: np.ndarray | None = None
) -> Squares:
    """Coarse to fine: a square that is all EMPTY or all FULL is settled, any other is cut in four.

    Args:
        rows, cols: bool [num_tiles]; squares without a wanted row and a wanted column are left out.
    """
    side = 1 << (tiles.num_tiles - 1).bit_length()
    lo, hi = _pyramid(tiles.lo, np.minimum, side), _pyramid(tiles.hi, np.maximum, side)
    wanted = [_pyramid(x, np.logical_or, side) if x is not None else None for x in (rows, cols)]
    row = col = np.zeros(1, dtype=np.int64)
    full: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    while True:
        verdict = classify(lo[side][row], hi[side][row], lo[side][col], hi[side][col])
        is_full = verdict == FULL
        full.append((row[is_full] * side, col[is_full] * side, np.full(is_full.sum(), side)))
        row, col = row[verdict == PARTIAL], col[verdict == PARTIAL]
        if side == 1:
            return Squares(tuple(np.concatenate(parts) for parts in zip(*full, strict=True)), (row, col))  # type: ignore[arg-type]
        side //= 2
        row = (row[:, None] * 2 + np.array([0, 0, 1, 1])).reshape(-1)
        col = (col[:, None] * 2 + np.array([0, 1, 0, 1])).reshape(-1)
        keep = (row < len(lo[side])) & (col < len(lo[side]))
        row, col = row[keep], col[keep]
        for index, levels in ((0, wanted[0]), (1, wanted[1])):
            if levels is not None:
                keep = levels[side][(row, col)[index]]
                row, col = row[keep], col[keep]


def _pyramid(values: np.ndarray, reduce: np.ufunc, side: int) -> dict[int, np.ndarray]:
    """The values of groups of 1, 2, 4 ... side tiles, reduced."""
    levels = {1: values}
    for level in range(1, side.bit_length()):
        values = reduce.reduceat(values, np.arange(0, len(values), 2))
        levels[1 << level] = values
    return levels


@dataclass(frozen=True)
class Runs:
    """Runs of consecutive tiles per row, in CSR form: row i holds runs ``offsets[i] : offsets[i + 1]``."""

    offsets: Tensor  # int32 [rows + 1]
    first: Tensor  # int32 [runs], first tile of a run
    count: Tensor  # int32 [runs], tiles in a run

    @property
    def num_tiles(self) -> int:
        return int(self.count.sum())

    def row(self, index: int) -> list[tuple[int, int]]:
        """(first tile, tiles) of each run of a row."""
        begin, end = self.offsets[index], self.offsets[index + 1]
        return list(zip(self.first[begin:end].tolist(), self.count[begin:end].tolist(), strict=True))


@dataclass(frozen=True)
class TileMask:
    """Tiles and verdicts of one pair. Tile i of an axis is tokens ``starts[i] : starts[i + 1]`` of that axis, at the
    positions from ``first[i]`` on. Tables stay on the CPU; positions of all tokens are made where ``device`` says.
    """

    q_first: Tensor  # int32 [q_tiles]
    kv_first: Tensor  # int32 [kv_tiles]
    q_starts: Tensor  # int32 [q_tiles + 1]
    kv_starts: Tensor  # int32 [kv_tiles + 1]
    full: Runs  # by query tile
    partial: Runs
    full_by_kv: Runs  # the same tiles by key tile
    partial_by_kv: Runs
    num_unproven: int
    """PARTIAL tiles that were not evaluated exactly, for want of budget."""
    device: torch.device = CPU

    @cached_property
    def q_positions(self) -> Tensor:
        """Global position of each local query, int32 [S_q]."""
        return _positions(self.q_first, self.q_starts).to(self.device)

    @cached_property
    def kv_positions(self) -> Tensor:
        """Global position of each visiting key, int32 [S_kv]."""
        return _positions(self.kv_first, self.kv_starts).to(self.device)

    @property
    def num_tiles(self) -> int:
        return self.full.num_tiles + self.partial.num_tiles

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def _positions(first: Tensor, starts: Tensor) -> Tensor:
    offset = torch.arange(int(starts[-1]), dtype=torch.int32)
    return offset + torch.repeat_interleave(first - starts[:-1], starts.diff())


def make_tile_masks(
    mod: Mod,
    squares: Squares,
    tiles: Tiles,
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
        q_tiles: tiles of the local queries, rising.
        blocks: tiles of the keys of each step, in their order there; a tile that a query sees is in one of them.
    """
    is_local = np.zeros(tiles.num_tiles, dtype=bool)
    is_local[q_tiles] = True
    open_rows, open_cols = (x[is_local[squares.partial[0]]] for x in squares.partial)
    verdicts, unproven = _evaluate_tiles(mod, tiles, open_rows, open_cols, batch_size, num_heads, exact_elements)
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

    col_of, step_of = (np.full(tiles.num_tiles, -1) for _ in range(2))
    for step, block in enumerate(blocks):
        col_of[block], step_of[block] = np.arange(len(block)), step
    unproven_steps = np.bincount(step_of[open_cols[unproven]], minlength=len(blocks))
    by_q, by_kv = [], []
    for rows, cols, sides in kinds:
        step, row, num_rows, col, num_cols = _rectangles(rows, cols, sides, tiles, q_tiles, col_of, step_of)
        by_q.append(_runs(step, row, num_rows, col, num_cols, [len(q_tiles)] * len(blocks)))
        by_kv.append(_runs(step, col, num_cols, row, num_rows, [len(block) for block in blocks]))

    q_first, q_starts = _axis(tiles, q_tiles)
    return [
        TileMask(q_first, kv[0], q_starts, kv[1], full_q, partial_q, full_kv, partial_kv, int(count))
        for kv, full_q, partial_q, full_kv, partial_kv, count in zip(
            (_axis(tiles, block) for block in blocks), *by_q, *by_kv, unproven_steps, strict=True
        )
    ]


def _axis(tiles: Tiles, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
    """Position of the first token and start of each tile of an axis, int32."""
    starts = np.append(0, np.cumsum(tiles.length[chosen]))
    return torch.from_numpy(tiles.lo[chosen].astype(np.int32)), torch.from_numpy(starts.astype(np.int32))


def _lines(
    rows: np.ndarray, cols: np.ndarray, sides: np.ndarray, tiles: Tiles
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row, first column, end column) of each row of each square, cut off at the last tile."""
    square, nth = _repeat(sides)
    row = rows[square] + nth
    exists = row < tiles.num_tiles
    row, square = row[exists], square[exists]
    return row, cols[square], np.minimum(cols[square] + sides[square], tiles.num_tiles)


def _rectangles(
    rows: np.ndarray,
    cols: np.ndarray,
    sides: np.ndarray,
    tiles: Tiles,
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
    end = np.minimum(cols + sides[local], tiles.num_tiles)
    # within a chunk, columns are neighbours in the block that holds them
    first_chunk = tiles.chunk[cols]
    square, nth = _repeat(tiles.chunk[end - 1] - first_chunk + 1)
    chunk = first_chunk[square] + nth
    first = np.maximum(cols[square], chunk * tiles.per_chunk)
    num_cols = np.minimum(end[square], (chunk + 1) * tiles.per_chunk) - first
    step = step_of[first]
    assert (step >= 0).all(), "a tile that a query sees visits at some step"
    return step, first_row[square], num_rows[square], col_of[first], num_cols


def _repeat(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each index as often as its count says, and a number counting its repetitions."""
    index = np.repeat(np.arange(len(counts)), counts)
    return index, np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)


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
    rectangle, nth = _repeat(num_rows)
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
    mod: Mod, tiles: Tiles, rows: np.ndarray, cols: np.ndarray, batch_size: int, num_heads: int, budget: int
) -> tuple[np.ndarray, np.ndarray]:
    """Exact verdicts of the listed tiles while the budget lasts, PARTIAL for the rest; and which are the rest, bool."""
    verdicts = np.full(len(rows), PARTIAL, dtype=np.int8)
    copies = (batch_size if mod.uses("b") else 1) * (num_heads if mod.uses("h") else 1)
    side = min(tiles.tile_len, tiles.chunk_len)
    affordable = min(len(rows), budget // (side * side * copies))
    inputs = {
        "b": torch.arange(batch_size if mod.uses("b") else 1).view(-1, 1, 1, 1, 1),
        "h": torch.arange(num_heads if mod.uses("h") else 1).view(-1, 1, 1, 1),
    }
    group = max(1, (1 << 20) // (side * side * copies))  # tiles at once: what stays in cache

    def positions(chosen: np.ndarray) -> Tensor:
        # a short tile repeats its last token, which changes no verdict
        return torch.from_numpy(np.minimum(tiles.lo[chosen][:, None] + np.arange(side), tiles.hi[chosen][:, None]))

    for begin in range(0, affordable, group):
        chosen = slice(begin, min(begin + group, affordable))
        inputs["q_idx"] = positions(rows[chosen])[:, :, None]
        inputs["kv_idx"] = positions(cols[chosen])[:, None, :]
        seen = evaluate(mod.graph, mod.captured, inputs)[0]
        seen = seen.broadcast_to(torch.broadcast_shapes(seen.shape, (1, 1, chosen.stop - begin, side, side)))
        seen = seen.transpose(0, 2).flatten(1)
        verdicts[chosen] = np.where(seen.all(1).numpy(), FULL, np.where(seen.any(1).numpy(), PARTIAL, EMPTY))
    return verdicts, np.arange(len(rows)) >= affordable
