"""TileMask: what one (local queries, visiting keys) pair has to compute, as runs of tiles.

A tile is at most `TILE` consecutive tokens of one chunk, on either axis. Tiles where the mask is false everywhere are
not listed; FULL ones skip the mask; PARTIAL ones evaluate it at the tokens' positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

TILE = 128
"""Tokens on a side of a tile."""

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Tiles:
    """The whole padded sequence cut into tiles, none of which straddles two chunks. Both axes of the mask are cut
    alike.
    """

    chunk_len: int
    num_chunks: int
    tile_len: int = TILE
    start: int = 0
    """Position of the first token."""

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
        return tile // self.per_chunk * self.chunk_len + tile % self.per_chunk * self.tile_len + self.start

    @cached_property
    def hi(self) -> np.ndarray:
        """Last position of each tile, int64."""
        return np.append(self.lo[1:], self.start + self.num_chunks * self.chunk_len) - 1

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

    def in_blocks(self, block_len: int) -> tuple[Tiles, np.ndarray]:
        """(the same chunks in longer tiles, which of these each tile is in)."""
        blocks = replace(self, tile_len=block_len)
        within = np.arange(self.num_tiles) % self.per_chunk * self.tile_len // block_len
        return blocks, self.chunk * blocks.per_chunk + within


@dataclass(frozen=True)
class PieceTiles:
    """Chunks of several lengths, anywhere, cut into tiles as `Tiles` are."""

    starts: tuple[int, ...]  # position of the first token of each chunk, rising
    lengths: tuple[int, ...]
    tile_len: int = TILE

    @cached_property
    def _counts(self) -> np.ndarray:
        """Tiles of each chunk, int64."""
        return -(-np.array(self.lengths, dtype=np.int64) // self.tile_len)

    @cached_property
    def _first(self) -> np.ndarray:
        """First tile of each chunk, int64."""
        return np.cumsum(self._counts) - self._counts

    @property
    def num_tiles(self) -> int:
        return int(self._counts.sum())

    @cached_property
    def chunk(self) -> np.ndarray:
        """Chunk of each tile, int64."""
        return np.repeat(np.arange(len(self.starts)), self._counts)

    @cached_property
    def _within(self) -> np.ndarray:
        """Tokens of its chunk before each tile, int64."""
        return (np.arange(self.num_tiles) - self._first[self.chunk]) * self.tile_len

    @cached_property
    def lo(self) -> np.ndarray:
        """First position of each tile, int64."""
        return np.array(self.starts, dtype=np.int64)[self.chunk] + self._within

    @cached_property
    def hi(self) -> np.ndarray:
        """Last position of each tile, int64."""
        return self.lo + self.length - 1

    @cached_property
    def length(self) -> np.ndarray:
        """Tokens of each tile, int64."""
        return np.minimum(np.array(self.lengths, dtype=np.int64)[self.chunk] - self._within, self.tile_len)

    def of_chunks(self, chunks: Iterable[int]) -> np.ndarray:
        """Tiles of the chunks, in the order given."""
        return np.concatenate([self._first[c] + np.arange(self._counts[c]) for c in chunks])

    def in_blocks(self, block_len: int) -> tuple[PieceTiles, np.ndarray]:
        """(the same chunks in longer tiles, which of these each tile is in)."""
        blocks = replace(self, tile_len=block_len)
        return blocks, blocks._first[self.chunk] + self._within // block_len


Axis = Tiles | PieceTiles
"""How queries, or keys, are cut."""


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
    siblings: Siblings | None = None
    """Of a tile mask on a device; not stored with a plan, as the next."""
    index: int = 0
    """Its place among them."""

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
        stored = (one.name for one in fields(self) if one.name not in ("siblings", "index"))
        return {name: getattr(self, name) for name in stored}


@dataclass(frozen=True, eq=False)
class Siblings:
    """The tile masks of all steps of a plan, and what was made of them on one device."""

    masks: tuple[TileMask, ...]
    """As they were planned, on the CPU."""
    works: dict[Any, Sequence[Any]] = field(default_factory=dict)
    """Which program of a kernel computes what, by how the kernel cuts its work, for each step."""
    arenas: list[Any] = field(default_factory=list)
    """The device memory of all that."""


class Idle(NamedTuple):
    """A rank's tokens that take no part, bool [1 or B, 1 or Hq, S_local]; [0] where there are none."""

    keys: Tensor
    """No query of any rank sees them."""
    queries: Tensor
    """They see no key of any rank."""


def _positions(first: Tensor, starts: Tensor) -> Tensor:
    offset = torch.arange(int(starts[-1]), dtype=torch.int32)
    return offset + torch.repeat_interleave(first - starts[:-1], starts.diff())
