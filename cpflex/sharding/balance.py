"""balanced: one layout with equal work and few foreign keys on every rank, for all mask kinds at once.

Full and sliding layers of a model share their tokens' places, so a layout has to suit each kind of mask. Chunks are
dealt out by longest-processing-time-first with equal counts, then chunks of two ranks are swapped while that lowers
what the busier ranks compute and receive; where several nodes are known, first between these. Ties by id, no random
numbers, no clock: every rank on every host computes the same table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from cpflex.sharding.layout import (
    ALIGNMENT,
    STRIPE,
    ChunkNeeds,
    ChunkWork,
    Layout,
    aligned_chunk_len,
    contiguous,
    work_per_rank,
    zigzag,
)
from cpflex.sharding.nodes import over_nodes
from cpflex.sharding.search import (
    MAX_GROUPS,
    SLACK_PERMILLE,
    Problem,
    contiguous_deal,
    least_overload,
    longest_first,
    refine,
    zigzag_deal,
)

PAIRS_PER_TOKEN = 2000
"""Pairs that take as long to compute as one K/V row to receive: 400 TFLOP/s against 50 GB/s at four query heads per key
head.
"""

MAX_CHUNKS_PER_RANK = 16

FINEST = (16, 32, 64)
"""Chunks per rank where work lies in few places, the last two up to `MAX_FINE_CHUNKS` in all."""

MAX_FINE_CHUNKS = 4096


def balanced(seq_len: int, world_size: int, work: ChunkWork | None = None, *, fragment_cost: float = 0.0) -> Layout:
    """Equal work per rank for every mask kind, then as little K/V traffic as that allows.

    Deals up to 16 chunks to each rank: the cheapest of contiguous, zigzag, and what refining these and a longest-first
    deal gives, where a deal costs the sum over kinds of weight x max over ranks of max(compute, receive), compute above
    the mean by more than the slack counting first. Never worse than zigzag by that measure. Up to 64 chunks where work
    lies in few places. Where a machine of several nodes is known, chunks are dealt over nodes first, and what counts is
    the estimated time: the work of the slowest GPU beside the rows, each once per node, of the busiest node.

    Args:
        fragment_cost: for a model with recurrent layers, where every run of consecutive tokens costs a summary: how
            many K/V rows, of one attention layer, take as long to receive as one summary of each of those layers.
            Chunks that follow one another are then kept on one rank where the work stays as equal as without.

    >>> layout = functools.partial(cpflex.balanced, fragment_cost=2048)
    """
    if not 0 <= fragment_cost < float("inf"):
        raise ValueError(f"fragment_cost must be a number of K/V rows, at least 0; got {fragment_cost}")
    if work is None:
        return zigzag(seq_len, world_size)
    if world_size == 1:
        return contiguous(seq_len, world_size)
    if work.machine is not None and not fragment_cost:
        counts = _chunk_counts(seq_len, world_size)
        layout = over_nodes(seq_len, world_size, counts, work, work.machine)
        if layout is not None:
            return layout
    return _flat(seq_len, world_size, work, fragment_cost)


def _flat(seq_len: int, world_size: int, work: ChunkWork, fragment_cost: float) -> Layout:
    """All ranks alike: the fewest chunks whose deal is even, or the most even one."""
    best: tuple[tuple[float, float, float], Layout] | None = None
    counts = _chunk_counts(seq_len, world_size)
    for count in counts:
        num_chunks = world_size * count
        needs = work(aligned_chunk_len(seq_len, num_chunks), num_chunks)
        if count < counts[-1] and least_overload(needs, world_size) > 1:
            continue  # no deal of these chunks is even: cut finer
        problem = Problem.of(needs, work.weights, world_size, fragment_cost)
        layout = _search(seq_len, problem, needs, work, fragment_cost)
        cost = _cost(layout, needs, work.weights, fragment_cost)
        if best is None or cost < best[0]:
            best = cost, layout
        if cost[0] <= 1:
            break
    assert best is not None, "some number of chunks is searched"
    return best[1]


def _search(
    seq_len: int, problem: Problem, needs: Mapping[str, ChunkNeeds], work: ChunkWork, fragment_cost: float
) -> Layout:
    """The cheapest deal of these chunks that is found."""
    num_chunks = problem.world_size * problem.per_rank
    chunk_len = aligned_chunk_len(seq_len, num_chunks)
    plain = [contiguous_deal(problem), zigzag_deal(problem)]
    # the contiguous start is seldom the best one, and large problems have no time to spare
    starts = plain if num_chunks < MAX_GROUPS else plain[1:]
    # fragments count, if at all, beside a search in which they do not: the work is never less equal for them
    problems = [problem, replace(problem, fragment_burden=0.0)] if fragment_cost else [problem]
    refined = [refine(one, start) for one in problems for start in (*starts, longest_first(problem))]
    layouts = [
        Layout(seq_len, chunk_len, tuple(tuple(sorted(held)) for held in deal.tolist()), "balanced")
        for deal in (*plain, *refined)
    ]
    return min(layouts, key=lambda layout: _cost(layout, needs, work.weights, fragment_cost))


def _cost(
    layout: Layout, needs: Mapping[str, ChunkNeeds], weights: Mapping[str, float], fragment_cost: float
) -> tuple[float, float, float]:
    """What to minimise, first things first: overload, the slowest rank, its traffic; summed over kinds."""
    overload = 0.0
    traffic = fragment_cost * sum(map(len, layout.fragments)) if fragment_cost else 0.0  # all go to every rank
    slowest = PAIRS_PER_TOKEN * traffic
    for kind in sorted(needs):
        load, tokens = work_per_rank(layout, needs[kind]), _received(layout, needs[kind])
        balanced_load = float(load.sum()) * (1000 + SLACK_PERMILLE) / (1000 * layout.world_size)
        overload = max(overload, round(float(load.max() / max(balanced_load, 1)), 2))
        # below the slack, loads count as equal
        slowest += weights[kind] * float(np.maximum(np.maximum(load, balanced_load), PAIRS_PER_TOKEN * tokens).max())
        traffic += weights[kind] * float(tokens.max())
    return max(overload, 1.0), slowest, traffic


def _received(layout: Layout, needs: ChunkNeeds) -> np.ndarray:
    owner = needs.held_by(layout.owner)
    return np.array([
        needs.block_len[needs.sees[list(held)].any(axis=0) & (owner != rank)].sum()
        for rank, held in enumerate(layout.chunks)
    ])  # fmt: skip


def _chunks_per_rank(seq_len: int, world_size: int) -> int:
    """Even, as zigzag pairs them, up to 16: the fewest tokens in padding and in unfilled tiles, then nearest to 8."""
    if seq_len <= ALIGNMENT * world_size:
        return 1
    return min(
        range(2, MAX_CHUNKS_PER_RANK + 1, 2),
        key=lambda count: (_tile_tokens(seq_len, world_size, count), abs(count - 8)),
    )


def _chunk_counts(seq_len: int, world_size: int) -> list[int]:
    """Chunks per rank to try, rising, as far as they cost little padding: at most a tenth of the sequence, and their
    tiles are filled.
    """
    first = _chunks_per_rank(seq_len, world_size)
    most = max(MAX_CHUNKS_PER_RANK, MAX_FINE_CHUNKS // world_size)
    finer = [count for count in FINEST if first < count <= most]
    return [first, *(count for count in finer if _tile_tokens(seq_len, world_size, count) * 10 <= seq_len * 11)]


def _tile_tokens(seq_len: int, world_size: int, count: int) -> int:
    """Tokens that the tiles of ``count`` chunks per rank have room for."""
    chunk_len = aligned_chunk_len(seq_len, world_size * count)
    return world_size * count * -(-chunk_len // STRIPE) * STRIPE
