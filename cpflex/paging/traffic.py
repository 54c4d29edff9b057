"""Traffic: where each query meets each page, when ranks have different new tokens; decided once for a plan.

Every rank makes the same tables of all ranks. A query of a sequence whose queries travel is computed by each rank that
keeps a page which it may see. One of a sequence whose keys travel is computed by its own rank alone: over the pages
that this rank keeps, then over those that are fetched for it, in waves, so that what arrives at once is bounded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from cpflex.paging.pages import Held
from cpflex.paging.tables import Blocks, Kept, Tables, tables_of
from cpflex.paging.travel import Costs

ROWS_AT_ONCE = 1 << 15
"""Rows of keys that are fetched for a rank in one wave, at most, or one page: 128 MiB of 8 heads of 128 in bf16, held
for one layer at a time.
"""

# P ranks, N new tokens of all, B blocks of them, G pages of all sequences, one sequence after another


class AllPages(NamedTuple):
    """The pages of a plan's sequences, int64 [G] each; a page that several share is there for each."""

    place: np.ndarray
    page: np.ndarray
    owner: np.ndarray
    slot: np.ndarray

    @staticmethod
    def of(helds: Sequence[Held], limits: Sequence[int], page_size: int) -> AllPages:
        counts = [-(-limit // page_size) for limit in limits]
        parts = [
            (np.full(count, place), np.arange(count), held.owner[:count], held.slot[:count])
            for place, (held, count) in enumerate(zip(helds, counts, strict=True))
        ]
        return AllPages(*(np.concatenate(column).astype(np.int64) for column in zip(*parts, strict=True)))

    def at(self, place: np.ndarray, page: np.ndarray) -> np.ndarray:
        """Where pages of sequences lie among all."""
        return np.searchsorted(self.place, place) + page

    def rows_below(self, lengths: np.ndarray, page_size: int) -> np.ndarray:
        """Rows of each page at positions below the length of its sequence."""
        return np.clip(lengths[self.place] - self.page * page_size, 0, page_size)


@dataclass(frozen=True)
class Needs:
    """What the queries of each rank may see, of one mask kind, while a plan lasts."""

    pages: AllPages
    bounds: np.ndarray
    """First token of each rank, and their end, [P + 1]."""
    whole: tuple[Blocks, Kept]
    """As they are computed where queries travel."""
    cut: tuple[Blocks, Kept]
    """Blocks of one rank each."""

    @cached_property
    def home(self) -> np.ndarray:
        """The rank of each block of ``cut``."""
        return np.searchsorted(self.bounds, self.cut[0].first, side="right") - 1

    @cached_property
    def shown(self) -> np.ndarray:
        """Whether a rank keeps a page that a block of ``whole`` may see, bool [B, P]."""
        blocks, kept = self.whole
        found = np.zeros((len(blocks.place), len(self.bounds) - 1), bool)
        found[kept.block, kept.owner] = True
        return found

    @cached_property
    def fetched(self) -> np.ndarray:
        """Pages of other ranks that a rank's own queries may see, bool [P, G]."""
        blocks, kept = self.cut
        found = np.zeros((len(self.bounds) - 1, len(self.pages.place)), bool)
        found[self.home[kept.block], self.pages.at(blocks.place[kept.block], kept.page)] = True
        return found & (self.pages.owner != np.arange(len(found))[:, None])

    def rows(self, lengths: np.ndarray, new: np.ndarray, page_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the first step, all ranks together, by sequence: queries that would travel; new keys that go to their
        owners; and keys, new ones with them, that would go to owners and queries.
        """
        blocks, pages, count = self.whole[0], self.pages, len(new)
        ends = np.minimum(blocks.end[:, None], self.bounds[1:])
        own = np.maximum(ends - np.maximum(blocks.first[:, None], self.bounds[:-1]), 0)
        others = (blocks.end - blocks.first)[:, None] - own
        asked = np.bincount(blocks.place, (others * self.shown).sum(axis=1), count)
        place = np.repeat(np.arange(count), new)
        position = lengths[place] + np.arange(len(place)) - np.repeat(np.cumsum(new) - new, new)
        page = pages.at(place, position // page_size)
        ranks = np.arange(len(self.bounds) - 1)[:, None]
        is_owner, is_home = pages.owner[page] == ranks, self.home_of(np.arange(len(place))) == ranks
        given = np.bincount(place, (is_owner & ~is_home).sum(axis=0), count)
        sent = np.bincount(place, ((is_owner | self.fetched[:, page]) & ~is_home).sum(axis=0), count)
        old = pages.rows_below(lengths, page_size) * self.fetched.sum(axis=0)
        return asked, given, sent + np.bincount(pages.place, old, count)

    def home_of(self, tokens: np.ndarray) -> np.ndarray:
        """The rank that has each token."""
        return np.searchsorted(self.bounds, tokens, side="right") - 1


@dataclass(frozen=True)
class Traffic:
    """Of one mask kind: what ranks compute for one another, and fetch."""

    keys: np.ndarray
    """Of each sequence: whether keys travel, bool."""
    pages: AllPages
    bounds: np.ndarray
    computed: tuple[np.ndarray, ...]
    """By rank: the tokens whose queries meet the pages that it keeps, ascending."""
    by_keys: np.ndarray
    """Of each new token: whether keys travel to it, bool [N]."""
    fetched: tuple[tuple[np.ndarray, ...], ...]
    """By wave and rank: the pages that come to it, of ``pages``, ascending."""
    costs: Costs
    """By which it was chosen."""

    @property
    def returns(self) -> bool:
        """Whether partials return from other ranks, of any token."""
        return not self.keys.all()

    @property
    def in_words(self) -> str:
        """Equal on two ranks iff they let the same travel."""
        digest = hashlib.blake2b(self.keys.tobytes(), digest_size=4).hexdigest()
        return f"keys of {self.keys.sum()} and queries of {(~self.keys).sum()} sequences, {digest}"

    @property
    def num_waves(self) -> int:
        """In which pages are fetched; 0 if none are."""
        return len(self.fetched) if self.most_pages() else 0

    def most_pages(self, rank: int | None = None) -> int:
        """That come to a rank, or to any, in one wave."""
        lists = (one for wave in self.fetched for one in (wave if rank is None else (wave[rank],)))
        return max(map(len, lists))

    @property
    def num_messages(self) -> int:
        """To each other rank, at most, in a layer."""
        return len(self.fetched) + self.returns

    def most_first(self, page_size: int, *, new_ones_travel: bool) -> tuple[np.ndarray, np.ndarray]:
        """Queries, and rows of keys at most, in the first message from each rank to each in any step, int64 [P, P]."""
        ranks, tokens = np.arange(len(self.bounds) - 1), np.diff(self.bounds)
        queries = np.stack([np.diff(np.searchsorted(one, self.bounds)) for one in self.computed], axis=1)
        pages = [np.bincount(self.pages.owner[fetched], minlength=len(ranks)) for fetched in self.fetched[0]]
        keys = np.stack(pages, axis=1) * page_size + (tokens[:, None] if new_ones_travel else 0)
        is_other = ranks[:, None] != ranks
        return queries * is_other, keys * is_other

    def own(self, rank: int) -> np.ndarray:
        """The tokens that a rank has."""
        return np.arange(self.bounds[rank], self.bounds[rank + 1])


def traffic_of(
    needs: Needs, keys: np.ndarray, new: np.ndarray, num_pages: int, page_size: int, costs: Costs
) -> Traffic:
    """
    Args:
        keys: of each sequence, whether keys travel.
        num_pages: of each rank.
    """
    world_size, by_keys = len(needs.bounds) - 1, np.repeat(keys, new)
    blocks, computed = needs.whole[0], []
    for rank in range(world_size):
        shown = np.repeat(~keys[blocks.place] & needs.shown[:, rank], blocks.end - blocks.first)
        shown[needs.bounds[rank] : needs.bounds[rank + 1]] |= by_keys[needs.bounds[rank] : needs.bounds[rank + 1]]
        computed.append(np.flatnonzero(shown))
    lists = [fetched_by(needs, keys, rank, num_pages)[0] for rank in range(world_size)]
    at_once = max(1, ROWS_AT_ONCE // page_size)
    num_waves = max(1, *(-(-len(one) // at_once) for one in lists))
    waves = [tuple(one[wave * at_once : (wave + 1) * at_once] for one in lists) for wave in range(num_waves)]
    return Traffic(keys, needs.pages, needs.bounds, tuple(computed), by_keys, tuple(waves), costs)


def num_waves_of(needs: Needs, page_size: int) -> int:
    """If all keys travel; a page that several sequences share counts for each."""
    return max(1, -(-int(needs.fetched.sum(axis=1).max()) // max(1, ROWS_AT_ONCE // page_size)))


def fetched_by(needs: Needs, keys: np.ndarray, rank: int, num_pages: int) -> tuple[np.ndarray, np.ndarray]:
    """The pages that come to a rank, ascending, each once; and of all pages, which of those has its rows, [G]."""
    pages = needs.pages
    wanted = np.flatnonzero(needs.fetched[rank] & keys[pages.place])
    _, first, which = np.unique(pages.owner[wanted] * num_pages + pages.slot[wanted], True, True)
    order = np.argsort(first)
    rank_of_first = np.empty(len(order), np.int64)
    rank_of_first[order] = np.arange(len(order))
    found = np.full(len(pages.place), -1)
    found[wanted] = rank_of_first[which.reshape(-1)]
    return wanted[first[order]], found


def tables_of_rank(
    needs: Needs, traffic: Traffic, rank: int, num_pages: int, page_size: int, splits: int
) -> list[Tables]:
    """What a rank computes: over the pages that it keeps, then over those of each wave."""
    (blocks, kept), (cut, cut_kept), keys = needs.whole, needs.cut, traffic.keys
    asked = ~keys[blocks.place] & needs.shown[:, rank]
    mine = keys[cut.place] & (needs.home == rank)
    here = [(blocks, kept, asked, kept.owner == rank), (cut, cut_kept, mine, cut_kept.owner == rank)]
    found = [replaced(here, traffic.computed[rank], rank, page_size, splits)]
    _, at = fetched_by(needs, keys, rank, num_pages)
    at = at[needs.pages.at(cut.place[cut_kept.block], cut_kept.page)]
    at_once, own = max(1, ROWS_AT_ONCE // page_size), traffic.own(rank)
    for wave in range(traffic.num_waves):
        comes = mine[cut_kept.block] & (cut_kept.owner != rank) & (at // at_once == wave) & (at >= 0)
        moved = cut_kept._replace(owner=np.full(len(at), rank), slot=at % at_once)
        found.append(replaced([(cut, moved, mine, comes)], own[traffic.by_keys[own]], rank, page_size, splits))
    return found


def replaced(
    parts: Sequence[tuple[Blocks, Kept, np.ndarray, np.ndarray]],
    tokens: np.ndarray,
    rank: int,
    page_size: int,
    splits: int,
) -> Tables:
    """Tables of the chosen blocks and pages of each part, whose tokens are counted anew from 0."""
    blocks = Blocks(
        *(np.concatenate(x) for x in zip(*(_columns(one.at(some)) for one, _, some, _ in parts), strict=True))
    )
    order = np.argsort(blocks.first, kind="stable")
    number, kepts, begin = np.argsort(order, kind="stable"), [], 0
    for _, kept, some, comes in parts:
        renumbered = np.full(len(some), -1)
        renumbered[some] = number[begin : begin + some.sum()]
        begin += some.sum()
        chosen = comes & some[kept.block]
        kepts.append((renumbered[kept.block[chosen]], *(x[chosen] for x in kept[1:])))
    kept = Kept(*(np.concatenate(x) for x in zip(*kepts, strict=True)))
    kept = Kept(*(x[np.argsort(kept.block, kind="stable")] for x in kept))
    blocks = blocks.at(order)
    ends = np.cumsum(blocks.end - blocks.first)
    counted = replace(blocks, first=ends - (blocks.end - blocks.first), end=ends)
    return tables_of(kept, counted, rank, page_size, splits)._replace(tokens=tokens)


def _columns(blocks: Blocks) -> tuple[np.ndarray, ...]:
    return blocks.place, blocks.first, blocks.end, blocks.q_lo, blocks.q_hi, blocks.limit
