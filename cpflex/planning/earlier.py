"""Keys of earlier chunks: what is known of them when the next chunk's tokens are dealt out."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from cpflex.planning.needs import blocks_of, chunk_needs, tiles_of
from cpflex.planning.squares import Classify, Squares, classify_squares
from cpflex.sharding.joined import Joined
from cpflex.sharding.layout import ChunkNeeds, Layout
from cpflex.tile_mask import PieceTiles, Tiles


class Earlier(NamedTuple):
    """Keys of earlier chunks, without pads, as a layout function sees them."""

    starts: tuple[int, ...]  # position of the first token of each piece, rising
    lengths: tuple[int, ...]
    owner: np.ndarray  # shard that holds each piece, int64 [pieces]

    @classmethod
    def of(cls, layouts: tuple[Layout, ...], shards: int) -> Earlier:
        """``shards`` of the layouts' are one."""
        joined = Joined(layouts)
        starts, lengths = joined.pieces
        real = [
            (start, min(length, joined.end - start), rank // shards)
            for start, length, rank in zip(starts, lengths, joined.owner.tolist(), strict=True)
            if start < joined.end
        ]
        starts, lengths, owner = zip(*real, strict=True)
        return cls(starts, lengths, np.array(owner))

    def before(self, tiles: Tiles) -> PieceTiles:
        """These, then the chunks of the queries."""
        own = range(tiles.start, tiles.start + tiles.num_chunks * tiles.chunk_len, tiles.chunk_len)
        return PieceTiles((*self.starts, *own), (*self.lengths, *(tiles.chunk_len for _ in own)))

    def needs(self, squares: Squares, tiles: Tiles) -> ChunkNeeds:
        """What the queries see of these and of themselves."""
        block_len = blocks_of(tiles.chunk_len, tiles.num_chunks).tile_len
        needs = chunk_needs(squares, tiles, self.before(tiles), block_len)
        owner = np.append(self.owner, np.full(tiles.num_chunks, -1))[needs.block_chunk]
        return replace(needs, block_chunk=np.maximum(needs.block_chunk - len(self.starts), 0), block_owner=owner)


def refuse_missing(kind: str, classify: Classify, queries: Layout, keys: Joined) -> None:
    """
    Raises:
        ValueError: queries see keys before the last that are not among these.
    """
    ends = [0, *(end for span in keys.spans for end in span)]
    missing = [(begin, stop) for begin, stop in zip(ends[::2], ends[1::2], strict=False) if begin < stop]
    for begin, stop in missing:
        squares = classify_squares(classify, tiles_of(queries), keys=PieceTiles((begin,), (stop - begin,)))
        if len(squares.full[0]) or len(squares.partial[0]):
            raise ValueError(
                f"mask kind {kind!r}: of the queries at {queries.start} to {queries.end - 1} some may see keys at "
                f"{begin} to {stop - 1}, which are in none of the plans given to cpflex.cached; give it the plans of "
                "all chunks that the mask reaches"
            )
