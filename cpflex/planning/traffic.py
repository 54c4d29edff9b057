"""Traffic: what every rank computes with, needs and is needed for under a layout, as tables that predictions are made
from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from cpflex.planning.squares import Classify, Squares, classify_squares
from cpflex.sharding.joined import Keys
from cpflex.sharding.layout import Layout
from cpflex.tile_mask import Axis, Tiles

RANKS_AT_ONCE = 64
"""Ranks whose rows are counted together, for the sake of memory."""


@dataclass(frozen=True)
class Traffic:
    """One mask kind under one layout, counted in blocks of keys, sorted by the rank that holds them."""

    local_len: int  # queries of a rank
    shard_len: int  # K/V rows of a rank
    owner: np.ndarray  # rank that holds each block, rising, int64 [blocks]
    length: np.ndarray  # tokens of each block, int64 [blocks]
    sees: np.ndarray  # rank r's queries see a key of the block, bool [world_size (r), blocks]
    pairs: np.ndarray  # (query, key) pairs of rank r's queries and o's keys, int64 [world_size (r), world_size (o)]
    touched: np.ndarray  # queries of rank r that see a key of o, int64 [world_size (r), world_size (o)]
    ways: dict[tuple[int, bool], Any] = field(default_factory=dict, repr=False, compare=False)
    """What `relays` looks up at each prediction of two levels."""

    @property
    def world_size(self) -> int:
        return len(self.pairs)

    @cached_property
    def first_block(self) -> np.ndarray:
        """Of each rank, int64 [world_size]."""
        return np.searchsorted(self.owner, np.arange(self.world_size))

    def by_owner(self, chosen: np.ndarray) -> np.ndarray:
        """Rows of each owner's chosen blocks: bool [lines, blocks] -> int64 [lines, world_size (o)]."""
        return np.add.reduceat(np.where(chosen, self.length, 0), self.first_block, axis=1)

    @cached_property
    def rows(self) -> np.ndarray:
        """K/V rows of rank o's shard that rank r needs, int64 [world_size (r), world_size (o)]; none of its own."""
        needed = self.by_owner(self.sees)
        np.fill_diagonal(needed, 0)
        return needed

    @cached_property
    def by_distance(self) -> tuple[np.ndarray, np.ndarray]:
        """``pairs`` and ``touched`` of every rank and the one so far before it, int64 [world_size (distance),
        world_size (r)] each.
        """
        ranks = np.arange(self.world_size)
        owner = (ranks - ranks[:, None]) % self.world_size
        return self.pairs[ranks, owner], self.touched[ranks, owner]

    def seen_by_nodes(self, gpus_per_node: int) -> np.ndarray:
        """Blocks that some rank of a node needs, and that lie on another node: bool [nodes, blocks]."""
        starts = np.arange(0, self.world_size, gpus_per_node)
        sees = np.stack([self.sees[start : start + gpus_per_node].any(axis=0) for start in starts])
        sees[self.owner // gpus_per_node, np.arange(len(self.owner))] = False
        return sees

    @property
    def imbalance(self) -> float:
        """Most work over mean work."""
        work = self.pairs.sum(axis=1)
        return float(work.max() / max(work.mean(), 1e-9))


def traffic_of(
    classify: Classify, layout: Layout, tiles: Tiles, keys: Keys | None = None, key_tiles: Axis | None = None
) -> Traffic:
    """Counted in ``tiles`` that are not EMPTY: those of the kernels, or larger blocks, which are never too few.

    Args:
        keys, key_tiles: where keys are and how they are cut, if they are not the queries' tokens.

    >>> traffic_of(classifier(mod, 1, 1), layout, Tiles(layout.chunk_len, layout.num_chunks))
    """
    queries = _Held.of(layout, tiles)
    held = queries if keys is None or key_tiles is None else _Held.of(keys, key_tiles)
    squares = classify_squares(classify, tiles, keys=held.tiles)
    rows, cols, sides = squares.full
    flipped = Squares((cols, rows, sides), (squares.partial[1], squares.partial[0]))
    seen, pairs = _counted(squares, queries, held)
    _, touched = _counted(flipped, held, queries, once=True)
    shard_len = layout.local_len if keys is None else keys.local_len
    return Traffic(
        layout.local_len, shard_len, held.owner[held.order], held.tiles.length[held.order],
        seen.take(held.order, axis=1), pairs, touched.T.copy(),
    )  # fmt: skip


class _Held(NamedTuple):
    """Tiles of an axis, and the ranks that hold them."""

    tiles: Axis
    owner: np.ndarray  # of each tile, int64 [tiles]
    order: np.ndarray  # of the tiles by owner, int64 [tiles]
    runs: np.ndarray  # first tile of each run of tiles of one owner, int64 [runs]
    world_size: int

    @classmethod
    def of(cls, layout: Keys, tiles: Axis) -> _Held:
        owner = layout.owner[tiles.chunk]
        runs = np.append(0, np.flatnonzero(np.diff(owner)) + 1)
        return cls(tiles, owner, np.argsort(owner, kind="stable"), runs, layout.world_size)

    def by_owner(self, values: np.ndarray) -> np.ndarray:
        """Sums over the tiles of each rank: [lines, tiles] -> int64 [lines, world_size]."""
        of_runs, owner = np.add.reduceat(values, self.runs, axis=1), self.owner[self.runs]
        order = np.argsort(owner, kind="stable")
        starts = np.searchsorted(owner[order], np.arange(self.world_size))
        return np.add.reduceat(of_runs.take(order, axis=1), starts, axis=1)


def _counted(squares: Squares, lines: _Held, held: _Held, *, once: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Columns of the squares' rows, by the rank that holds the row: those that are covered, bool [ranks, tiles], and
    their tokens times the rows' tokens, or the tokens ``once``, int64 [ranks, ranks].
    """
    row, first, end = squares.rows(lines.tiles, held.tiles)
    line, weight, width = lines.owner[row], lines.tiles.length[row], held.tiles.num_tiles
    seen, totals = [], []
    for begin in range(0, lines.world_size, RANKS_AT_ONCE):
        ranks = min(RANKS_AT_ONCE, lines.world_size - begin)
        here = slice(None) if ranks == lines.world_size else (line >= begin) & (line < begin + ranks)
        at = (line[here] - begin) * (width + 1)
        # each row of a square adds its tokens from its first column on, and takes them away after its last
        step = np.bincount(at + first[here], weight[here], ranks * (width + 1))
        step -= np.bincount(at + end[here], weight[here], ranks * (width + 1))
        covering = step.astype(np.int64).cumsum().reshape(ranks, -1)[:, :-1]  # a line ends with 0, as the next begins
        is_seen = covering > 0
        totals.append(held.by_owner((is_seen if once else covering) * held.tiles.length))
        seen.append(is_seen)
    return np.concatenate(seen), np.concatenate(totals)
