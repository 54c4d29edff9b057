"""How documents are dealt: heavy ones in chunks to a few neighbouring ranks, the others whole, the shortest where room
is left.

    documents that are cut, one behind the other      the others, one region of consecutive tokens for each rank
    [==== 0 ====|==== 0 ====|==== 1 ====|= shorter =][region of rank 0][region of rank 1][region of rank 2] ...
     chunks
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from cpflex.sharding.layout import STRIPE
from cpflex.sharding.packed import PAD, pairs_of_prefix

FILLING = 16
"""One in so many tokens of the regions is of shortest documents, that fill them to the end."""

LEVEL = 1.02
"""Most work of a rank, in that of the mean one, up to which chunks are swapped no more."""

OVER = (1.0, 1.05, 1.2, 1.5, 2.0, 4.0)
"""Times the target that ranks are filled to, where there is no room up to it."""

SWAPS = 4
"""At most so many times as many swaps as ranks."""


@dataclass(frozen=True)
class Ranks:
    """Documents, and the ranks they go to."""

    lengths: np.ndarray  # int64 [documents]
    window: int | None
    count: int
    chunks_each: int
    chunk_len: int
    per_node: int

    @property
    def local_len(self) -> int:
        return self.chunks_each * self.chunk_len

    @cached_property
    def work(self) -> np.ndarray:
        """Pairs of each document, int64 [documents], with those that its tiles compute in vain."""
        return _work_until(self.lengths, self.window)

    @cached_property
    def mean_work(self) -> float:
        """Of a rank."""
        return int(self.work.sum()) / self.count

    @property
    def num_pads(self) -> int:
        return self.count * self.local_len - int(self.lengths.sum())

    def heavy(self, most: float) -> list[int]:
        """Documents with more tokens than a rank, or more work than ``most`` times the mean rank; heaviest first."""
        found = np.flatnonzero((self.lengths > self.local_len) | (self.work > most * self.mean_work))
        return found[np.lexsort((found, -self.work[found]))].tolist()


@dataclass(frozen=True)
class Deal:
    """Who holds what."""

    order: list[int]  # documents, and `PAD`
    lengths: list[int]
    chunks: list[tuple[int, ...]]  # of each rank, rising


def _work_until(length: np.ndarray, window: int | None) -> np.ndarray:
    return pairs_of_prefix(length, window) + STRIPE * length


def deal(ranks: Ranks, most: float) -> Deal:
    """Documents heavier than ``most`` times the mean work of a rank are cut, and shared by as few ranks as that asks
    for, if short documents fill the rest of these. The others go whole, heaviest first, to the rank with least work
    that has room.
    """
    cut = ranks.heavy(most)
    is_whole = np.ones(len(ranks.lengths), dtype=bool)
    is_whole[cut] = False
    whole = np.flatnonzero(is_whole)
    hands = _Hands(ranks)
    filling = int(ranks.work[whole].sum()) / max(int(ranks.lengths[whole].sum()), 1)
    _deal_chunks(ranks, hands, cut, filling, max(most, 1.0) * ranks.mean_work)
    pool = _deal_whole(ranks, hands, whole[np.lexsort((whole, -ranks.work[whole]))].tolist())
    _level(ranks, hands)
    num_chunks = len(hands.work)
    line = _Line(ranks.lengths, pool, ranks.num_pads)
    line.lay(cut)
    line.fill(num_chunks * ranks.chunk_len, ranks.count)
    chunks = []
    for rank, documents in enumerate(hands.whole):
        end = num_chunks + ranks.chunks_each - len(hands.chunks[rank])
        line.lay(sorted(documents))
        line.fill(end * ranks.chunk_len, ranks.count - 1 - rank)
        chunks.append((*sorted(hands.chunks[rank]), *range(num_chunks, end)))
        num_chunks = end
    line.pad(num_chunks * ranks.chunk_len - line.end)
    return Deal(line.order, line.placed, chunks)


class _Hands:
    """What the ranks hold while documents are dealt."""

    def __init__(self, ranks: Ranks) -> None:
        self.load = np.zeros(ranks.count)
        self.free = np.full(ranks.count, ranks.local_len)
        self.chunks: list[list[int]] = [[] for _ in range(ranks.count)]
        self.whole: list[list[int]] = [[] for _ in range(ranks.count)]
        self.documents: list[int] = []  # of each chunk
        self.work: list[int] = []  # of each chunk


def _deal_chunks(ranks: Ranks, hands: _Hands, cut: list[int], filling: float, target: float) -> None:
    """Document after document, each to as few neighbouring ranks as keep their work at the target, if short documents
    fill what they have left of tokens.

    Args:
        filling: work of a token of these.
    """
    end, chunk_len = 0, ranks.chunk_len
    for document in cut:
        start, end = end, end + int(ranks.lengths[document])
        ids = np.arange(-(-start // chunk_len), -(-end // chunk_len))
        if not len(ids):
            continue  # it lies within the last chunk of the one before
        edges = np.minimum(np.append(ids, ids[-1] + 1) * chunk_len, end) - start
        work = np.diff(_work_until(edges, ranks.window))
        hands.documents += [document] * len(ids)
        hands.work += work.tolist()
        if ranks.window is None:  # heads and tails in turns: pairs of equal work
            turns = np.stack([np.arange(len(ids)), np.arange(len(ids))[::-1]], axis=1).reshape(-1)[: len(ids)]
            ids, work = ids[turns], work[turns]
        more = max(int(work.sum()) / len(ids) - filling * chunk_len, 1.0)
        for to in _neighbours(ranks, hands, len(ids), target - filling * hands.free, more):
            hands.chunks[to].append(int(ids[0]))
            hands.load[to] += work[0]
            hands.free[to] -= chunk_len
            ids, work = ids[1:], work[1:]


def _neighbours(ranks: Ranks, hands: _Hands, count: int, upto: np.ndarray, more: float) -> list[int]:
    """The rank of each of ``count`` chunks, each ``more`` work for a rank: of the fewest ranks next to each other those
    of the fewest nodes, and of these those with most room for work.
    """
    free = hands.free // ranks.chunk_len
    for factor in OVER:
        room = np.clip(np.round((upto * factor - hands.load) / more), 0, free).astype(np.int64)
        before = np.append(0, np.cumsum(room))
        first = np.flatnonzero(room)
        last = np.searchsorted(before, before[first] + count) - 1  # where the document ends
        first, last = first[last < ranks.count], last[last < ranks.count]
        if len(first):
            borders = last // ranks.per_node - first // ranks.per_node
            best = np.lexsort((first, before[first] - before[last + 1], last - first, borders))[0]
            chosen = np.arange(int(first[best]), int(last[best]) + 1)
            share = np.full(len(chosen), -(-count // len(chosen)))
            share = share if (share <= room[chosen]).all() else room[chosen]
            return np.repeat(chosen, share)[:count].tolist()
    least = np.lexsort((np.arange(ranks.count), hands.load))
    return np.repeat(least, free[least])[:count].tolist()


def _deal_whole(ranks: Ranks, hands: _Hands, documents: list[int]) -> list[int]:
    """Heaviest first; those that are left, the shortest and those that have no room, the shortest first."""
    kept, left = int(hands.free.sum()) // FILLING, []
    while documents and ranks.lengths[documents[-1]] <= kept:
        left.append(documents.pop())
        kept -= int(ranks.lengths[left[-1]])
    for document in documents:
        fits = hands.free >= ranks.lengths[document]
        if not fits.any():
            left.append(document)
            continue
        least = int(np.where(fits, hands.load, np.inf).argmin())
        hands.whole[least].append(document)
        hands.load[least] += ranks.work[document]
        hands.free[least] -= ranks.lengths[document]
    return sorted(left, key=lambda document: (ranks.lengths[document], document))


def _level(ranks: Ranks, hands: _Hands) -> None:
    """Swap a chunk of the rank with most work for a lighter one of the same document, while that helps."""
    work, document = np.array(hands.work), np.array(hands.documents)
    owner = np.empty(len(work), dtype=np.int64)
    for index, held in enumerate(hands.chunks):
        owner[held] = index
    for _ in range(SWAPS * ranks.count):
        most = int(hands.load.argmax())
        mine = np.array(sorted(hands.chunks[most]), dtype=np.int64)
        theirs = np.flatnonzero(np.isin(document, document[mine]) & (owner != most))
        if hands.load[most] <= LEVEL * ranks.mean_work or not len(theirs):
            return
        moved = work[mine][:, None] - work[theirs]
        after = np.maximum(hands.load[most] - moved, hands.load[owner[theirs]] + moved)
        after[document[mine][:, None] != document[theirs]] = np.inf
        place, other = np.unravel_index(after.argmin(), after.shape)
        if after[place, other] >= hands.load[most]:
            return
        chunk, back = int(mine[place]), int(theirs[other])
        to = int(owner[back])
        hands.chunks[most].remove(chunk)
        hands.chunks[to].remove(back)
        hands.chunks[most].append(back)
        hands.chunks[to].append(chunk)
        hands.load[[most, to]] += np.array([-1, 1]) * (work[chunk] - work[back])
        owner[[chunk, back]] = to, most


@dataclass
class _Line:
    """The packed sequence while it is laid, document after document."""

    lengths: np.ndarray  # of each document
    pool: list[int]  # documents that fill, the shortest first
    pads: int  # that are left
    order: list[int] = field(default_factory=list)
    placed: list[int] = field(default_factory=list)  # lengths of these
    end: int = 0

    def lay(self, documents: list[int]) -> None:
        new = self.lengths[documents].tolist()
        self.order += documents
        self.placed += new
        self.end += sum(new)

    def fill(self, until: int, regions_after: int) -> None:
        """The longest documents that fit; then pads, if as many are left for every region after this one, or else the
        shortest document, across the border.
        """
        while (room := until - self.end) > 0:
            place = bisect_right(self.pool, room, key=lambda document: int(self.lengths[document]))
            if place == 0 and (room * (regions_after + 1) <= self.pads or not self.pool):
                self.pad(min(room, self.pads))
                return
            self.lay([self.pool.pop(max(place - 1, 0))])

    def pad(self, count: int) -> None:
        """Runs of pads, no longer than a tile: they are documents of their own."""
        runs = [min(STRIPE, count - done) for done in range(0, count, STRIPE)]
        self.order += [PAD] * len(runs)
        self.placed += runs
        self.pads -= count
        self.end += count
