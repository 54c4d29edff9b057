"""Pages: which rank keeps which tokens of which sequence. Bookkeeping alone: no tensors, no messages.

Every rank makes the same calls and so knows all ranks' free pages: that one of them has none left is known to all.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from cpflex.links.processes import Group, links_of
from cpflex.links.protocol import Links
from cpflex.masks import MaskFn, is_count
from cpflex.paging.evidence import Evidence, seen_from_on
from cpflex.paging.mask import traced_masks

if TYPE_CHECKING:
    from cpflex.paging.pool import PagePool

LONGEST = 2**31 - 1
"""Positions are int32."""


class OutOfPages(RuntimeError):
    """A rank has fewer free pages than were asked of it; nothing was changed. Raised on every rank."""


class Held:
    """One sequence: page p of it is page ``slot[p]`` of the pool of rank ``owner[p]``."""

    def __init__(self, number: int, turn: int) -> None:
        self.number = number
        """Sequences are counted as they begin."""
        self.turn = turn
        """Page p lies on rank (p + turn) % world_size, if nothing else was said."""
        self.length = 0
        """Tokens that are kept."""
        self.owner = np.zeros(0, np.int32)
        self.slot = np.zeros(0, np.int32)
        """-1 for a page that was evicted."""
        self.version = 0
        """How often it was cropped."""
        self.planned_from: int | None = None
        """First position that the newest plan computes."""
        self.newest_plan = 0
        """Its number."""
        self.read = np.zeros(0, bool)
        """The pages that it reads."""
        self.num_evictions = 0
        self.evidence = Evidence()
        """That evicted pages are not missed."""

    def child(self, number: int) -> Held:
        made = Held(number, self.turn)
        made.length, made.owner, made.slot = self.length, self.owner.copy(), self.slot.copy()
        made.evidence, made.num_evictions = self.evidence.copy(), self.num_evictions
        return made


class Pages:
    """Pages of ``page_size`` tokens, ``num_pages`` of them on every rank, and the sequences that they keep.

    All ranks must make the same calls in the same order; plans made of them know if they did not. Every method either
    does all of what it says or raises and does nothing.

    >>> pages = cpflex.Pages(4096, page_size=64, group=mesh["cp"])
    >>> pages.reserve("chat 7", 1000)
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int = 64,
        group: Group | None = None,
        *,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        """
        Args:
            num_pages: of each rank, in each of its pools.
            group: the ranks that share the pages, or None for one; ``rank`` and ``world_size`` instead, to look at
                what any rank of any job would do.

        Raises:
            ValueError: counts below 1, pools of 2**31 rows, a rank without its group's size.
        """
        for name, count in (("num_pages", num_pages), ("page_size", page_size)):
            if not is_count(count, 1):
                raise ValueError(f"{name} must be an integer of at least 1; got {count!r}")
        if num_pages * page_size >= 2**31:
            raise ValueError(f"a pool must have fewer than 2**31 rows; got {num_pages} pages of {page_size} tokens")
        self.links, self.rank, self.world_size = _membership(group, rank, world_size)
        self.num_pages, self.page_size = num_pages, page_size
        self.epoch = 0
        """Rises with what may take a page from a plan."""
        self.num_plans = 0
        self.pools: WeakValueDictionary[int, PagePool] = WeakValueDictionary()
        """By the id of their keys."""
        self.shapes: dict[tuple[int, int, int, int], None] = {}
        """Heads, head dims of keys and of values, and bytes of a number, of all pools so far."""
        self._held: dict[Hashable, Held] = {}
        self._free = [list(range(num_pages)) for _ in range(self.world_size)]  # heaps: low slots first, in long runs
        self._uses = np.zeros((self.world_size, num_pages), np.int32)
        self._num_begun = 0
        self._history = "none"
        self._num_calls = 0

    # -- what is kept

    @property
    def sequences(self) -> tuple[Hashable, ...]:
        """Those that are kept, in the order they were begun."""
        return tuple(self._held)

    def __contains__(self, seq: Hashable) -> bool:
        return seq in self._held

    def length(self, seq: Hashable) -> int:
        """Tokens that are kept of a sequence."""
        return self.held(seq).length

    def capacity(self, seq: Hashable) -> int:
        """Tokens for which a sequence has pages, those that are kept included."""
        return len(self.held(seq).slot) * self.page_size

    @property
    def num_free(self) -> tuple[int, ...]:
        """Free pages of every rank."""
        return tuple(map(len, self._free))

    @property
    def history(self) -> str:
        """All calls so far, in a word: equal on two ranks that made the same."""
        return f"{self._num_calls} calls, {self._history}"

    def num_holders(self, owner: np.ndarray, slot: np.ndarray) -> np.ndarray:
        """Sequences that hold each of these pages."""
        return self._uses[owner, slot]

    def held(self, seq: Hashable) -> Held:
        """What is known of a sequence."""
        if seq not in self._held:
            raise ValueError(f"sequence {seq!r} holds no pages; begin it with pages.reserve or pages.fork")
        return self._held[seq]

    # -- what changes it

    def reserve(self, seq: Hashable, num_tokens: int, owners: Sequence[int] | None = None) -> None:
        """Let a sequence have pages for ``num_tokens`` more than it keeps; begin it if it is new.

        Args:
            owners: the rank of each page that it lacks, for instance of the ranks that have computed its keys; they
                take turns if None.

        Raises:
            OutOfPages: naming the rank.
            ValueError: not a count, ``owners`` of other pages or ranks, 2**31 tokens.
        """
        if not is_count(num_tokens, 0):
            raise ValueError(f"num_tokens must be an integer of at least 0; got {num_tokens!r}")
        held = self._held.get(seq) or Held(self._num_begun, self._num_begun % self.world_size)
        if held.length + num_tokens >= LONGEST:
            raise ValueError(f"a sequence must be shorter than 2**31 - 1 tokens; got {held.length} + {num_tokens}")
        first = len(held.slot)
        lacking = max(0, -(-(held.length + num_tokens) // self.page_size) - first)
        owner = (np.arange(first, first + lacking) + held.turn) % self.world_size
        if owners is not None:
            owner = self._given(owners, lacking)
        slot = self._taken(owner, f"{num_tokens} tokens of sequence {seq!r}")
        if seq not in self._held:
            self._held[seq] = held
            self._num_begun += 1
        held.owner = np.append(held.owner, owner.astype(np.int32))
        held.slot = np.append(held.slot, slot)
        held.evidence.grow(lacking)
        self.note("reserve", held.number, num_tokens, owner.tolist() if owners is not None else None)

    def fill(self, seq: Hashable, num_tokens: int) -> None:
        """Count ``num_tokens`` more as kept: what was stored in the pools. `DecodePlan.advance` does it for a step.

        Raises:
            ValueError: more than is reserved.
        """
        held = self.held(seq)
        if not is_count(num_tokens, 0) or held.length + num_tokens > self.capacity(seq):
            raise ValueError(
                f"sequence {seq!r} keeps {held.length} tokens and has pages for {self.capacity(seq)}; got "
                f"{num_tokens!r} more - reserve them first"
            )
        held.length += num_tokens
        self.note("fill", held.number, num_tokens)

    def fork(self, parent: Hashable, child: Hashable) -> None:
        """Begin ``child`` with all that ``parent`` keeps: whole pages are shared, the last one, if it is not full, is
        copied in every pool.

        Raises:
            OutOfPages: no page for the copy; naming the rank.
            ValueError: no such parent, or the child is there already.
        """
        held = self.held(parent)
        if child in self._held:
            raise ValueError(f"sequence {child!r} holds pages already; erase it first")
        made = held.child(self._num_begun)
        kept = -(-held.length // self.page_size)
        made.owner, made.slot = made.owner[:kept], made.slot[:kept]
        made.evidence.cut(kept)
        whole = held.length // self.page_size
        if held.length % self.page_size:
            self._copy_last(made, child)
        there = np.flatnonzero(made.slot[:whole] >= 0)
        self._uses[made.owner[there], made.slot[there]] += 1
        self._held[child] = made
        self._num_begun += 1
        self.note("fork", held.number)

    def crop(self, seq: Hashable, length: int) -> None:
        """Forget the tokens from ``length`` on, and give back the pages that are then empty, reserved ones too. Plans
        made before are refused.

        Raises:
            OutOfPages: the page that is cut is shared with another sequence, and there is none for a copy.
            ValueError: longer than what is kept.
        """
        held = self.held(seq)
        if not is_count(length, 0) or length > held.length:
            raise ValueError(f"sequence {seq!r} keeps {held.length} tokens; it cannot be cropped to {length!r}")
        made = held.child(held.number)
        kept = -(-length // self.page_size)
        made.length, made.owner, made.slot = length, made.owner[:kept], made.slot[:kept]
        made.evidence.cut(kept)
        made.version = held.version + 1
        if length % self.page_size:
            last = int(made.owner[-1]), int(made.slot[-1])
            if last[1] < 0:
                raise ValueError(
                    f"sequence {seq!r} cannot be cropped to {length}: the page of its last token was evicted"
                )
            if self._uses[last] > 1:
                self._copy_last(made, seq)
                self._uses[last] -= 1
        self._give_back(held.owner[kept:], held.slot[kept:])
        self._held[seq] = made
        self.epoch += 1
        self.note("crop", held.number, length)

    def erase(self, seq: Hashable) -> None:
        """Forget a sequence and give back its pages; those that it shares stay with the others."""
        held = self.held(seq)
        self._give_back(held.owner, held.slot)
        del self._held[seq]
        self.epoch += 1
        self.note("erase", held.number)

    def evict(
        self,
        mask: MaskFn | Mapping[str, MaskFn],
        seqs: Sequence[Hashable] | None = None,
        num_heads: int | None = None,
    ) -> int:
        """Give back the pages that no later query sees, as is proven by intervals; how many. Later plans are refused
        if their mask may see them after all.

        A page goes when the newest plan of its sequence does not read it, so that plans outlive it.

        Args:
            mask: or one for each kind of layer; a page goes if all hide it.
            seqs: the sequences, in the order in which plans name them, if a mask depends on ``b``; all if None.
            num_heads: if a mask depends on ``h``.
        """
        mods = traced_masks(mask, num_heads)
        if seqs is None and any(mod.mod.uses("b") for mod in mods.values()):
            raise ValueError("this mask depends on b, the place of a sequence in a plan; pass seqs= in that order")
        freed, looked_at = 0, 0
        for place, seq in enumerate(self._held if seqs is None else seqs):
            held = self.held(seq)
            start = held.length if held.planned_from is None else min(held.planned_from, held.length)
            keys = frozenset(mod.key(place) for mod in mods.values())
            if held.evidence.is_known(keys, start):
                continue
            looked_at += 1
            full = start // self.page_size  # what is not full is written to
            pages = np.flatnonzero(held.slot[:full] >= 0)
            pages = pages[~held.read[pages]] if len(held.read) else pages
            seen = np.any([seen_from_on(mod, place, start, pages, self.page_size) for mod in mods.values()], axis=0)
            gone = pages[~seen]
            self._give_back(held.owner[gone], held.slot[gone])
            held.slot[gone] = -1
            held.evidence.add(keys, start, gone)
            held.num_evictions += len(gone) > 0
            freed += len(gone)
        if freed:
            self.epoch += 1
        if looked_at:
            self.note("evict", looked_at, freed)
        return freed

    def pool(
        self,
        num_kv_heads: int,
        head_dim: int,
        v_head_dim: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | int = "cpu",
    ) -> PagePool:
        """Memory for the keys and values of one layer, of all this rank's pages: `PagePool`."""
        from cpflex.paging.pool import PagePool

        made = PagePool(self, num_kv_heads, head_dim, head_dim if v_head_dim is None else v_head_dim, dtype, device)
        self.pools[id(made.k)] = made
        self.shapes[num_kv_heads, head_dim, made.v.shape[3], dtype.itemsize] = None
        return made

    def pool_of(self, k: Tensor, v: Tensor) -> PagePool | None:
        """The pool that these are the memory of."""
        found = self.pools.get(id(k))
        return found if found is not None and found.k is k and found.v is v else None

    # -- inside

    def _given(self, owners: Sequence[int], lacking: int) -> np.ndarray:
        if len(owners) != lacking or not all(is_count(one, 0) and one < self.world_size for one in owners):
            raise ValueError(
                f"owners must name a rank below {self.world_size} for each of the {lacking} pages that are lacking; "
                f"got {list(owners)[:8]}{' ...' if len(owners) > 8 else ''} ({len(owners)})"
            )
        return np.asarray(owners, dtype=np.int64)

    def _taken(self, owner: np.ndarray, what: str) -> np.ndarray:
        """A free page of each of these ranks."""
        wanted = np.bincount(owner, minlength=self.world_size)
        for rank, free in enumerate(self._free):
            if wanted[rank] > len(free):
                raise OutOfPages(
                    f"rank {rank} is out of pages: {what} need {wanted[rank]} of its {self.num_pages}, and {len(free)} "
                    "are free; erase, crop or evict sequences, or make more pages"
                )
        slot = np.empty(len(owner), np.int32)
        for rank in np.flatnonzero(wanted).tolist():
            free = self._free[rank]
            slot[owner == rank] = [heapq.heappop(free) for _ in range(int(wanted[rank]))]
        self._uses[owner, slot] += 1
        return slot

    def _give_back(self, owner: np.ndarray, slot: np.ndarray) -> None:
        there = slot >= 0
        owner, slot = owner[there], slot[there]
        self._uses[owner, slot] -= 1  # a sequence has a page once
        for rank, page in zip(owner.tolist(), slot.tolist(), strict=True):
            if self._uses[rank, page] == 0:
                heapq.heappush(self._free[rank], page)

    def _copy_last(self, made: Held, seq: Hashable) -> None:
        """Give a table a copy of its last page, which others hold, too: it is written to."""
        owner, slot = int(made.owner[-1]), int(made.slot[-1])
        made.slot[-1] = self._taken(made.owner[-1:], f"a copy of the last page of sequence {seq!r}")[0]
        if owner == self.rank:
            for pool in self.pools.values():
                pool.copy_page(slot, int(made.slot[-1]))

    def note(self, *call: Any) -> None:
        """Count a call, of a plan too, among those that all ranks must make."""
        said = hashlib.blake2b(f"{self._history} {call}".encode(), digest_size=8)
        self._history, self._num_calls = said.hexdigest(), self._num_calls + 1

    def __repr__(self) -> str:
        free = ", ".join(map(str, self.num_free))
        return (
            f"Pages({len(self._held)} sequences; {self.num_pages} pages of {self.page_size} tokens on each of "
            f"{self.world_size} ranks, free: {free})"
        )


def _membership(group: Group | None, rank: int | None, world_size: int | None) -> tuple[Links | None, int, int]:
    if group is not None:
        if rank is not None or world_size is not None:
            raise ValueError("pass either a group, or rank and world_size; the group knows both")
        links = links_of(group)
        return links, links.rank, links.world_size
    if rank is None and world_size is None:
        return None, 0, 1
    if not (is_count(rank, 0) and is_count(world_size, 1) and rank < world_size):  # type: ignore[operator]
        raise ValueError(f"rank must be from 0 to world_size - 1; got rank={rank!r}, world_size={world_size!r}")
    return None, rank, world_size  # type: ignore[return-value]
