"""Needs: which keys each rank's queries see, found tile by tile, from the traced mask and a layout.

Both ends of a transfer must agree on it without talking. They do because every rank classifies the same global tiles
along the same path of squares: a rank looks at its own rows (what it receives) and its own columns (what it sends), and
a tile has one verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, overload

import numpy as np

from cpflex.mods.graph import Mod
from cpflex.mods.intervals import TileClassifier
from cpflex.planning.squares import Classify, Squares, classify_squares, repeat
from cpflex.planning.traffic import Traffic, traffic_of
from cpflex.ring.schedule import Rows, rows_of
from cpflex.sharding.joined import Joined, Keys
from cpflex.sharding.layout import ChunkNeeds, Layout
from cpflex.tile_mask import TILE, Axis, PieceTiles, Tiles
from cpflex.topology import Machine

if TYPE_CHECKING:
    from cpflex.planning.choose import Choice

MAX_BLOCKS = 4096
"""Blocks of the whole sequence in which foreign keys are counted, unless there are more chunks."""

MAX_SQUARES = 1 << 22
"""PARTIAL squares of the whole mask in which work is counted: tiles, unless the mask has so many on its boundary."""

SLAB_CELLS = 1 << 20
"""Cells of a table that are filled at once."""


def classifier(mod: Mod, batch_size: int, num_heads: int) -> Classify:
    """Verdicts that hold for every batch and head index."""
    classify = TileClassifier(mod)
    b, h = (0, batch_size - 1), (0, num_heads - 1)
    return lambda q_lo, q_hi, kv_lo, kv_hi: classify(q_lo, q_hi, kv_lo, kv_hi, b=b, h=h)


def blocks_of(chunk_len: int, num_chunks: int, start: int = 0) -> Tiles:
    """The sequence in tiles, or in larger blocks where there would be too many."""
    block_len = TILE
    while block_len < chunk_len and num_chunks * -(-chunk_len // block_len) > MAX_BLOCKS:
        block_len *= 2
    return Tiles(chunk_len, num_chunks, block_len, start)


@overload
def tiles_of(layout: Layout) -> Tiles: ...


@overload
def tiles_of(layout: Keys) -> Axis: ...


def tiles_of(layout: Keys) -> Axis:
    """The padded sequence of a layout."""
    if isinstance(layout, Joined):
        return PieceTiles(*layout.pieces)
    return Tiles(layout.chunk_len, layout.num_chunks, start=layout.start)


def traffic_by_block(classify: Classify, layout: Layout, keys: Keys | None = None) -> Traffic:
    """What all ranks compute and need; ``keys``: theirs, if they are not the queries' tokens."""
    blocks = blocks_of(layout.chunk_len, layout.num_chunks, layout.start)
    if keys is None:
        return traffic_of(classify, layout, blocks)
    key_tiles = tiles_of(keys)
    return traffic_of(classify, layout, blocks, keys, key_tiles.in_blocks(block_len_of(key_tiles))[0])


def whole_mask(classify: Classify, tiles: Tiles, keys: Axis | None = None) -> Squares:
    """The tiles of the whole mask that are not EMPTY; coarser squares where its boundary is too long for tiles."""
    return classify_squares(classify, tiles, most=MAX_SQUARES, keys=keys)


def chunk_needs(squares: Squares, tiles: Tiles, keys: Axis | None = None, block_len: int | None = None) -> ChunkNeeds:
    """What the queries of each chunk compute, by tile, and see, by block: never too little.

    Args:
        squares: of the whole mask, in these tiles or in those of other chunks that are cut at the same positions.
        keys: their tiles, if they are not those of the queries.
        block_len: tokens of a block, if not as many as keep blocks few.
    """
    keys = tiles if keys is None else keys
    row, col, side = squares.all
    exists = (row < tiles.num_tiles) & (col < keys.num_tiles)
    row, col, side = row[exists], col[exists], side[exists]
    row_end, col_end = np.minimum(row + side, tiles.num_tiles), np.minimum(col + side, keys.num_tiles)
    start = np.append(0, np.cumsum(keys.length))
    seen = start[col_end] - start[col]
    # float64 is exact: a row has fewer than 2**31 keys, and there are fewer than 2**22 rows
    change = np.bincount(row, seen, tiles.num_tiles + 1) - np.bincount(row_end, seen, tiles.num_tiles + 1)
    pairs = tiles.length * np.cumsum(change[:-1]).astype(np.int64)
    work = pairs.reshape(tiles.num_chunks, -1).sum(axis=1)
    blocks, block = keys.in_blocks(block_len_of(keys) if block_len is None else block_len)
    sees = _rectangles(
        (tiles.chunk[row], tiles.chunk[row_end - 1] + 1, block[col], block[col_end - 1] + 1),
        (tiles.num_chunks, blocks.num_tiles),
    )
    return ChunkNeeds(work, sees, blocks.chunk, blocks.length)


def block_len_of(keys: Axis) -> int:
    """Tokens of a block, so that there are not too many."""
    if isinstance(keys, Tiles):
        return blocks_of(keys.chunk_len, keys.num_chunks).tile_len
    block_len = TILE
    while block_len < max(keys.lengths) and keys.in_blocks(block_len)[0].num_tiles > MAX_BLOCKS:
        block_len *= 2
    return block_len


def _rectangles(bounds: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """bool ``shape``: cells in any of the rectangles (first line, end line, first column, end column)."""
    line, line_end, first, end = bounds
    seen = np.zeros(shape, dtype=bool)
    single = (line_end - line == 1) & (end - first == 1)
    seen[line[single], first[single]] = True
    rectangle, nth = repeat((line_end - line)[~single])
    line, first, end = line[~single][rectangle] + nth, first[~single][rectangle], end[~single][rectangle]
    order = np.argsort(line, kind="stable")
    line, first, end = line[order], first[order], end[order]
    height = max(1, SLAB_CELLS // (shape[1] + 1))
    for top in range(0, shape[0], height):
        slab = slice(*np.searchsorted(line, [top, top + height]))
        at, size = (line[slab] - top) * (shape[1] + 1), height * (shape[1] + 1)
        opened = np.bincount(at + first[slab], minlength=size) - np.bincount(at + end[slab], minlength=size)
        covered = np.cumsum(opened).reshape(height, -1)[:, :-1] > 0
        seen[top : top + height] |= covered[: shape[0] - top]
    return seen


def _covered(squares: Squares, cols: range, line_of_row: np.ndarray, num_lines: int) -> np.ndarray:
    """bool [num_lines, len(cols)]: columns of the squares' rows, by the line that a row belongs to (-1: to none)."""
    widest = max(1 << (len(line_of_row) - 1).bit_length(), int(squares.full[2].max(initial=1)))
    line_of_row = np.append(line_of_row, np.full(widest - len(line_of_row), -1))  # squares overhang the last tile
    full_rows, full_cols, sides = squares.full
    levels = [(side, full_rows[sides == side], full_cols[sides == side]) for side in np.unique(sides).tolist()]
    levels.append((1, *squares.partial))
    # in windows that squares either lie in or cover
    width = 1 << (len(cols) - 1).bit_length()
    starts = range(cols.start // width * width, cols.stop, width)
    windows = [_covered_window(levels, start, width, line_of_row, num_lines) for start in starts]
    return np.concatenate(windows, axis=1)[:, cols.start - starts[0] : cols.stop - starts[0]]


def _covered_window(
    levels: list[tuple[int, np.ndarray, np.ndarray]], start: int, width: int, line_of_row: np.ndarray, num_lines: int
) -> np.ndarray:
    covered = np.zeros((num_lines, width), dtype=bool)
    for side, rows, cols in levels:
        cell_width = min(side, width)
        cell = (cols - start // side * side) // side if side > width else (cols - start) // side
        inside = (cell >= 0) & (cell < width // cell_width)
        line = line_of_row[rows[inside, None] + np.arange(side)]
        held = line >= 0
        cells = np.zeros((num_lines, width // cell_width), dtype=bool)
        cells[line[held], np.broadcast_to(cell[inside, None], line.shape)[held]] = True
        covered.reshape(num_lines, -1, cell_width)[cells] = True
    return covered


class Needs:
    """Needs of all ranks under a layout, for one mask kind, as one rank sees them.

    Args:
        layout: of the queries.
        keys: the layout of the keys; that of the queries if None. One shard if every rank holds all of them.
    """

    def __init__(
        self,
        classify: Classify,
        layout: Layout,
        rank: int,
        chunks: ChunkNeeds,
        machine: Machine | None = None,
        keys: Keys | None = None,
    ) -> None:
        self.machine = machine
        self.layout = layout
        self.keys = layout if keys is None else keys
        self.rank = rank
        self.tiles = tiles_of(layout)
        self.key_tiles = tiles_of(self.keys)
        self.choice: Choice | None = None
        self._classify = classify
        self._chunks = chunks

    @cached_property
    def tokens(self) -> np.ndarray:
        """K/V rows of rank o's shard that rank r needs, by block: never too few. int64 [world_size (r), world_size
        (o)].
        """
        return self.tokens_of(np.arange(self.layout.world_size))

    def tokens_of(self, line: np.ndarray) -> np.ndarray:
        """As `tokens`, of lines of ranks: the line of each rank, -1 for none; int64 [lines, world_size (o)]."""
        owner = self.keys.owner[self._chunks.block_chunk]
        sees = self._sees(line)
        return np.stack([np.bincount(owner[row], self._chunks.block_len[row], len(line)) for row in sees]).astype(
            np.int64
        )

    def _sees(self, line: np.ndarray) -> np.ndarray:
        """Blocks of which queries of any rank of a line see a key, bool [lines, num_blocks]."""
        line_of_chunk = line[self.layout.owner]
        return np.stack([self._chunks.sees[line_of_chunk == one].any(axis=0) for one in range(int(line.max()) + 1)])

    @cached_property
    def traffic(self) -> Traffic:
        """What all ranks compute and need, by block."""
        return traffic_by_block(self._classify, self.layout, None if self.keys is self.layout else self.keys)

    @cached_property
    def squares(self) -> Squares:
        """The tiles that the rank computes."""
        return classify_squares(self._classify, self.tiles, rows=self._owner_of_tile == self.rank, keys=self.key_tiles)

    @cached_property
    def received(self) -> np.ndarray:
        """The rank's queries see a key of the tile, for each tile of each shard; bool [world_size (owner), T]."""
        line = np.where(self._owner_of_tile == self.rank, 0, -1)
        return _covered(self.squares, range(self.key_tiles.num_tiles), line, 1)[0][self._tile_of]

    @cached_property
    def sent(self) -> np.ndarray:
        """Queries of rank r see a key of the tile, for the tiles that this rank holds; bool [world_size (r), T]."""
        is_held = self.keys.owner[self.key_tiles.chunk] == self.rank
        squares = classify_squares(self._classify, self.tiles, cols=is_held, keys=self.key_tiles)
        world_size = self.layout.world_size
        chunks = [range(held[0], held[-1] + 1) for held in map(self._tiles_in, self.keys.chunks[self.rank])]
        return np.concatenate([_covered(squares, cols, self._owner_of_tile, world_size) for cols in chunks], axis=1)

    def seen(self, line: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Queries of any rank of a line see a key of the tile; bool [lines, world_size (owner), T].

        Args:
            line: of each rank, -1 for none; int64 [world_size].
            columns: tiles to be looked at, bool [world_size (owner), T]; others come out False.
        """
        line_of_tile = line[self._owner_of_tile]
        wanted = np.zeros(self.key_tiles.num_tiles, dtype=bool)
        wanted[self._tile_of[columns]] = True
        squares = classify_squares(self._classify, self.tiles, rows=line_of_tile >= 0, cols=wanted, keys=self.key_tiles)
        covered = _covered(squares, range(self.key_tiles.num_tiles), line_of_tile, int(line.max()) + 1)
        return (covered & wanted)[:, self._tile_of]

    def foreseen(self, line: np.ndarray, owners: Sequence[int]) -> np.ndarray:
        """As `seen`, of all tiles of some owners, by block: never too few, the same on every rank; bool [lines,
        owners, T].
        """
        begins, tokens = (np.cumsum(x) - x for x in (self._chunks.block_len, self.key_tiles.length))
        block_of = np.searchsorted(begins, tokens, side="right") - 1
        return self._sees(line)[:, block_of[self._tile_of[list(owners)]]]

    def rows_from(self, owner: int) -> Rows:
        """Rows of the owner's shard that this rank needs."""
        return rows_of(self.received[owner], self.tile_starts)

    def rows_to(self, peer: int) -> Rows:
        """Rows of this rank's shard that the peer needs."""
        return rows_of(self.sent[peer], self.tile_starts)

    @cached_property
    def tile_starts(self) -> np.ndarray:
        """Row at which each tile of a shard begins, and the end of the last; int64 [T + 1]."""
        return np.append(0, np.cumsum(self.key_tiles.length[self._tile_of[0]]))

    def tiles_of(self, owner: int, rows: Rows) -> np.ndarray:
        """Tiles of rows of a shard, in local order; rows begin and end at tiles."""
        tiles = self._tile_of[owner % len(self._tile_of)]  # of the one shard, if all hold it
        start = np.cumsum(self.key_tiles.length[tiles]) - self.key_tiles.length[tiles]
        return np.concatenate([tiles[(start >= begin) & (start < end)] for begin, end in rows] or [tiles[:0]])

    def _tiles_in(self, chunk: int) -> np.ndarray:
        return self.key_tiles.of_chunks([chunk])

    @cached_property
    def _tile_of(self) -> np.ndarray:
        """Each tile of each shard of keys, in local order, among those of the sequence; int64 [world_size, T]."""
        return np.stack([self.key_tiles.of_chunks(held) for held in self.keys.chunks])

    @cached_property
    def _owner_of_tile(self) -> np.ndarray:
        return self.layout.owner[self.tiles.chunk]
