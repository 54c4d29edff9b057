"""TileMask: what one (local queries, visiting keys) pair has to compute, as runs of tiles.

A tile is at most `TILE` consecutive tokens of one chunk, on either axis. Tiles where the mask is false everywhere are not listed; FULL
ones skip the mask; PARTIAL ones evaluate it at the tokens' positions. Classification goes from coarse squares to tiles: its cost follows
the boundary of the mask, not its area.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cpflex.mods.evaluate import evaluate
from cpflex.mods.graph import Mod
from cpflex.mods.intervals import EMPTY, FULL, PARTIAL

TILE = 128
"""Tokens on a side of a tile."""

EXACT_ELEMENTS = 1 << 22
"""Mask elements that one classification may evaluate to settle tiles that intervals left open."""

Classify = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""(q_lo, q_hi, kv_lo, kv_hi), positions, inclusive -> verdicts EMPTY / PARTIAL / FULL."""


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
    """Positions, tiles and verdicts of one pair. Tile i of an axis is tokens ``starts[i] : starts[i + 1]`` of that axis."""

    q_positions: Tensor  # int32 [S_q]
    kv_positions: Tensor  # int32 [S_kv]
    q_starts: Tensor  # int32 [q_tiles + 1]
    kv_starts: Tensor  # int32 [kv_tiles + 1]
    full: Runs  # by query tile
    partial: Runs
    full_by_kv: Runs  # the same tiles by key tile
    partial_by_kv: Runs
    num_unproven: int
    """PARTIAL tiles that were not evaluated exactly, for want of budget."""

    @property
    def num_tiles(self) -> int:
        return self.full.num_tiles + self.partial.num_tiles


@dataclass(frozen=True)
class Axis:
    """Tokens along one axis of a pair, cut into tiles of consecutive positions."""

    positions: np.ndarray  # int64 [S]
    starts: np.ndarray  # int64 [tiles + 1]

    @property
    def num_tiles(self) -> int:
        return len(self.starts) - 1

    @property
    def lo(self) -> np.ndarray:
        return self.positions[self.starts[:-1]]

    @property
    def hi(self) -> np.ndarray:
        return self.positions[self.starts[1:] - 1]


def cut(positions: np.ndarray, chunk_len: int) -> Axis:
    """Tiles of an axis made of chunks (or pieces of them that begin at a tile): none straddles two chunks or two pieces."""
    index = np.arange(len(positions))
    begins = np.ones(len(positions), dtype=bool)
    begins[1:] = (np.diff(positions) != 1) | (positions[1:] % chunk_len % TILE == 0)
    return Axis(positions, np.append(index[begins], len(positions)))


def make_tile_mask(
    mod: Mod,
    classify: Classify,
    q: Axis,
    kv: Axis,
    batch_size: int = 1,
    num_heads: int = 1,
    exact: int = EXACT_ELEMENTS,
) -> TileMask:
    """Classify every tile of a pair; settle what stays PARTIAL by evaluating the mask, within ``exact`` elements."""
    squares = classify_squares(classify, q, kv)
    rows, cols = squares.partial
    settled, num_unproven = _evaluate_tiles(mod, q, kv, rows, cols, batch_size, num_heads, exact)
    full_rows, full_cols, full_spans = squares.full
    exactly_full = settled == FULL
    full = (
        np.append(full_rows, rows[exactly_full]),
        np.append(full_cols, cols[exactly_full]),
        np.append(full_spans, np.ones(exactly_full.sum(), dtype=np.int64)),
    )
    partial = (rows[settled == PARTIAL], cols[settled == PARTIAL], np.ones((settled == PARTIAL).sum(), dtype=np.int64))
    return TileMask(
        *(torch.from_numpy(x.astype(np.int32)) for x in (q.positions, kv.positions, q.starts, kv.starts)),
        full=_runs(*full, q, kv),
        partial=_runs(*partial, q, kv),
        full_by_kv=_runs(full[1], full[0], full[2], kv, q),
        partial_by_kv=_runs(partial[1], partial[0], partial[2], kv, q),
        num_unproven=num_unproven,
    )


@dataclass(frozen=True)
class Squares:
    """Verdicts as squares of tiles: (first row, first column, side); a square may reach beyond the last tile."""

    full: tuple[np.ndarray, np.ndarray, np.ndarray]
    partial: tuple[np.ndarray, np.ndarray]  # of side 1


def classify_squares(classify: Classify, q: Axis, kv: Axis) -> Squares:
    """Coarse to fine: a square that is all EMPTY or all FULL is settled, any other is cut in four."""
    side = 1 << max(q.num_tiles - 1, kv.num_tiles - 1, 0).bit_length()
    q_bounds, kv_bounds = _pyramid(q, side), _pyramid(kv, side)
    rows = cols = np.zeros(1, dtype=np.int64)
    full: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    while True:
        (q_lo, q_hi), (kv_lo, kv_hi) = q_bounds[side], kv_bounds[side]
        verdict = classify(q_lo[rows], q_hi[rows], kv_lo[cols], kv_hi[cols])
        is_full = verdict == FULL
        full.append((rows[is_full] * side, cols[is_full] * side, np.full(is_full.sum(), side)))
        rows, cols = rows[verdict == PARTIAL], cols[verdict == PARTIAL]
        if side == 1:
            break
        side //= 2
        rows = (rows[:, None] * 2 + np.array([0, 0, 1, 1])).reshape(-1)
        cols = (cols[:, None] * 2 + np.array([0, 1, 0, 1])).reshape(-1)
        exists = (rows < len(q_bounds[side][0])) & (cols < len(kv_bounds[side][0]))
        rows, cols = rows[exists], cols[exists]
    return Squares(tuple(np.concatenate(parts) for parts in zip(*full, strict=True)), (rows, cols))  # type: ignore[arg-type]


def count_pairs(classify: Classify, axis: Axis, chunk_len: int, num_chunks: int) -> np.ndarray:
    """Work between query chunk i and key chunk j of a whole sequence: (query, key) pairs in tiles that are not EMPTY.

    Returns:
        int64 [num_chunks, num_chunks].
    """
    squares = classify_squares(classify, axis, axis)
    full_rows, full_cols, sides = squares.full
    rows = np.append(full_rows, squares.partial[0])
    cols = np.append(full_cols, squares.partial[1])
    row, first, end = _rows_of_squares(rows, cols, np.append(sides, np.ones_like(squares.partial[0])), axis, axis)
    chunk_of_tile, tile_len = axis.lo // chunk_len, np.diff(axis.starts)
    # tokens of the rows whose run begins or ends at a column; the running sum is the tokens that see a column of tiles
    width = axis.num_tiles + 1
    edges = np.bincount(chunk_of_tile[row] * width + first, tile_len[row], num_chunks * width)
    edges -= np.bincount(chunk_of_tile[row] * width + end, tile_len[row], num_chunks * width)
    pairs = np.cumsum(edges.reshape(num_chunks, width)[:, :-1], axis=1).round().astype(np.int64) * tile_len
    return np.add.reduceat(pairs, np.searchsorted(chunk_of_tile, np.arange(num_chunks)), axis=1)


def _pyramid(axis: Axis, side: int) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Least and greatest position of each group of 1, 2, 4 ... side tiles."""
    lo, hi = axis.lo, axis.hi
    levels = {1: (lo, hi)}
    for level in range(1, side.bit_length()):
        pairs = np.arange(0, len(lo), 2)
        lo, hi = np.minimum.reduceat(lo, pairs), np.maximum.reduceat(hi, pairs)
        levels[1 << level] = (lo, hi)
    return levels


def _evaluate_tiles(
    mod: Mod, q: Axis, kv: Axis, rows: np.ndarray, cols: np.ndarray, batch_size: int, num_heads: int, budget: int
) -> tuple[np.ndarray, int]:
    """Exact verdicts of the listed tiles while the budget lasts; PARTIAL for the rest, which are counted."""
    verdicts = np.full(len(rows), PARTIAL, dtype=np.int8)
    copies = (batch_size if mod.uses("b") else 1) * (num_heads if mod.uses("h") else 1)
    affordable = min(len(rows), budget // (TILE * TILE * copies))
    inputs = {
        "b": torch.arange(batch_size if mod.uses("b") else 1).view(-1, 1, 1, 1, 1),
        "h": torch.arange(num_heads if mod.uses("h") else 1).view(-1, 1, 1, 1),
    }
    group = max(1, (1 << 20) // (TILE * TILE * copies))  # tiles at once: what stays in cache
    for begin in range(0, affordable, group):
        chosen = slice(begin, min(begin + group, affordable))
        inputs["q_idx"] = _tile_positions(q, rows[chosen])[:, :, None]
        inputs["kv_idx"] = _tile_positions(kv, cols[chosen])[:, None, :]
        seen = evaluate(mod.graph, mod.captured, inputs)[0]
        seen = seen.broadcast_to(*torch.broadcast_shapes(seen.shape, (1, 1, len(rows[chosen]), TILE, TILE)))
        some, every = (seen.transpose(0, 2).flatten(1).any(1).numpy(), seen.transpose(0, 2).flatten(1).all(1).numpy())
        verdicts[chosen] = np.where(every, FULL, np.where(some, PARTIAL, EMPTY))
    return verdicts, len(rows) - affordable


def _tile_positions(axis: Axis, tiles: np.ndarray) -> Tensor:
    """Positions [tiles, TILE]; a short tile repeats its last token, which changes no verdict."""
    offsets = axis.starts[tiles][:, None] + np.arange(TILE)
    return torch.from_numpy(axis.positions[np.minimum(offsets, axis.starts[tiles + 1][:, None] - 1)])


def _rows_of_squares(
    rows: np.ndarray, cols: np.ndarray, sides: np.ndarray, rows_axis: Axis, cols_axis: Axis
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row, first column, end column) of each row of each square, cut off at the last tile."""
    square = np.repeat(np.arange(len(rows)), sides)
    row = rows[square] + np.arange(len(square)) - np.repeat(np.cumsum(sides) - sides, sides)
    exists = row < rows_axis.num_tiles
    row, square = row[exists], square[exists]
    return row, cols[square], np.minimum(cols[square] + sides[square], cols_axis.num_tiles)


def _runs(rows: np.ndarray, firsts: np.ndarray, sides: np.ndarray, rows_axis: Axis, cols_axis: Axis) -> Runs:
    """Squares (row, column, side) -> runs per row, neighbours joined."""
    row, first, end = _rows_of_squares(rows, firsts, sides, rows_axis, cols_axis)
    order = np.lexsort((first, row))
    row, first, end = row[order], first[order], end[order]
    begins = np.ones(len(row), dtype=bool)
    begins[1:] = (row[1:] != row[:-1]) | (first[1:] != end[:-1])
    last = np.append(np.flatnonzero(begins)[1:], len(row)) - 1 if len(row) else np.zeros(0, dtype=np.int64)
    offsets = np.zeros(rows_axis.num_tiles + 1, dtype=np.int64)
    np.cumsum(np.bincount(row[begins], minlength=rows_axis.num_tiles), out=offsets[1:])
    return Runs(*(torch.from_numpy(x.astype(np.int32)) for x in (offsets, first[begins], end[last] - first[begins])))
