"""Squares: the tiles of a mask that are not EMPTY, found coarse to fine. The cost follows the boundary of the mask, not
its area.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cpflex.mods.intervals import FULL, PARTIAL
from cpflex.tile_mask import Axis

Classify = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""(q_lo, q_hi, kv_lo, kv_hi), positions, inclusive -> verdicts EMPTY / PARTIAL / FULL."""


@dataclass(frozen=True)
class Squares:
    """The tiles that are not EMPTY: FULL ones as squares of tiles, (first row, first column, side); PARTIAL ones
    singly.
    """

    full: tuple[np.ndarray, np.ndarray, np.ndarray]
    partial: tuple[np.ndarray, np.ndarray]

    @property
    def all(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(first row, first column, side) of each square, FULL and PARTIAL; squares overhang the last tile."""
        (rows, cols, sides), (partial_rows, partial_cols) = self.full, self.partial
        sides = np.append(sides, np.ones_like(partial_rows))
        return np.append(rows, partial_rows), np.append(cols, partial_cols), sides

    def rows(self, tiles: Axis, keys: Axis) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(row, first column, end column) of each row of each square, PARTIAL and FULL, cut off at the last tiles."""
        rows, cols, sides = self.all
        square, nth = repeat(sides)
        row = rows[square] + nth
        exists = row < tiles.num_tiles
        row, square = row[exists], square[exists]
        return row, cols[square], np.minimum(cols[square] + sides[square], keys.num_tiles)


def classify_squares(
    classify: Classify,
    tiles: Axis,
    rows: np.ndarray | None = None,
    cols: np.ndarray | None = None,
    most: int | None = None,
    *,
    keys: Axis | None = None,
) -> Squares:
    """Coarse to fine: a square that is all EMPTY or all FULL is settled, any other is cut in four.

    Args:
        tiles: of the queries, and of the keys too unless ``keys`` are given.
        rows, cols: bool [num_tiles]; squares without a wanted row and a wanted column are left out.
        most: PARTIAL squares are cut no further where they would be more than this; they then count among the FULL.
    """
    axes = (tiles, tiles if keys is None else keys)
    side = 1 << (max(axis.num_tiles for axis in axes) - 1).bit_length()
    q_lo, kv_lo = (_pyramid(axis.lo, np.minimum, side) for axis in axes)
    q_hi, kv_hi = (_pyramid(axis.hi, np.maximum, side) for axis in axes)
    wanted = [_pyramid(x, np.logical_or, side) if x is not None else None for x in (rows, cols)]
    row = col = np.zeros(1, dtype=np.int64)
    full: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    while True:
        verdict = classify(q_lo[side][row], q_hi[side][row], kv_lo[side][col], kv_hi[side][col])
        is_full = verdict == FULL
        full.append((row[is_full] * side, col[is_full] * side, np.full(is_full.sum(), side)))
        row, col = row[verdict == PARTIAL], col[verdict == PARTIAL]
        if most is not None and side > 1 and 4 * len(row) > most:
            full.append((row * side, col * side, np.full(len(row), side)))
            row, col, side = row[:0], col[:0], 1
        if side == 1:
            return Squares(tuple(np.concatenate(parts) for parts in zip(*full, strict=True)), (row, col))  # type: ignore[arg-type]
        side //= 2
        row = (row[:, None] * 2 + np.array([0, 0, 1, 1])).reshape(-1)
        col = (col[:, None] * 2 + np.array([0, 1, 0, 1])).reshape(-1)
        keep = (row < len(q_lo[side])) & (col < len(kv_lo[side]))
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


def repeat(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each index as often as its count says, and a number counting its repetitions."""
    index = np.repeat(np.arange(len(counts)), counts)
    return index, np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)
