"""DocumentWork: what a layout may ask about causal documents, by arithmetic instead of by looking at a mask's tiles.

The same numbers as of `KindWork` of the same mask, in a fraction of the time: `pack` compares many orders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from cpflex.planning.needs import blocks_of
from cpflex.sharding.layout import ChunkNeeds
from cpflex.tile_mask import TILE, Tiles
from cpflex.topology import Machine


@dataclass(frozen=True)
class DocumentWork:
    """Of documents one after the other; queries see their own, up to themselves, and no more than a window of it."""

    lengths: Sequence[int] | np.ndarray
    window: int | None = None
    machine: Machine | None = None
    _known: dict[tuple[int, int], dict[str, ChunkNeeds]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def weights(self) -> Mapping[str, float]:
        return {"documents": 1.0}

    def __call__(self, chunk_len: int, num_chunks: int) -> dict[str, ChunkNeeds]:
        if (chunk_len, num_chunks) not in self._known:
            self._known[chunk_len, num_chunks] = {"documents": self._needs(Tiles(chunk_len, num_chunks))}
        return self._known[chunk_len, num_chunks]

    def _needs(self, tiles: Tiles) -> ChunkNeeds:
        """The queries of a tile see all keys from the first that its first query sees up to its last query."""
        bounds = np.concatenate([[0], np.cumsum(self.lengths)])
        is_real = tiles.lo < bounds[-1]
        at = np.minimum(tiles.lo, bounds[-1] - 1)
        first = bounds[np.searchsorted(bounds, at, side="right") - 1]
        if self.window is not None:
            first = np.maximum(first, at - self.window + 1)
        within, chunk = first % tiles.chunk_len, first // tiles.chunk_len
        keys = tiles.hi + 1 - tiles.lo[chunk * tiles.per_chunk + within // TILE]
        work = np.where(is_real, tiles.length * keys, 0).reshape(tiles.num_chunks, -1).sum(axis=1)
        blocks = blocks_of(tiles.chunk_len, tiles.num_chunks)
        begin = (chunk * blocks.per_chunk + within // blocks.tile_len).reshape(tiles.num_chunks, -1)[:, 0]
        last = np.searchsorted(blocks.lo, tiles.lo, side="right") - 1
        last = np.where(is_real, last, -1).reshape(tiles.num_chunks, -1).max(axis=1)
        block = np.arange(blocks.num_tiles)
        sees = (block >= begin[:, None]) & (block <= last[:, None])
        return ChunkNeeds(work, sees, blocks.chunk, blocks.length)
