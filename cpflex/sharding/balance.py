"""balanced: the layout with the least work on the busiest rank, for all mask kinds at once."""

from __future__ import annotations

import numpy as np

from cpflex.sharding.layout import ChunkNeeds, ChunkWork, Layout, contiguous, striped, zigzag


def balanced(seq_len: int, world_size: int, work: ChunkWork | None = None) -> Layout:
    """The best of contiguous, zigzag and striped by the sum over kinds of weight x the busiest rank's work.

    The order of candidates is the order of K/V locality and breaks ties. Without masks to balance, zigzag.
    """
    if work is None:
        return zigzag(seq_len, world_size)
    candidates = [fill(seq_len, world_size) for fill in (contiguous, zigzag, striped)]
    return min(candidates, key=lambda layout: _busiest(layout, work))


def _busiest(layout: Layout, work: ChunkWork) -> float:
    needs = work(layout.chunk_len)
    return sum(work.weights[kind] * float(work_per_rank(layout, needs[kind]).max()) for kind in sorted(needs))


def work_per_rank(layout: Layout, needs: ChunkNeeds) -> np.ndarray:
    """(query, key) pairs that each rank computes, int64 [world_size]."""
    return np.array([needs.work[list(held)].sum() for held in layout.chunks])
