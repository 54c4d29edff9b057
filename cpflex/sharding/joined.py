"""Joined: the keys of a sequence that came in chunks: each rank holds its shard of one chunk after that of another.

chunk 0 on two ranks    0000 11..       two pads
chunk 1                 0011 11..       two more
joined, rank 0          0000 0011       in the order in which `torch.cat` puts a cache and what is new
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from cpflex.sharding.layout import Layout, cut_shards


@dataclass(frozen=True)
class Joined:
    """Shards of several layouts on the same ranks, rising in position, one after the other on each rank; then those of
    ``together`` ranks next to each other are one. Read as a `Layout` whose chunks have lengths of their own.

    Pads of all parts are numbered from ``end`` on. Positions between two parts belong to no key.
    """

    parts: tuple[Layout, ...]
    together: int = 1

    def __post_init__(self) -> None:
        sizes = {part.world_size for part in self.parts}
        if len(sizes) != 1 or min(sizes) % self.together:
            raise ValueError(f"parts must be shared by the same ranks, {self.together} together; got {sorted(sizes)}")
        if any(a.end > b.start for a, b in pairwise(self.parts)):
            raise ValueError(f"parts must rise in position; got {[(part.start, part.end) for part in self.parts]}")

    @property
    def name(self) -> str:
        return f"in {len(self.parts)} parts"

    @property
    def seq_len(self) -> int:
        """Keys, pads left out."""
        return sum(part.seq_len for part in self.parts)

    @property
    def start(self) -> int:
        return self.parts[0].start

    @property
    def end(self) -> int:
        return self.parts[-1].end

    @property
    def padded_end(self) -> int:
        """Position after the last pad."""
        *earlier, last = self.parts
        return last.padded_end + sum(part.padded_end - part.end for part in earlier)

    @property
    def world_size(self) -> int:
        return self.parts[0].world_size // self.together

    @property
    def local_len(self) -> int:
        return sum(part.local_len for part in self.parts) * self.together

    @cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        """(first position of each piece of each shard, in local order, int64 [world_size, pieces]; their lengths, int64
        [pieces]). Shards are cut at the same places; a piece is all tokens, or all pads, but in the last part.
        """
        *earlier, last = self.parts
        pads = last.padded_end
        firsts, lengths = [], []
        for part in earlier:
            first, length = _pieces(part, part.end)
            is_pad = first >= part.end
            first[is_pad] += pads - part.end
            pads += int((is_pad * length).sum())
            firsts.append(first)
            lengths.append(length)
        first, length = _pieces(last, None)
        table = np.concatenate([*firsts, first], axis=1)
        return table.reshape(self.world_size, -1), np.tile(np.concatenate([*lengths, length]), self.together)

    @cached_property
    def _order(self) -> np.ndarray:
        """Pieces of all shards by position, as places in the flat table."""
        return np.argsort(self._table[0].reshape(-1))

    @cached_property
    def pieces(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(first position, length) of the chunks, by position."""
        first, length = self._table
        length = np.broadcast_to(length, first.shape)
        return tuple(first.reshape(-1)[self._order].tolist()), tuple(length.reshape(-1)[self._order].tolist())

    @cached_property
    def chunks(self) -> tuple[tuple[int, ...], ...]:
        """Of each rank, in local order."""
        place = np.argsort(self._order).reshape(self._table[0].shape)
        return tuple(tuple(held.tolist()) for held in place)

    @cached_property
    def owner(self) -> np.ndarray:
        """Rank that holds each chunk, int64 [chunks]."""
        return self._order // len(self._table[1])

    def positions(self, rank: int) -> np.ndarray:
        """Global position of each local key, int64 [local_len]."""
        first, length = self._table
        begin = np.cumsum(length) - length
        return np.repeat(first[rank] - begin, length) + np.arange(self.local_len)

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Positions where keys are, (start, stop), rising, those that touch joined."""
        spans: list[tuple[int, int]] = []
        for part in self.parts:
            start = spans.pop()[0] if spans and spans[-1][1] == part.start else part.start
            spans.append((start, part.end))
        return tuple(spans)

    @cached_property
    def key(self) -> str:
        return hashlib.sha256(f"{[part.key for part in self.parts]}|{self.together}".encode()).hexdigest()[:16]


Keys = Layout | Joined
"""Where keys are."""


def cut_keys(keys: Keys, pieces: int) -> Keys:
    """As `cut_shards`."""
    if isinstance(keys, Layout):
        return cut_shards(keys, pieces)
    if keys.together % pieces:
        raise ValueError(f"shards of {keys.together} ranks cannot be cut into {pieces} equal pieces")
    return replace(keys, together=keys.together // pieces)


def _pieces(part: Layout, end: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(first position of each piece, [world_size, pieces], length of each, [pieces]): chunks, cut where tokens end."""
    starts = np.arange(0, part.local_len, part.chunk_len)
    first = np.array(part.chunks, dtype=np.int64) * part.chunk_len + part.start
    if end is not None:
        (rank, slot) = np.nonzero((first < end) & (end < first + part.chunk_len))
        if len(slot):
            inside = end - int(first[rank[0], slot[0]])
            at = int(slot[0]) + 1
            first = np.insert(first, at, first[:, at - 1] + inside, axis=1)
            starts = np.insert(starts, at, starts[at - 1] + inside)
    return first, np.diff(np.append(starts, part.local_len))
