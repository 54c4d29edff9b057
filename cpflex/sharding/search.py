"""Search: chunks dealt out to ranks so that work is equal for every mask kind and few foreign keys are seen.

A deal starts from a rule (contiguous, zigzag, longest first) and is refined: two ranks swap chunks while that lowers
what the busier ones compute and receive. Integers, ties by id, no random numbers, no clock: every host finds the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cpflex.sharding.layout import ChunkNeeds

SLACK_PERMILLE = 45
"""How far above the mean work a rank may go for the sake of less traffic."""

MAX_GROUPS = 512
"""Groups of neighbouring blocks in which foreign keys are counted while chunks are swapped."""

WORK_BITS = 33
"""Of the work of all chunks, while chunks are dealt: a thousand million times as much fits into 64 bits."""

MIN_LOOKS, MAX_LOOKS_PER_RANK = 80, 8
"""Ranks looked at in the refinement of one start: as many as the bound on words allows, within these."""

MIN_LOOKS_FINE, FINE = 8, 16
"""The least where ranks hold more than so many chunks: there are many swaps to compare."""

MIN_RELIEFS = 400
"""Swaps that relieve an overloaded rank, or one for each rank if these are more: they compare few words."""

MAX_WORDS = 2_000_000
"""64-bit words of key sets compared in the refinement of one start."""

MAX_PARTNERS = 24
"""Ranks with which the worst one may swap."""


@dataclass(frozen=True)
class Problem:
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
    ) -> Problem:
        kinds = sorted(needs)
        num_chunks = len(needs[kinds[0]].work)
        # keys that are not dealt out are held by ranks, not by chunks: `balanced` counts them when it compares deals
        dealt = {kind: needs[kind].dealt for kind in kinds}
        own = [kind for kind in kinds if len(dealt[kind].block_len)]
        per_chunk = len(dealt[own[0]].block_len) // num_chunks if own else 1
        # as many groups per chunk as divide its blocks and stay within the limit
        groups = max(
            g for g in range(1, per_chunk + 1) if per_chunk % g == 0 and (g == 1 or g * num_chunks <= MAX_GROUPS)
        )
        shape = num_chunks, num_chunks * groups, per_chunk // groups
        seen = np.stack([
            dealt[kind].sees.reshape(shape).any(axis=2) if kind in own else np.zeros(shape[:2], dtype=bool)
            for kind in kinds
        ])  # fmt: skip
        held = np.repeat(np.eye(num_chunks, dtype=bool), groups, axis=1)
        work = np.stack([needs[kind].work for kind in kinds])
        work = np.stack([one >> max(0, int(one.sum()).bit_length() - WORK_BITS) for one in work])
        limit = work.sum(axis=1) * (1000 + SLACK_PERMILLE) // (1000 * world_size)
        scale = np.array([weights[kind] for kind in kinds])
        fragments_per_group = num_chunks * groups / max(1, sum(int(dealt[kind].block_len.sum()) for kind in own[:1]))
        burden = 3 * fragment_cost * fragments_per_group  # `_burden` of what the slowest rank receives, as all do
        return cls(world_size, num_chunks // world_size, work, limit, scale, packed(seen), packed(held), burden)

    def foreign(self, sees: np.ndarray, holds: np.ndarray) -> np.ndarray:
        """Weighted groups that are seen [kinds, ..., words] and not held [..., words]."""
        count = np.bitwise_count(sees & ~holds).sum(axis=-1, dtype=np.int64)
        return self.weights[0] * count[0] if len(count) == 1 else np.tensordot(self.weights, count, axes=1)


def least_overload(needs: Mapping[str, ChunkNeeds], world_size: int) -> float:
    """Of the rank that holds the heaviest chunk and otherwise the lightest ones, of the work up to which it would count
    as balanced: no deal is more even.
    """
    found = 0.0
    for one in needs.values():
        ordered, limit = np.sort(one.work), int(one.work.sum()) * (1000 + SLACK_PERMILLE) // (1000 * world_size)
        least = int(ordered[-1] + ordered[: len(ordered) // world_size - 1].sum())
        found = max(found, least / max(limit, 1))
    return found


def packed(bits: np.ndarray) -> np.ndarray:
    """Bits of the last axis as 64-bit words."""
    padded = np.pad(bits, [(0, 0)] * (bits.ndim - 1) + [(0, -bits.shape[-1] % 64)])
    return np.packbits(padded, axis=-1).view(np.uint64)


def longest_first(problem: Problem) -> np.ndarray:
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


def contiguous_deal(problem: Problem) -> np.ndarray:
    return np.arange(problem.world_size * problem.per_rank).reshape(problem.world_size, -1)


def zigzag_deal(problem: Problem) -> np.ndarray:
    """Head-tail pieces of the whole sequence, as chunks: balanced for dense causal masks and in one or two runs."""
    ids = np.arange(problem.world_size * problem.per_rank)
    head = problem.per_rank // 2
    tail = problem.per_rank - head
    heads, tails = ids[: head * problem.world_size], ids[head * problem.world_size :][::-1]
    return np.concatenate([heads.reshape(problem.world_size, head), tails.reshape(-1, tail)], axis=1)


class Deal:
    """A deal of chunks being refined, with what its ranks compute and see."""

    def __init__(self, problem: Problem, chunks: np.ndarray) -> None:
        self.problem = problem
        self.chunks = chunks.copy()  # int64 [world_size, per_rank]
        ranks, count = chunks.shape
        kinds, _, words = problem.sees.shape
        self.load = np.empty((kinds, ranks), dtype=np.int64)
        self.excess = np.empty(ranks, dtype=np.int64)
        """Work above the limit, of the kind that has most of it."""
        self.traffic = np.empty(ranks)
        # what the rank's chunks but one see and hold, for each one left out
        self.rest_sees = np.empty((kinds, ranks, count, words), dtype=np.uint64)
        self.rest_holds = np.empty((ranks, count, words), dtype=np.uint64)
        self._update(np.arange(ranks))

    def cost(self) -> tuple[int, float]:
        """Overload, then traffic, of the worst rank."""
        return int(self.excess.max()), float(self.traffic.max())

    def _update(self, ranks: np.ndarray) -> None:
        problem, held = self.problem, self.chunks[ranks]
        sees, holds = problem.sees[:, held], problem.holds[held]
        self.rest_sees[:, ranks], self.rest_holds[ranks] = _or_of_others(sees), _or_of_others(holds)
        self.load[:, ranks] = load = problem.work[:, held].sum(axis=2)
        self.excess[ranks] = np.maximum(load - problem.limit[:, None], 0).max(axis=0)
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


def refine(problem: Problem, chunks: np.ndarray, most_looks: int | None = None) -> np.ndarray:
    """Swap chunks of the worst rank with any other's while that helps, in few looks if there are to be few."""
    deal = Deal(problem, chunks)
    settled = np.zeros(problem.world_size, dtype=bool)
    kinds, _, words = problem.sees.shape
    swaps = problem.per_rank**2 * min(problem.world_size - 1, MAX_PARTNERS)
    least = MIN_LOOKS if problem.per_rank <= FINE else MIN_LOOKS_FINE
    looks = max(least, min(MAX_LOOKS_PER_RANK * problem.world_size, MAX_WORDS // (swaps * kinds * words)))
    looks, reliefs = min(looks, most_looks or looks), max(MIN_RELIEFS, problem.world_size)
    while looks and reliefs:
        worst = int(np.lexsort((np.arange(len(settled)), -deal.traffic, -deal.excess, settled))[0])
        if settled[worst]:
            break
        swap = deal.best_swap(worst)
        if swap is None:
            settled[worst] = True
            looks -= 1
            continue
        before = deal.excess[worst]
        deal.swap(worst, *swap)
        settled[:] = False
        if deal.excess[worst] < before:
            reliefs -= 1
        else:
            looks -= 1
    return deal.chunks
