"""How documents are dealt: long ones in chunks to few ranks each, the others whole, the shortest where room is left.

First the chunks, document after document, rank after rank, each until its work is what it may be beside the documents
that will fill it; then whole documents, heaviest first, to the rank with the least work that has room; then chunks are
swapped while a rank has too much work. The shortest documents go last, to fill every region exactly: where tokens must
be equal, one of them may lie across the border of two regions. Of several ways to begin the best counts. Integers and
single divisions only, ties by id: every host deals alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from cpflex.sharding.packed import pairs_of_prefix

SLACK = 1.045
"""Most work of a rank, over the mean, that counts as balanced."""

PAIRS_PER_TOKEN = 3000
"""Pairs that take as long to compute as one K/V row to receive, forward and backward: 500 TFLOP/s against 47 GB/s at
four query heads per key head.
"""

ROUNDS = 6
"""Attempts; what found no room, or weighs too much, is cut in the next."""

FILLING = 32
"""A part of the free room, one in so many, is kept for the shortest documents."""

TAIL = -1
"""The region behind the last document that is cut."""


@dataclass(frozen=True)
class Way:
    """How to begin, in shares of the mean work of a rank."""

    full: float = 1.0
    """What a rank has when it is dealt no more chunks."""
    cut: float = SLACK
    """A heavier document is cut."""
    early: float = float("inf")
    """A heavier one that is not cut is placed before the chunks are."""


WAYS = [Way(full, *others) for others in ((), (SLACK, 0.1), (0.2, 0.04), (0.05,)) for full in (1.0, 1.02)]


@dataclass(frozen=True)
class Batch:
    """What is to be dealt, and to whom."""

    lengths: np.ndarray  # int64 [documents]
    world_size: int
    per_rank: int  # chunks
    chunk_len: int
    window: int | None

    @property
    def local_len(self) -> int:
        return self.per_rank * self.chunk_len

    @cached_property
    def work(self) -> np.ndarray:
        """Pairs of each document, int64 [documents]."""
        return pairs_of_prefix(self.lengths, self.window)

    @cached_property
    def mean(self) -> float:
        """Work of a rank."""
        return int(self.work.sum()) / self.world_size

    @property
    def num_pads(self) -> int:
        return self.world_size * self.local_len - int(self.lengths.sum())


@dataclass
class Deal:
    """Who holds what, while it is being dealt."""

    cut: list[int]  # documents that are cut into chunks, in their order
    load: np.ndarray  # float64 [ranks]: pairs
    free: np.ndarray  # int64 [ranks]: tokens
    chunks: list[list[int]]  # of each rank
    whole: list[list[int]]  # documents in each rank's region
    tail: list[int] = field(default_factory=list)  # whole ones behind the last that is cut, in its last chunk
    borders: dict[int, int] = field(default_factory=dict)  # a document that begins in a region and ends in the next
    left: list[int] = field(default_factory=list)  # documents that found no room
    regions: list[int] = field(default_factory=list)  # ranks, in the order of their regions
    received: int = 0  # K/V rows of the rank that receives most

    def is_overloaded(self, mean: float) -> bool:
        """A rank with more work than is even is what all wait for, not one that receives."""
        return float(self.load.max()) > max(SLACK * mean, PAIRS_PER_TOKEN * self.received)

    def cost(self, mean: float) -> tuple[bool, float, int, int]:
        """What to make least, first things first: the slowest rank, as it computes or receives."""
        slowest = max(SLACK * mean, float(self.load.max()), PAIRS_PER_TOKEN * self.received)
        return bool(self.left), round(slowest / mean, 2), self.received, len(self.borders)


def best_deal(batch: Batch) -> Deal:
    """The best of several, which cut ever more documents until all have room."""
    cuts = [{int(d) for d in np.flatnonzero(batch.lengths > batch.local_len)} for _ in WAYS]
    for way, cut in zip(WAYS, cuts, strict=True):
        cut |= {int(d) for d in np.flatnonzero(batch.work > way.cut * batch.mean)}
    best = _deal(batch, cuts[0], WAYS[0])
    for _ in range(ROUNDS):
        for way, cut in zip(WAYS, cuts, strict=True):
            deal = _deal(batch, cut, way)
            best = min(best, deal, key=lambda deal: deal.cost(batch.mean))
            cut |= {*deal.left, *_heavy(batch, deal)}
        if not best.left and not best.is_overloaded(batch.mean):
            return best
    return best if not best.left else _deal(batch, set(range(len(batch.lengths))), Way())


def _deal(batch: Batch, cut: set[int], way: Way) -> Deal:
    """Chunks and documents, dealt in one way."""
    ranks = batch.world_size
    longest_first = sorted(cut, key=lambda d: (-batch.lengths[d], d))
    deal = Deal(longest_first, np.zeros(ranks), np.full(ranks, batch.local_len), *_lists(ranks))
    starts, work = _chunk_work(batch, deal.cut)
    # heaviest first
    pending = [int(d) for d in np.lexsort((np.arange(len(batch.lengths)), -batch.lengths)) if int(d) not in cut]
    if deal.cut:
        pending = _place_early(batch, deal, pending, way.early)
    _deal_chunks(batch, deal, pending, starts, work, way.full)
    _place_whole(batch, deal, pending, room=len(work) * batch.chunk_len - int(starts[-1]))
    deal.received = _most_received(batch, deal, starts, len(work))
    tried = [deal]
    for may_mix in (False, True):
        if deal.left or not deal.cut or not tried[-1].is_overloaded(batch.mean):
            break
        even = replace(tried[-1], load=tried[-1].load.copy(), chunks=[list(held) for held in tried[-1].chunks])
        _even_out(batch, even, starts, work, may_mix)
        even.received = _most_received(batch, even, starts, len(work))
        tried.append(even)
    return min(tried, key=lambda deal: deal.cost(batch.mean))


def _heavy(batch: Batch, deal: Deal) -> set[int]:
    """Of each rank with too much work, the longest document that matters."""
    longest = {
        max(deal.whole[rank], key=lambda d: (batch.lengths[d], -d), default=None)
        for rank in np.flatnonzero(deal.load > SLACK * batch.mean).tolist()
    }
    return {d for d in longest if d is not None and batch.work[d] * 50 > batch.mean}


def _lists(ranks: int) -> tuple[list[list[int]], list[list[int]]]:
    return [[] for _ in range(ranks)], [[] for _ in range(ranks)]


def _chunk_work(batch: Batch, cut: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Where the documents that are cut start, and end, int64 [documents + 1]; pairs of each chunk, int64 [chunks]."""
    starts = np.concatenate([[0], np.cumsum(batch.lengths[list(cut)])]).astype(np.int64)
    num_chunks = -(-int(starts[-1]) // batch.chunk_len)
    work = np.zeros(num_chunks, dtype=np.int64)
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        first, last = start // batch.chunk_len, (end - 1) // batch.chunk_len
        edges = np.clip(np.arange(first, last + 2) * batch.chunk_len, start, end) - start
        work[first : last + 1] += np.diff(pairs_of_prefix(edges, batch.window))
    return starts, work


def _place_early(batch: Batch, deal: Deal, pending: Sequence[int], share: float) -> list[int]:
    """Whole documents that weigh as much as several chunks, to the first rank that chunks can still fill to the mean;
    the documents that are not placed.
    """
    densest = batch.work[deal.cut[0]] / batch.lengths[deal.cut[0]]
    later = []
    for d in pending:
        length, work = batch.lengths[d], batch.work[d]
        missing = batch.mean - deal.load - work
        fits = (deal.free >= length) & (missing >= -0.02 * batch.mean) & (missing <= densest * (deal.free - length))
        if work < share * batch.mean or not fits.any():
            later.append(d)
        else:
            _give(batch, deal, d, int(np.argmax(fits)))
    return later


def _give(batch: Batch, deal: Deal, document: int, rank: int) -> None:
    deal.whole[rank].append(document)
    deal.free[rank] -= batch.lengths[document]
    deal.load[rank] += batch.work[document]


def _deal_chunks(
    batch: Batch, deal: Deal, pending: Sequence[int], starts: np.ndarray, work: np.ndarray, fullness: float
) -> None:
    """Document after document, rank after rank: heads and tails in turns, which are equal in pairs, or in order where a
    window makes all equal. A rank's work counts with what will fill it.
    """
    tokens = int(batch.lengths[list(pending)].sum())
    filling = int(batch.work[list(pending)].sum()) / max(tokens, 1)  # pairs of a token
    chunk_len, full = batch.chunk_len, batch.mean * fullness
    more = work - chunk_len * filling
    expected, rank, dealt, late = deal.load + filling * deal.free, 0, 0, []
    for end in starts[1:].tolist():
        low, high = dealt, (end - 1) // chunk_len
        dealt, is_head = high + 1, True
        while low <= high and rank < batch.world_size:
            chunk = low if is_head or batch.window is not None else high
            if deal.free[rank] < chunk_len or expected[rank] + more[chunk] / 2 > full:
                rank, is_head = rank + 1, True
                continue
            deal.chunks[rank].append(chunk)
            deal.free[rank] -= chunk_len
            deal.load[rank] += work[chunk]
            expected[rank] += more[chunk]
            low, high = (low + 1, high) if chunk == low else (low, high - 1)
            is_head = not is_head
        late += range(low, high + 1)
    for chunk in sorted(late, key=lambda chunk: (-work[chunk], chunk)):
        has_room = deal.free >= chunk_len
        if not has_room.any():  # whole documents are in the way
            deal.left = sorted({d for held in deal.whole for d in held}, key=lambda d: -batch.lengths[d])[:1]
            deal.left = deal.left or deal.cut
            return
        least = int(np.where(has_room, deal.load, np.inf).argmin())
        deal.chunks[least].append(chunk)
        deal.free[least] -= chunk_len
        deal.load[least] += work[chunk]


def _place_whole(batch: Batch, deal: Deal, pending: list[int], room: int) -> None:
    """Documents to the rank with the least work that has room, but for the shortest, which fill what is left."""
    if deal.left:
        return
    pending, last, kept = list(pending), [], int(deal.free.sum()) // FILLING
    while pending and batch.lengths[pending[-1]] <= kept:
        last.append(pending.pop())
        kept -= int(batch.lengths[last[-1]])
    longest = int(batch.lengths[last[-1]]) if last else 0
    for d in pending:
        # so that what is across a border ends in the next region
        fits = deal.free - batch.lengths[d] >= longest
        if not fits.any() and batch.lengths[d] > longest:
            fits = deal.free >= batch.lengths[d]
        if fits.any():
            _give(batch, deal, d, int(np.where(fits, deal.load, np.inf).argmin()))
        else:
            last.append(d)
    _fill(batch, deal, sorted(last, key=lambda d: (-batch.lengths[d], d)), room)


@dataclass
class _Filling:
    """Where the shortest documents go."""

    within: dict[int, list[int]]  # by region
    borders: dict[int, int] = field(default_factory=dict)
    left: list[int] = field(default_factory=list)


def _fill(batch: Batch, deal: Deal, pool: list[int], room: int) -> None:
    """Fill the regions, in their order or those with most room first, which leaves the shortest for the least room."""
    regions = [rank for rank in range(batch.world_size) if len(deal.chunks[rank]) < batch.per_rank]
    free = {TAIL: room, **{rank: int(deal.free[rank]) for rank in regions}}
    orders = (regions, sorted(regions, key=lambda rank: -free[rank]))
    filled = min((_filled(batch, pool, dict(free), [TAIL, *order]) for order in orders), key=lambda f: len(f.left))
    deal.tail, deal.borders, deal.left = filled.within.pop(TAIL), filled.borders, filled.left
    deal.regions = list(filled.within)
    for region, documents in filled.within.items():
        deal.whole[region] += documents
        deal.load[region] += int(batch.work[[*documents, *filter(None, [filled.borders.get(region)])]].sum())


def _filled(batch: Batch, pool: list[int], free: dict[int, int], order: Sequence[int]) -> _Filling:
    """One region after the other: the longest documents that fit, then one across the border where pads do not do."""
    pads, filling = batch.num_pads, _Filling({region: [] for region in order}, left=list(pool))
    for place, region in enumerate(order):
        for d in list(filling.left):
            if batch.lengths[d] <= free[region]:
                filling.within[region].append(d)
                filling.left.remove(d)
                free[region] -= int(batch.lengths[d])
        if not filling.left or free[region] * (len(order) - place) <= pads or place + 1 == len(order):
            pads -= free[region]
            continue
        after = order[place + 1]
        ends = [d for d in filling.left if batch.lengths[d] - free[region] <= free[after]]
        if ends:
            filling.borders[region] = ends[-1]
            filling.left.remove(ends[-1])
            free[after] -= int(batch.lengths[ends[-1]]) - free[region]
    return filling


def _even_out(batch: Batch, deal: Deal, starts: np.ndarray, work: np.ndarray, may_mix: bool) -> None:
    """While a rank has too much work, swap one of its chunks for a lighter one of a rank that may have more: of the
    same document, or else, if documents may mix, of short ones; what relieves most, with the nearest rank.
    """
    owner = np.empty(len(work), dtype=np.int64)
    for rank, held in enumerate(deal.chunks):
        owner[held] = rank
    document = np.searchsorted(starts, np.arange(len(work)) * batch.chunk_len, side="right") - 1
    length, most = batch.lengths[deal.cut][document], SLACK * batch.mean
    for _ in range(4 * batch.world_size):
        rank = int(deal.load.argmax())
        mine = np.array(sorted(deal.chunks[rank], key=lambda chunk: (work[chunk], chunk)), dtype=np.int64)
        if deal.load[rank] <= most or not len(mine):
            return
        upto = work + most - deal.load[owner]  # what may come in place of each chunk
        kinds = [(mine[document[mine] == d], np.flatnonzero(document == d)) for d in np.unique(document[mine])]
        pairs = [_relieving(work, upto, *kind) for kind in kinds]
        if may_mix and not any(len(ours) for ours, _ in pairs):
            pairs = [_relieving(work, upto, mine, np.arange(len(work)))]
        ours, theirs = (np.concatenate(side) for side in zip(*pairs, strict=True))
        if not len(ours):
            return
        rows = np.where(document[ours] == document[theirs], 0, length[ours] + length[theirs])
        gain = np.minimum(work[ours] - work[theirs], deal.load[rank] - most)
        best = np.lexsort((theirs, np.abs(owner[theirs] - rank), -gain, rows))[0]
        chunk, other = int(ours[best]), int(theirs[best])
        deal.chunks[rank][deal.chunks[rank].index(chunk)] = other
        deal.chunks[owner[other]][deal.chunks[owner[other]].index(other)] = chunk
        deal.load[[rank, owner[other]]] += np.array([-1, 1]) * (work[chunk] - work[other])
        owner[[chunk, other]] = owner[[other, chunk]]


def _relieving(
    work: np.ndarray, upto: np.ndarray, ours: np.ndarray, theirs: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For each of their chunks the heaviest of ours, rising by work, that may take its place, if it is heavier."""
    place = np.searchsorted(work[ours], upto[theirs], side="right") - 1
    heavier = (place >= 0) & (work[ours[place]] > work[theirs])
    return ours[place[heavier]], theirs[heavier]


def _most_received(batch: Batch, deal: Deal, starts: np.ndarray, num_chunks: int) -> int:
    """Rows of documents that are cut, by chunks, of the rank that receives most."""
    if not num_chunks:
        return 0
    at = np.arange(num_chunks) * batch.chunk_len
    first = starts[np.searchsorted(starts, at, side="right") - 1]  # of the document of the chunk's first token
    if batch.window is not None:
        first = np.maximum(first, at - batch.window + 1)
    edges = np.zeros((batch.world_size, num_chunks + 1), dtype=np.int32)
    for rank, held in enumerate(deal.chunks):
        np.add.at(edges[rank], first[held] // batch.chunk_len, 1)
        np.add.at(edges[rank], np.asarray(held, dtype=np.int64) + 1, -1)
    seen = (edges.cumsum(axis=1)[:, :-1] > 0).sum(axis=1)
    return int((seen - [len(held) for held in deal.chunks]).max()) * batch.chunk_len
