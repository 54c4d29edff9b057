"""balanced: one layout with equal work and few foreign keys on every rank, for all mask kinds at once.

Full and sliding layers of a model share their tokens' places, so a layout has to suit each kind of mask. Chunks are
dealt out by longest-processing-time-first with equal counts, then chunks of two ranks are swapped while that lowers
what the busier ranks compute and receive. Integers only, ties by id, no random numbers, no clock: every rank on every
host computes the same table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from cpflex.sharding.layout import (
    ALIGNMENT,
    STRIPE,
    ChunkNeeds,
    ChunkWork,
    Layout,
    aligned_chunk_len,
    contiguous,
    zigzag,
)

SLACK_PERMILLE = 45
"""How far above the mean work a rank may go for the sake of less traffic."""

PAIRS_PER_TOKEN = 2000
"""Pairs that take as long to compute as one K/V row to receive: 400 TFLOP/s against 50 GB/s at four query heads per key
head.
"""

MAX_GROUPS = 512
"""Groups of neighbouring blocks in which foreign keys are counted while chunks are swapped."""

WORK_BITS = 33
"""Of the work of all chunks, while chunks are dealt: a thousand million times as much fits into 64 bits."""

MAX_CHUNKS_PER_RANK = 16

MIN_LOOKS, MAX_LOOKS_PER_RANK = 80, 8
"""Ranks looked at in the refinement of one start: as many as the bound on words allows, within these."""

MAX_WORDS = 2_000_000
"""64-bit words of key sets compared in the refinement of one start."""

MAX_PARTNERS = 24
"""Ranks with which the worst one may swap."""


def balanced(seq_len: int, world_size: int, work: ChunkWork | None = None, *, fragment_cost: float = 0.0) -> Layout:
    """Equal work per rank for every mask kind, then as little K/V traffic as that allows.

    Deals up to 16 chunks to each rank: the cheapest of contiguous, zigzag, and what refining these and a longest-first
    deal gives, where a deal costs the sum over kinds of weight x max over ranks of max(compute, receive), compute above
    the mean by more than the slack counting first. Never worse than zigzag by that measure.

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
    problem, needs = _problem(seq_len, world_size, _chunks_per_rank(seq_len, world_size), work, fragment_cost)
    if (problem.work.max(axis=1) > problem.limit).any() and _fits(seq_len, world_size, MAX_CHUNKS_PER_RANK):
        # one chunk alone is more than a rank's share: cut finer
        problem, needs = _problem(seq_len, world_size, MAX_CHUNKS_PER_RANK, work, fragment_cost)
    num_chunks = world_size * problem.per_rank
    chunk_len = aligned_chunk_len(seq_len, num_chunks)
    plain = [_contiguous_deal(problem), _zigzag_deal(problem)]
    # the contiguous start is seldom the best one, and large problems have no time to spare
    starts = plain if num_chunks < MAX_GROUPS else plain[1:]
    # fragments count, if at all, beside a search in which they do not: the work is never less equal for them
    problems = [problem, replace(problem, fragment_burden=0.0)] if fragment_cost else [problem]
    refined = [_refine(one, start) for one in problems for start in (*starts, _longest_first(problem))]
    layouts = [
        Layout(seq_len, chunk_len, tuple(tuple(sorted(held)) for held in deal.tolist()), "balanced")
        for deal in (*plain, *refined)
    ]
    return min(layouts, key=lambda layout: _cost(layout, needs, work.weights, fragment_cost))


def work_per_rank(layout: Layout, needs: ChunkNeeds) -> np.ndarray:
    """(query, key) pairs that each rank computes, int64 [world_size]."""
    return np.array([needs.work[list(held)].sum() for held in layout.chunks])


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
    owner = layout.owner[needs.block_chunk]
    return np.array([
        needs.block_len[needs.sees[list(held)].any(axis=0) & (owner != rank)].sum()
        for rank, held in enumerate(layout.chunks)
    ])  # fmt: skip


def _problem(
    seq_len: int, world_size: int, chunks_per_rank: int, work: ChunkWork, fragment_cost: float
) -> tuple[_Problem, Mapping[str, ChunkNeeds]]:
    num_chunks = world_size * chunks_per_rank
    needs = work(aligned_chunk_len(seq_len, num_chunks), num_chunks)
    return _Problem.of(needs, work.weights, world_size, fragment_cost), needs


def _chunks_per_rank(seq_len: int, world_size: int) -> int:
    """Even, as zigzag pairs them, up to 16: the fewest tokens in padding and in unfilled tiles, then nearest to 8."""
    if seq_len <= ALIGNMENT * world_size:
        return 1
    return min(
        range(2, MAX_CHUNKS_PER_RANK + 1, 2),
        key=lambda count: (_tile_tokens(seq_len, world_size, count), abs(count - 8)),
    )


def _fits(seq_len: int, world_size: int, count: int) -> bool:
    """So many chunks a rank cost little padding: at most a tenth of the sequence, and their tiles are filled."""
    return _tile_tokens(seq_len, world_size, count) * 10 <= seq_len * 11


def _tile_tokens(seq_len: int, world_size: int, count: int) -> int:
    """Tokens that the tiles of ``count`` chunks per rank have room for."""
    chunk_len = aligned_chunk_len(seq_len, world_size * count)
    return world_size * count * -(-chunk_len // STRIPE) * STRIPE


@dataclass(frozen=True)
class _Problem:
    """What the search looks at, kinds along the first axis."""

    world_size: int
    per_rank: int
    work: np.ndarray  # int64 [kinds, chunks]: pairs, or so many times 2, 4, 8 ... that all have `WORK_BITS` bits
    limit: np.ndarray  # int64 [kinds]: work up to which a rank counts as balanced
    weights: np.ndarray  # float64 [kinds]: traffic of one group of blocks
    sees: np.ndarray  # uint64 [kinds, chunks, words]: groups of blocks that the chunk's queries see
    holds: np.ndarray  # uint64 [chunks, words]: groups that the chunk consists of
    fragment_burden: float  # that of one fragment more, in weighted groups of blocks

    @classmethod
    def of(
        cls, needs: Mapping[str, ChunkNeeds], weights: Mapping[str, float], world_size: int, fragment_cost: float
    ) -> _Problem:
        kinds = sorted(needs)
        any_kind = needs[kinds[0]]
        num_chunks = len(any_kind.work)
        per_chunk = len(any_kind.block_chunk) // num_chunks
        # as many groups per chunk as divide its blocks and stay within the limit
        groups = max(
            g for g in range(1, per_chunk + 1) if per_chunk % g == 0 and (g == 1 or g * num_chunks <= MAX_GROUPS)
        )
        seen = np.stack([
            needs[kind].sees.reshape(num_chunks, num_chunks * groups, per_chunk // groups).any(axis=2) for kind in kinds
        ])  # fmt: skip
        held = np.repeat(np.eye(num_chunks, dtype=bool), groups, axis=1)
        work = np.stack([needs[kind].work for kind in kinds])
        work = np.stack([one >> max(0, int(one.sum()).bit_length() - WORK_BITS) for one in work])
        limit = work.sum(axis=1) * (1000 + SLACK_PERMILLE) // (1000 * world_size)
        scale = np.array([weights[kind] for kind in kinds])
        fragments_per_group = num_chunks * groups / int(any_kind.block_len.sum())
        burden = 3 * fragment_cost * fragments_per_group  # `_burden` of what the slowest rank receives, as all do
        return cls(world_size, num_chunks // world_size, work, limit, scale, _packed(seen), _packed(held), burden)

    def foreign(self, sees: np.ndarray, holds: np.ndarray) -> np.ndarray:
        """Weighted groups that are seen [kinds, ..., words] and not held [..., words]."""
        count = np.bitwise_count(sees & ~holds).sum(axis=-1, dtype=np.int64)
        return np.tensordot(self.weights, count, axes=1)


def _packed(bits: np.ndarray) -> np.ndarray:
    """Bits of the last axis as 64-bit words."""
    padded = np.pad(bits, [(0, 0)] * (bits.ndim - 1) + [(0, -bits.shape[-1] % 64)])
    return np.packbits(padded, axis=-1).view(np.uint64)


def _longest_first(problem: _Problem) -> np.ndarray:
    """Longest processing time first, to the rank whose busiest kind is least busy; equal counts. int64 [world_size,
    per_rank].
    """
    mean = np.maximum(problem.work.sum(axis=1), 1)[:, None]
    share = problem.work * 1_000_000_000 // mean  # integers, so that every host rounds alike
    load = np.zeros((len(share), problem.world_size), dtype=np.int64)
    count = np.zeros(problem.world_size, dtype=np.int64)
    chunks = np.empty((problem.world_size, problem.per_rank), dtype=np.int64)
    for chunk in np.argsort(-share.max(axis=0), kind="stable"):
        after = (load + share[:, chunk : chunk + 1]).max(axis=0)
        rank = int(np.argmin(np.where(count < problem.per_rank, after, np.iinfo(np.int64).max)))
        chunks[rank, count[rank]] = chunk
        load[:, rank] += share[:, chunk]
        count[rank] += 1
    return chunks


def _contiguous_deal(problem: _Problem) -> np.ndarray:
    return np.arange(problem.world_size * problem.per_rank).reshape(problem.world_size, -1)


def _zigzag_deal(problem: _Problem) -> np.ndarray:
    """Head-tail pieces of the whole sequence, as chunks: balanced for dense causal masks and in one or two runs."""
    ids = np.arange(problem.world_size * problem.per_rank)
    head = problem.per_rank // 2
    tail = problem.per_rank - head
    heads, tails = ids[: head * problem.world_size], ids[head * problem.world_size :][::-1]
    return np.concatenate([heads.reshape(problem.world_size, head), tails.reshape(-1, tail)], axis=1)


class _Deal:
    """A deal of chunks being refined, with what its ranks compute and see."""

    def __init__(self, problem: _Problem, chunks: np.ndarray) -> None:
        self.problem = problem
        self.chunks = chunks.copy()  # int64 [world_size, per_rank]
        ranks, count = chunks.shape
        kinds, _, words = problem.sees.shape
        self.load = np.empty((kinds, ranks), dtype=np.int64)
        self.traffic = np.empty(ranks)
        # what the rank's chunks but one see and hold, for each one left out
        self.rest_sees = np.empty((kinds, ranks, count, words), dtype=np.uint64)
        self.rest_holds = np.empty((ranks, count, words), dtype=np.uint64)
        self._update(np.arange(ranks))

    def _update(self, ranks: np.ndarray) -> None:
        problem, held = self.problem, self.chunks[ranks]
        sees, holds = problem.sees[:, held], problem.holds[held]
        self.rest_sees[:, ranks], self.rest_holds[ranks] = _or_of_others(sees), _or_of_others(holds)
        self.load[:, ranks] = problem.work[:, held].sum(axis=2)
        self.traffic[ranks] = problem.foreign(np.bitwise_or.reduce(sees, axis=2), np.bitwise_or.reduce(holds, axis=1))

    def swap(self, rank: int, mine: int, other: int, theirs: int) -> None:
        chunks = self.chunks
        chunks[rank, mine], chunks[other, theirs] = chunks[other, theirs], chunks[rank, mine]
        self._update(np.array([rank, other]))

    def partners(self, rank: int) -> np.ndarray:
        """Ranks to swap with: all if they are few, else those that hold the neighbours of the rank's chunks, then the
        least busy.
        """
        ranks = self.chunks.shape[0]
        if ranks <= MAX_PARTNERS:
            return np.array([other for other in range(ranks) if other != rank])
        owner = np.empty(self.chunks.size, dtype=np.int64)
        owner[self.chunks] = np.arange(ranks)[:, None]
        near = np.clip(self.chunks[rank][:, None] + np.array([-1, 1]), 0, len(owner) - 1)
        share = (self.load / np.maximum(self.problem.limit, 1)[:, None]).max(axis=0)
        candidates = np.append(owner[near.reshape(-1)], np.lexsort((np.arange(ranks), share)))
        first_seen = np.sort(np.unique(candidates, return_index=True)[1])
        chosen = candidates[first_seen]
        return chosen[chosen != rank][:MAX_PARTNERS]

    def _joined(self, rank: int, mine: np.ndarray, other: np.ndarray, theirs: np.ndarray) -> np.ndarray:
        """How many fragments fewer there are after each swap of chunk ``mine`` with ``theirs`` of an ``other`` rank."""
        owner = np.full(self.chunks.size + 2, -1)
        owner[self.chunks + 1] = np.arange(len(self.chunks))[:, None]

        def beside(rank: int | np.ndarray, chunk: np.ndarray, gone: np.ndarray | int = -2) -> np.ndarray:
            """Neighbours of a chunk that the rank holds, but for one that is gone."""
            before = (owner[chunk] == rank) & (chunk - 1 != gone)
            after = (owner[chunk + 2] == rank) & (chunk + 1 != gone)
            return before.astype(np.int64) + after

        gained = beside(rank, theirs, gone=mine) + beside(other, mine, gone=theirs)
        return gained - beside(rank, mine) - beside(other, theirs)

    def best_swap(self, rank: int) -> tuple[int, int, int] | None:
        """(place in the rank, other rank, place there) of the swap that helps the two ranks most, or None.

        No swap may push work above the limit, or further above it. Overload is relieved first, traffic second.
        """
        problem, limit = self.problem, self.problem.limit
        partners, mine = self.partners(rank), self.chunks[rank]
        own, theirs = self.load[:, rank, None], self.load[:, partners]  # [kinds, partners]
        delta = problem.work[:, None, self.chunks[partners]] - problem.work[:, mine][:, :, None, None]
        heavier = np.maximum(own[:, None, :, None] + delta, theirs[:, None, :, None] - delta)  # [kinds, n, partners, n]
        excess = np.maximum(heavier - limit[:, None, None, None], 0)
        before = np.maximum(np.maximum(own, theirs) - limit[:, None], 0)[:, None, :, None]
        share = np.maximum(limit, 1)[:, None, None, None]
        relief = ((before - excess) * 1_000_000 // share).sum(axis=0)  # whole millionths of the limit
        allowed = (excess <= before).all(axis=0)
        if relief[allowed].max(initial=0) > 0:
            allowed &= relief == relief[allowed].max()
        place, partner, there = np.nonzero(allowed)
        if not len(place):
            return None
        other = partners[partner]
        arriving = self.chunks[other, there]
        after_mine = problem.foreign(
            self.rest_sees[:, rank, place] | problem.sees[:, arriving],
            self.rest_holds[rank, place] | problem.holds[arriving],
        )
        after_theirs = problem.foreign(
            self.rest_sees[:, other, there] | problem.sees[:, mine[place]],
            self.rest_holds[other, there] | problem.holds[mine[place]],
        )
        gain = _burden(self.traffic[rank], self.traffic[other]) - _burden(after_mine, after_theirs)
        if problem.fragment_burden:
            gain = gain + problem.fragment_burden * self._joined(rank, mine[place], other, arriving)
        best = int(np.argmax(gain))
        if gain[best] <= 1e-9 and relief[place[best], partner[best], there[best]] <= 0:
            return None
        return int(place[best]), int(other[best]), int(there[best])


def _burden(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of the traffic of two ranks: the sum, and the larger one twice more, as the slowest rank is waited for."""
    return a + b + 2 * np.maximum(a, b)


def _or_of_others(bits: np.ndarray) -> np.ndarray:
    """Along the last axis but one, the union of all entries but one, for each one."""
    others = np.zeros_like(bits)
    others[..., 1:, :] = np.bitwise_or.accumulate(bits, axis=-2)[..., :-1, :]
    others[..., :-1, :] |= np.bitwise_or.accumulate(bits[..., ::-1, :], axis=-2)[..., ::-1, :][..., 1:, :]
    return others


def _refine(problem: _Problem, chunks: np.ndarray) -> np.ndarray:
    """Swap chunks of the worst rank with any other's while that helps."""
    deal = _Deal(problem, chunks)
    settled = np.zeros(problem.world_size, dtype=bool)
    kinds, _, words = problem.sees.shape
    swaps = problem.per_rank**2 * min(problem.world_size - 1, MAX_PARTNERS)
    looks = max(MIN_LOOKS, min(MAX_LOOKS_PER_RANK * problem.world_size, MAX_WORDS // (swaps * kinds * words)))
    for _ in range(looks):
        excess = np.maximum(deal.load - problem.limit[:, None], 0).max(axis=0)
        worst = np.lexsort((np.arange(len(settled)), -deal.traffic, -excess, settled))[0]
        if settled[worst]:
            break
        swap = deal.best_swap(int(worst))
        if swap is None:
            settled[worst] = True
        else:
            deal.swap(int(worst), *swap)
            settled[:] = False
    return deal.chunks
