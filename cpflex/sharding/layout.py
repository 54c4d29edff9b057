"""Layout: which tokens each rank holds, as a table of chunks. A layout function only fills the table."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from cpflex.topology import Machine

ALIGNMENT = 16
"""Chunk lengths are multiples of this many tokens, the granularity of tensor-core tiles."""

STRIPE = 128
"""Tokens of one stripe: a dense tile of the kernels."""


@dataclass(frozen=True)
class Layout:
    """``chunks[rank]``: ids of the chunks that the rank holds, rising; chunk c is positions [c, c + 1) * chunk_len,
    counted from ``start``.

    Every rank holds equally many chunks. Positions of ``end`` and above are pads.
    """

    seq_len: int
    chunk_len: int
    chunks: tuple[tuple[int, ...], ...]
    name: str
    start: int = 0
    """Position of the first token: tokens may be a piece of a longer sequence."""

    def __post_init__(self) -> None:
        ids = sorted(chunk for held in self.chunks for chunk in held)
        if ids != list(range(len(ids))) or len({len(held) for held in self.chunks}) != 1:
            raise ValueError("a layout gives every chunk to exactly one rank, and every rank equally many chunks")
        if any(list(held) != sorted(held) for held in self.chunks):
            raise ValueError("a rank holds its chunks in rising order")
        if self.chunk_len * len(ids) < self.seq_len:
            raise ValueError(f"{len(ids)} chunks of {self.chunk_len} tokens do not hold seq_len={self.seq_len}")

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + self.seq_len

    @property
    def padded_end(self) -> int:
        """Position after the last pad, or the last token where there are none."""
        return self.start + self.num_chunks * self.chunk_len

    @property
    def world_size(self) -> int:
        return len(self.chunks)

    @property
    def num_chunks(self) -> int:
        return self.world_size * len(self.chunks[0])

    @property
    def local_len(self) -> int:
        return len(self.chunks[0]) * self.chunk_len

    @cached_property
    def owner(self) -> np.ndarray:
        """Rank that holds each chunk, [num_chunks]."""
        owner = np.empty(self.num_chunks, dtype=np.int64)
        for rank, held in enumerate(self.chunks):
            owner[list(held)] = rank
        return owner

    def positions(self, rank: int) -> np.ndarray:
        """Global position of each local token, int64 [local_len]; pads are numbered from ``end`` on."""
        starts = np.asarray(self.chunks[rank], dtype=np.int64) * self.chunk_len + self.start
        return (starts[:, None] + np.arange(self.chunk_len)).reshape(-1)

    @cached_property
    def fragments(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Of each rank, its runs of consecutive positions, (start, stop), rising; pads are left out."""
        return tuple(self._runs(held) for held in self.chunks)

    def _runs(self, held: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
        runs: list[tuple[int, int]] = []
        for chunk in held:
            start, stop = chunk * self.chunk_len, min((chunk + 1) * self.chunk_len, self.seq_len)
            if start >= self.seq_len:
                break
            if runs and runs[-1][1] == start:
                start = runs.pop()[0]
            runs.append((start, stop))
        return tuple((start + self.start, stop + self.start) for start, stop in runs)

    @cached_property
    def key(self) -> str:
        start = f"|{self.start}" if self.start else ""
        return hashlib.sha256(f"{self.seq_len}|{self.chunk_len}|{self.chunks}{start}".encode()).hexdigest()[:16]


def cut_shards(layout: Layout, pieces: int) -> Layout:
    """Each shard in ``pieces`` equal ones, for ``pieces`` ranks next to each other: one after the other they are the
    shard, in its local order. Chunks become as small as that takes.

    Raises:
        ValueError: the local length is not a multiple of ``pieces``.
    """
    if pieces == 1:
        return layout
    piece_len, rest = divmod(layout.local_len, pieces)
    if rest:
        raise ValueError(f"a shard of {layout.local_len} tokens cannot be cut into {pieces} equal pieces")
    chunk_len = math.gcd(layout.chunk_len, piece_len)
    per_chunk, per_piece = layout.chunk_len // chunk_len, piece_len // chunk_len
    small = [[chunk * per_chunk + i for chunk in held for i in range(per_chunk)] for held in layout.chunks]
    chunks = (tuple(held[i * per_piece : (i + 1) * per_piece]) for held in small for i in range(pieces))
    return Layout(layout.seq_len, chunk_len, tuple(chunks), layout.name, layout.start)


@dataclass(frozen=True)
class ChunkNeeds:
    """What the queries of each chunk compute and see, for one mask kind."""

    work: np.ndarray  # (query, key) pairs in tiles that are not EMPTY, int64 [num_chunks]
    sees: np.ndarray  # bool [num_chunks, num_blocks]
    block_chunk: np.ndarray  # chunk of each block of keys, int64 [num_blocks]
    block_len: np.ndarray  # tokens of each block, int64 [num_blocks]
    block_owner: np.ndarray | None = None
    """Rank that holds each block, where keys have a layout of their own; -1 for keys that are dealt out with the
    queries, by chunk.
    """

    @property
    def dealt(self) -> ChunkNeeds:
        """With those blocks alone that are dealt out with the queries."""
        if self.block_owner is None:
            return self
        chosen = np.flatnonzero(self.block_owner < 0)
        sees = np.ascontiguousarray(self.sees[:, chosen])
        return ChunkNeeds(self.work, sees, self.block_chunk[chosen], self.block_len[chosen])

    def held_by(self, owner: np.ndarray, ranks_per_owner: int = 1) -> np.ndarray:
        """Who holds each block, given the owner of each chunk: a rank, or a group of so many; int64 [num_blocks]."""
        if self.block_owner is None:
            return owner[self.block_chunk]
        is_dealt = self.block_owner < 0
        by_chunk = owner[np.where(is_dealt, self.block_chunk, 0)]
        return np.where(is_dealt, by_chunk, self.block_owner // ranks_per_owner)


class ChunkWork(Protocol):
    """What a layout may ask about the masks: never the masks themselves."""

    @property
    def weights(self) -> Mapping[str, float]:
        """How much each mask kind counts: its number of layers."""
        ...

    @property
    def machine(self) -> Machine | None:
        """What carries the rows and computes, if it is known."""
        ...

    def __call__(self, chunk_len: int, num_chunks: int) -> Mapping[str, ChunkNeeds]:
        """Per mask kind, for a sequence cut like this."""
        ...


def work_per_rank(layout: Layout, needs: ChunkNeeds) -> np.ndarray:
    """(query, key) pairs that each rank computes, int64 [world_size]."""
    return needs.work[np.array(layout.chunks)].sum(axis=1)


LayoutFn = Callable[[int, int, "ChunkWork | None"], Layout]


def contiguous(seq_len: int, world_size: int, work: ChunkWork | None = None) -> Layout:
    """Rank r holds the r-th piece of the sequence: the least K/V traffic for windows, unbalanced for causal masks.

    0000 1111 2222 3333
    """
    chunk_len = aligned_chunk_len(seq_len, world_size)
    return Layout(seq_len, chunk_len, tuple((r,) for r in range(world_size)), "contiguous")


def zigzag(seq_len: int, world_size: int, work: ChunkWork | None = None) -> Layout:
    """Rank r holds pieces r and 2P - 1 - r of 2P (head-tail): exactly balanced for a dense causal mask.

    0011 2233 3322 1100
    """
    chunk_len = aligned_chunk_len(seq_len, 2 * world_size)
    return Layout(seq_len, chunk_len, tuple((r, 2 * world_size - 1 - r) for r in range(world_size)), "zigzag")


def striped(seq_len: int, world_size: int, work: ChunkWork | None = None) -> Layout:
    """Stripes of `STRIPE` tokens dealt out in turn (Striped Attention, arXiv:2311.09431, by tile rather than by token).

    0123 0123 0123 0123
    """
    chunk_len = min(STRIPE, aligned_chunk_len(seq_len, 2 * world_size))
    per_rank = -(-seq_len // (chunk_len * world_size))
    chunks = tuple(tuple(range(r, per_rank * world_size, world_size)) for r in range(world_size))
    return Layout(seq_len, chunk_len, chunks, "striped")


def aligned_chunk_len(seq_len: int, num_chunks: int) -> int:
    """The least multiple of `ALIGNMENT` with which ``num_chunks`` chunks hold the sequence."""
    return -(-seq_len // (num_chunks * ALIGNMENT)) * ALIGNMENT
