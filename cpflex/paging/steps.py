"""Steps: how far a decode plan has come, and where its new tokens lie."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpflex.paging.arena import Arena
from cpflex.paging.mask import TracedMask
from cpflex.paging.pages import Held, Pages
from cpflex.paging.rows import Rows
from cpflex.paging.tables import Tables
from cpflex.paging.traffic import Traffic
from cpflex.topology import Heads, Topology


class Steps:
    """What the mask kinds of a decode plan share: the sequences, the step that is next, and its tables."""

    def __init__(
        self,
        pages: Pages,
        counts: Mapping[Hashable, int],
        helds: Sequence[Held],
        limits: Sequence[int],
        rows: Rows,
        masks: Mapping[str, TracedMask],
        tables: Mapping[str, Tables],
        traffic: Mapping[str, Traffic],
        arena: Arena,
        facts: dict[str, Any],
    ) -> None:
        self.pages, self.rows, self.masks = pages, rows, masks
        self.tables, self.traffic, self.arena, self.facts = tables, traffic, arena, facts
        self.sequences, self.new, self.limits = tuple(counts), tuple(counts.values()), tuple(limits)
        self.fingerprint = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
        self.number = pages.num_plans
        self.over = ""
        self.num_done = 0
        self.num_steps = min(
            (limit - one.length) // count for one, limit, count in zip(helds, limits, self.new, strict=True)
        )
        self.num_calls = 0
        """Attentions so far."""
        self.tokens_hash = 0
        self.kinds_of_calls: dict[Any, Any] = {}
        """That were made, as `together` compares them."""
        self.first_messages: Any = None
        """Bytes of those that began with a header: sent and received, by rank."""
        self.shapes: Sequence[Heads] = ()
        """Of the attentions whose bytes were counted, one layer of each."""
        self.topology: Topology | None = None
        self.made: dict[Any, Any] = {}
        """What the first attention of a kind made for the next ones."""
        self.made_for_step: dict[Any, Any] = {}
        """The same, of this step."""
        self._helds = list(helds)
        self._versions = [(one.version, one.num_evictions) for one in helds]
        self._epoch = pages.epoch
        self.counts_of_new = np.array(self.new, np.int64)
        self.lengths = np.array([one.length for one in helds], np.int64)
        """Tokens that each sequence keeps, without those of this step."""
        self.place = np.repeat(np.arange(len(self.new)), self.counts_of_new)
        """Of each new token: its sequence."""
        begins = np.cumsum(self.counts_of_new) - self.counts_of_new
        self._offset = np.arange(self.num_tokens) - begins[self.place]
        self._brought: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._place_all()
        self._begin_step()

    @property
    def num_tokens(self) -> int:
        """New tokens of a step, on all ranks."""
        return len(self.place)

    @property
    def first(self) -> int:
        """Of this rank's tokens, among all."""
        return sum(self.counts[: self.pages.rank]) if self.rows.counts is not None else 0

    @property
    def end(self) -> int:
        return self.first + (self.counts[self.pages.rank] if self.rows.counts is not None else self.num_tokens)

    @property
    def counts(self) -> list[int]:
        """Tokens that each rank has."""
        return [self.num_tokens] * self.pages.world_size if self.rows.counts is None else list(self.rows.counts)

    def token_range(self, seq: Hashable) -> tuple[int, int]:
        """First and end of a sequence's new tokens, among all."""
        place = self.sequences.index(seq)
        begin = sum(self.new[:place])
        return begin, begin + self.new[place]

    def sequences_between(self, first: int, end: int) -> tuple[Hashable, ...]:
        """Those of new tokens ``first`` to ``end - 1`` among all."""
        return tuple(self.sequences[place] for place in np.unique(self.place[first:end]).tolist())

    def why_over(self) -> str:
        """Why no step is left; empty if one is."""
        if self.over:
            return self.over
        if self._epoch != self.pages.epoch:
            for seq, held, version in zip(self.sequences, self._helds, self._versions, strict=True):
                if seq not in self.pages or self.pages.held(seq) is not held:
                    self.over = f"sequence {seq!r} was cropped or erased since it was made"
                elif version[1] != held.num_evictions and held.newest_plan != self.number:
                    self.over = f"pages of sequence {seq!r} were evicted, of which a newer plan was made"
                if self.over:
                    return self.over
            self._epoch = self.pages.epoch
        for seq, held, length in zip(self.sequences, self._helds, self.lengths.tolist(), strict=True):
            if held.length != length:
                return f"sequence {seq!r} keeps {held.length} tokens, and this step begins at {length}"
        if self.num_done >= self.num_steps:
            return f"its {self.num_steps} steps are done"
        return ""

    def advance(self) -> None:
        if why := self.why_over():
            raise RuntimeError(f"this decode plan is over: {why}; make another with cpflex.make_decode_plan")
        for held, count in zip(self._helds, self.new, strict=True):
            held.length += count
        self.lengths += self.counts_of_new
        self.num_done += 1
        self.tokens_hash = 0
        self.pages.note("advance", self.number)
        if self.num_done < self.num_steps:
            self._begin_step()

    def say_tokens(self, numbers: Sequence[int]) -> None:
        digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
        self.tokens_hash = int.from_bytes(digest, "big") >> 1 | 1

    def written(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The tokens whose keys this rank keeps, and the rows of its pools, int64."""
        if device not in self._brought:
            self._brought[device] = tuple(torch.from_numpy(x).to(device) for x in self._written)  # type: ignore[assignment]
        return self._brought[device]

    def _place_all(self) -> None:
        """Of all steps, [steps, tokens]: positions, and the rank that keeps a token's keys, and in which row."""
        size, place = self.pages.page_size, self.place
        first_page = self.lengths // size
        width = int((-(-np.array(self.limits) // size) - first_page).max())
        owners, slots = np.full((2, len(self.new), width), -1, np.int64)
        for one, held in enumerate(self._helds):  # the pages that new tokens come to lie in
            begin, end = int(first_page[one]), -(-self.limits[one] // size)
            owners[one, : end - begin] = held.owner[begin:end]
            slots[one, : end - begin] = held.slot[begin:end]
            assert (held.slot[begin:end] >= 0).all(), "pages that are written are reserved"
        steps = np.arange(self.num_steps)[:, None]
        self._positions = (self.lengths[place] + self._offset) + steps * self.counts_of_new[place]
        page = self._positions // size - first_page[place]
        self._owners = owners[place, page]
        self._rows = slots[place, page] * size + self._positions % size
        self._q_positions = self.arena.table("q_positions")[: self.num_tokens, 0]
        self._kv_len = self.arena.table("kv_len")[: len(self.new), 0]

    def _begin_step(self) -> None:
        """Positions of this step's tokens, lengths with them, and the rows that this rank writes."""
        self.positions = self._positions[self.num_done]
        self.owner, self.row = self._owners[self.num_done], self._rows[self.num_done]
        mine = np.flatnonzero(self.owner == self.pages.rank)
        self._written = mine, self.row[mine]
        self._brought = {}
        self.made_for_step = {}
        self._q_positions[:], self._kv_len[:] = self.positions, self.lengths + self.counts_of_new
        self.arena.renew(moving=self.num_done > 0)
