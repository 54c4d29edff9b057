"""Which pages each block of new tokens reads, cut into splits: the tables of the kernels, for one rank and mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from cpflex.mods.intervals import EMPTY, FULL
from cpflex.paging.mask import TracedMask
from cpflex.paging.pages import Held

BLOCK = 64
"""The most tokens of a block: what they see of the pages is found for all of them at once."""

GROUP = 64
"""Pages that are looked at together first."""


@dataclass(frozen=True)
class Blocks:
    """New tokens of one sequence that follow one another, int64 [blocks] each, and what they may see while a plan
    lasts.
    """

    place: np.ndarray  # of the sequence
    first: np.ndarray  # token, of all sequences packed
    end: np.ndarray
    q_lo: np.ndarray  # positions that they have while the plan lasts
    q_hi: np.ndarray
    limit: np.ndarray  # tokens of the sequence at the end of the plan

    def at(self, chosen: np.ndarray) -> Blocks:
        """Those at some indices."""
        return Blocks(*(x[chosen] for x in (self.place, self.first, self.end, self.q_lo, self.q_hi, self.limit)))


def blocks_of(
    starts: Sequence[int], new: Sequence[int], limits: Sequence[int], bounds: Sequence[int] | None = None
) -> Blocks:
    """
    Args:
        starts: tokens that each sequence keeps; ``new``: of each step; ``limits``: what it keeps in the end at most.
        bounds: tokens, of all packed, at which a block must begin, too.
    """
    rows, token = [], 0
    for place, (start, count, limit) in enumerate(zip(starts, new, limits, strict=True)):
        last_step = start + ((limit - start) // count - 1) * count
        firsts = {*range(0, count, BLOCK), *(bound - token for bound in bounds or () if token < bound < token + count)}
        for first, end in pairwise([*sorted(firsts), count]):
            rows.append((place, token + first, token + end, start + first, last_step + end - 1, limit))
        token += count
    return Blocks(*np.array(rows, np.int64).T)


class Kept(NamedTuple):
    """The pages that each block may see, on all ranks, by block and page."""

    block: np.ndarray
    page: np.ndarray
    owner: np.ndarray
    slot: np.ndarray


def kept_pages(
    mask: TracedMask, blocks: Blocks, helds: Sequence[Held], page_size: int, names: Sequence[object]
) -> Kept:
    """Those that are not proven EMPTY, of all sequences at once.

    Raises:
        ValueError: one of them was evicted, and nothing proves that this mask hides it.
    """
    counts = -(-blocks.limit // page_size)
    block, page = _seen(mask, blocks, counts, page_size)
    if len(counts) == 1:
        held, at = helds[0], slice(0, len(page)) if len(page) == counts[0] else page
        owner, slot = held.owner[at], held.slot[at]
    else:
        tables = [(helds[one], count) for one, count in zip(blocks.place.tolist(), counts.tolist(), strict=True)]
        at = (np.cumsum(counts) - counts)[block] + page
        owner = np.concatenate([held.owner[:count] for held, count in tables])[at]
        slot = np.concatenate([held.slot[:count] for held, count in tables])[at]
    if (gone := slot < 0).any():
        _require_hidden(mask, blocks, helds, block[gone], page[gone], page_size, names)
        block, page, owner, slot = (x[~gone] for x in (block, page, owner, slot))
    return Kept(block, page, owner, slot)


def _seen(mask: TracedMask, blocks: Blocks, counts: np.ndarray, page_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Block and page of what is not EMPTY, in that order; pages are looked at where a group of them is PARTIAL."""

    def verdicts(block: np.ndarray, first: np.ndarray, length: int) -> np.ndarray:
        one = slice(None) if len(counts) == 1 else block  # of one block, numbers broadcast
        place, q_lo, q_hi, limit = (x[one] for x in (blocks.place, blocks.q_lo, blocks.q_hi, blocks.limit))
        last = np.minimum(first + length, limit) - 1
        return mask.classify(q_lo, q_hi, first, last, b=(place, place))

    groups = -(-counts // GROUP)
    block = np.repeat(np.arange(len(counts)), groups)
    group = np.arange(len(block)) - np.repeat(np.cumsum(groups) - groups, groups)
    found = verdicts(block, group * (GROUP * page_size), GROUP * page_size)
    seen = np.flatnonzero(found != EMPTY)
    block, group, found = block[seen], group[seen], found[seen]
    page = group[:, None] * GROUP + np.arange(GROUP)
    kept = page < counts[block][:, None]
    mixed = kept & (found != FULL)[:, None]
    each = np.repeat(block, mixed.sum(axis=1))
    kept[mixed] = verdicts(each, page[mixed] * page_size, page_size) != EMPTY
    return np.repeat(block, kept.sum(axis=1)), page[kept]


def _require_hidden(
    mask: TracedMask,
    blocks: Blocks,
    helds: Sequence[Held],
    block: np.ndarray,
    page: np.ndarray,
    page_size: int,
    names: Sequence[object],
) -> None:
    for one in np.unique(block).tolist():
        place, start = int(blocks.place[one]), int(blocks.q_lo[one])
        pages = page[block == one]
        hidden = helds[place].evidence.hides(mask.key(place), start, pages)
        if not hidden.all():
            position = int(pages[~hidden][0]) * page_size
            raise ValueError(
                f"mask {mask.__name__!r} may see the keys from position {position} on of sequence {names[place]!r}, "
                "whose page was evicted; evict with all masks that are used, and crop to no position before it"
            )


class Tables(NamedTuple):
    """As `PageWork` and `combine` take them, int32."""

    items: np.ndarray  # [I, 6]
    runs: np.ndarray  # [M, 3]
    parts: np.ndarray  # [N, 3]
    num_partials: int
    is_idle: bool
    """No page of this rank is read."""
    is_whole: bool
    """Each token has one partial, in its own row."""
    tokens: np.ndarray | None = None
    """Of all packed, those that the blocks are of; all if None."""


def tables_of(kept: Kept, blocks: Blocks, rank: int, page_size: int, splits: int) -> Tables:
    """
    Args:
        splits: items that are wanted at least, if there are as many pages.
    """
    is_mine = kept.owner == rank
    mine = slice(None) if is_mine.all() else np.flatnonzero(is_mine)
    block, page, slot = kept.block[mine], kept.page[mine], kept.slot[mine].astype(np.int64)
    counts = np.bincount(block, minlength=len(blocks.place))
    length = max(-(-len(page) // splits), -(-BLOCK // page_size), 1)  # a kernel takes 64 rows at once
    num_splits = np.maximum(1, -(-counts // length))
    item_of_block = np.cumsum(num_splits) - num_splits
    item = item_of_block[block] + (np.arange(len(block)) - (np.cumsum(counts) - counts)[block]) // length
    joined = np.zeros(len(block), bool)
    joined[1:] = (np.diff(item) == 0) & (np.diff(slot) == 1) & (np.diff(page) == 1)
    begins = np.flatnonzero(~joined)
    ends = np.append(begins[1:], len(block))[: len(begins)] - 1
    runs = np.stack([slot[begins] * page_size, (slot[ends] + 1) * page_size, page[begins] * page_size], axis=1)
    items, num_partials = _items(blocks, num_splits, item[begins])
    return Tables(
        items, runs if len(runs) else np.zeros((1, 3), np.int64), _parts(blocks, num_splits),
        num_partials, not len(page), bool((num_splits == 1).all()),
    )  # fmt: skip


def _items(blocks: Blocks, num_splits: np.ndarray, item_of_run: np.ndarray) -> tuple[np.ndarray, int]:
    block = np.repeat(np.arange(len(num_splits)), num_splits)
    tokens = (blocks.end - blocks.first)[block]
    first_partial = np.cumsum(tokens) - tokens
    bounds = np.searchsorted(item_of_run, np.arange(len(block) + 1))
    columns = (blocks.place[block], blocks.first[block], blocks.end[block], bounds[:-1], bounds[1:], first_partial)
    return np.stack(columns, axis=1), int(tokens.sum())


def _parts(blocks: Blocks, num_splits: np.ndarray) -> np.ndarray:
    tokens = blocks.end - blocks.first
    first_row = np.cumsum(num_splits * tokens) - num_splits * tokens
    block = np.repeat(np.arange(len(tokens)), tokens)
    offset = np.arange(len(block)) - blocks.first[block]
    return np.stack([first_row[block] + offset, tokens[block], num_splits[block]], axis=1)
