"""make_decode_plan: what some steps of new tokens read and write, decided once for all of them and all layers."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpflex.kernels import PageWork
from cpflex.masks import MaskFn, is_count
from cpflex.paging.arena import Arena
from cpflex.paging.mask import TracedMask, require_tables, traced_masks
from cpflex.paging.pages import Pages
from cpflex.paging.rows import Rows, RowsFn, everyone
from cpflex.paging.steps import Steps
from cpflex.paging.tables import BLOCK, Tables, blocks_of, kept_pages, tables_of
from cpflex.version import __version__


class DecodePlan:
    """Which rows every step reads and writes, for one rank; `flex_attention` takes it where a plan goes.

    It serves as many steps of the same numbers of new tokens as `fits` says; `advance` goes on to the next.
    """

    def __init__(self, steps: Steps, kind: str | None) -> None:
        self.steps = steps
        """What all mask kinds share."""
        self.kind = kind

    def __getitem__(self, kind: str) -> DecodePlan:
        """The plan of one mask kind."""
        if kind not in self.steps.masks:
            raise KeyError(f"the plan has mask kinds {sorted(self.steps.masks)}; got {kind!r}")
        return DecodePlan(self.steps, kind)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Mask kinds."""
        return tuple(self.steps.masks)

    @property
    def pages(self) -> Pages:
        """The pages that it was made of."""
        return self.steps.pages

    @property
    def sequences(self) -> tuple[Hashable, ...]:
        """Those of which this rank has new tokens, in the order in which they are packed."""
        steps = self.steps
        return steps.sequences if steps.rows.counts is None else steps.sequences_between(steps.first, steps.end)

    @property
    def num_tokens(self) -> int:
        """New tokens that this rank has, N."""
        return self.steps.end - self.steps.first

    @property
    def q_positions(self) -> Tensor:
        """Positions of this rank's new tokens in their sequences, int64 [N], on the CPU."""
        steps = self.steps
        return torch.from_numpy(steps.positions[steps.first : steps.end].copy())

    def rows_of(self, seq: Hashable) -> slice:
        """Where a sequence's new tokens lie among those of this rank; `by_token`, as many of them as it has."""
        steps = self.steps
        if seq not in self.sequences:
            raise ValueError(f"rank {steps.pages.rank} has new tokens of {list(self.sequences)}; got {seq!r}")
        begin, end = steps.token_range(seq)
        return slice(max(begin, steps.first) - steps.first, min(end, steps.end) - steps.first)

    def last_row(self, seq: Hashable) -> int:
        """The row of a sequence's last new token, from which the next is sampled.

        Raises:
            ValueError: another rank has it.
        """
        rows, steps = self.rows_of(seq), self.steps
        if steps.first + rows.stop != steps.token_range(seq)[1]:
            raise ValueError(f"rank {steps.pages.rank} does not have the last new token of {seq!r}; a later rank does")
        return rows.stop - 1

    def fits(self, new: Mapping[Hashable, Any]) -> bool:
        """Whether the plan serves a step of these new tokens, given as in `make_decode_plan`."""
        counts = counts_of(new)
        return tuple(counts) == self.steps.sequences and tuple(counts.values()) == self.steps.new and not self.why_over

    @property
    def why_over(self) -> str:
        """Why no step is left; empty if one is."""
        return self.steps.why_over()

    def advance(self) -> None:
        """Count this step's tokens as kept, and go on to the next. Once a step, whatever the number of mask kinds.

        Raises:
            RuntimeError: there was no step left to be done.
        """
        self.steps.advance()

    def require_same(self, tokens: Tensor | Sequence[int]) -> None:
        """Let the ranks compare this step's new tokens: a hash of them goes with the messages of the step's attentions.
        One that has sampled another token raises RankMismatch there, on every rank.
        """
        if self.steps.rows.counts is not None:
            raise ValueError(f"tokens of {self.steps.rows.name} are not the same on every rank; compare none")
        numbers = tokens.detach().reshape(-1).tolist() if isinstance(tokens, Tensor) else list(tokens)
        self.steps.say_tokens(numbers)

    def refuse(self, error: Exception) -> None:
        """Make the other ranks' next attention on this plan raise too, before this one raises ``error``."""
        from cpflex.paging.together import refuse

        refuse(self.steps, error)

    # -- for the pool and the step

    @property
    def mask(self) -> TracedMask:
        return self.steps.masks[self.one_kind]

    @property
    def tables(self) -> Tables:
        return self.steps.tables[self.one_kind]

    @property
    def one_kind(self) -> str:
        """The mask kind that it is of.

        Raises:
            ValueError: of several.
        """
        if self.kind is not None:
            return self.kind
        if len(self.steps.masks) > 1:
            raise ValueError(f"the plan has mask kinds {sorted(self.steps.masks)}; pass one of them, plan[kind]")
        return next(iter(self.steps.masks))

    @property
    def moment(self) -> tuple[int, int]:
        """This step, of all plans of the pages."""
        return self.steps.number, self.steps.num_done

    def all_at_hand(self, num_heads: int, pool_heads: int) -> bool:
        """Whether keys of so many heads are those of all tokens."""
        return (self.steps.rows.counts is None and num_heads == pool_heads) or self.steps.pages.world_size == 1

    def written(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The new tokens whose keys this rank keeps, of all packed, and their rows of the pool, int64 both."""
        return self.steps.written(device)

    def work(self, device: torch.device) -> PageWork:
        """What the kernels of this rank compute, on a device."""
        asked = "work", self.one_kind, device
        if asked not in self.steps.made:
            self.steps.made[asked] = self._work(device)
        return self.steps.made[asked]

    def _work(self, device: torch.device) -> PageWork:
        steps, kind, tables = self.steps, self.one_kind, self.tables
        whole = device.type != "cpu"  # there a launch of one size serves the next plan, too
        items, runs = (steps.arena.on(device, f"{name} of {kind}") for name in ("items", "runs"))
        if not whole:
            items, runs = items[: len(tables.items)], runs[: len(tables.runs)]
        positions = steps.arena.on(device, "q_positions")[: steps.num_tokens, 0]
        lengths = steps.arena.on(device, "kv_len")[: len(steps.new), 0]
        return PageWork(items, runs, positions, lengths, min(BLOCK, max(steps.new)), tables.num_partials)

    def parts(self, device: torch.device) -> Tensor:
        """The partials of each token, int32 [N, 3]."""
        return self.steps.arena.on(device, f"parts of {self.one_kind}")[: self.steps.num_tokens]

    def __repr__(self) -> str:
        steps = self.steps
        return (
            f"DecodePlan({', '.join(steps.masks)}; {steps.num_tokens} new tokens of {len(steps.new)} sequences, "
            f"{steps.rows.name}, rank {steps.pages.rank} of {steps.pages.world_size}, step {steps.num_done} of "
            f"{steps.num_steps})"
        )


@torch.inference_mode(False)
def make_decode_plan(
    mask: MaskFn | Mapping[str, MaskFn],
    pages: Pages,
    new: Mapping[Hashable, Any],
    horizon: int = 64,
    rows: RowsFn = everyone,
    into: DecodePlan | None = None,
    *,
    num_heads: int | None = None,
    splits: int | None = None,
) -> DecodePlan:
    """Decide what the next steps read and write. Pure: never communicates.

    Args:
        mask: a mask_mod, or one for each kind of layer. ``b`` is the place of a sequence in ``new``, positions count
            its own tokens. `mask_mod` traces it once for many plans.
        new: of each sequence, in the order in which they are packed, how many new tokens a step has, or the tokens
            themselves: one for decoding, some for a speculation, many for a chunk of a prompt, all in one call.
        horizon: tokens of each sequence that the plan lasts for, if so many are reserved; a step at least.
        rows: `everyone`, `by_sequence`, `by_token` or `by_head`: who has which queries, and gets their results.
        into: a plan that is over, whose memory is taken for this one.
        num_heads: query heads, if a mask depends on ``h``.
        splits: parts into which the pages of a rank are cut, for as many programs; what keeps the device of the pools
            busy if None.

    >>> plan = cpflex.make_decode_plan(mask, pages, {"chat 7": 1, "chat 9": 1})

    Raises:
        ValueError: a sequence that holds no pages, more tokens than are reserved, a table of a mask that is too short,
            an evicted page that the mask may see.
        UnsupportedMod: the mask is not a pointwise bool function.
    """
    masks = traced_masks(mask, num_heads)
    counts = counts_of(new)
    _check(pages, counts, horizon, rows, into, splits)
    helds = [pages.held(seq) for seq in counts]
    starts, limits = [one.length for one in helds], []
    for (seq, count), held in zip(counts.items(), helds, strict=True):
        capacity = len(held.slot) * pages.page_size
        if held.length + count > capacity:
            raise ValueError(
                f"sequence {seq!r} keeps {held.length} tokens and has pages for {capacity}; {count} new ones need "
                f"pages.reserve({seq!r}, {count}) first"
            )
        limits.append(min(held.length + max(horizon, count), capacity))
    for one in masks.values():
        require_tables(one, len(counts), max(limits))
        if one.lengths and (wrong := [pair for pair in one.lengths if min(pair) < max(limits)]):
            raise ValueError(
                f"{one!r} was made for {sorted(wrong)} (queries, keys), and the plan reaches {max(limits)}"
            )
    chosen = rows(tuple(counts.values()), pages.world_size)
    if not isinstance(chosen, Rows):
        raise TypeError(f"rows must be a function such as cpflex.everyone; got {rows!r}")
    blocks = blocks_of(starts, list(counts.values()), limits)
    kept = {kind: kept_pages(one, blocks, helds, pages.page_size, list(counts)) for kind, one in masks.items()}
    cut = _splits(pages) if splits is None else splits
    tables = {kind: tables_of(one, blocks, pages.rank, pages.page_size, cut) for kind, one in kept.items()}
    arena = _arena(tables, len(counts), sum(counts.values()), into)
    pages.num_plans += 1
    for place, held in enumerate(helds):
        read = np.zeros(len(held.slot), bool)
        for one in kept.values():
            read[one.page[blocks.place[one.block] == place] if len(helds) > 1 else one.page] = True
        held.planned_from, held.newest_plan, held.read = held.length, pages.num_plans, read
    facts = _facts(pages, counts, limits, chosen, masks)
    pages.note("plan", pages.num_plans)
    return DecodePlan(Steps(pages, counts, helds, limits, chosen, masks, tables, arena, facts), None)


def counts_of(new: Mapping[Hashable, Any]) -> dict[Hashable, int]:
    """How many new tokens each sequence has; numbers, or the tokens themselves."""
    if not isinstance(new, Mapping) or not new:
        raise ValueError(f"new must say of at least one sequence how many new tokens it has; got {new!r}")
    counts = {
        seq: one if isinstance(one, int) else one.numel() if isinstance(one, Tensor) else len(one)
        for seq, one in new.items()
    }
    for seq, count in counts.items():
        if not is_count(count, 1):
            raise ValueError(f"sequence {seq!r} must have at least 1 new token; got {count!r}")
    return counts


def _check(pages: Pages, counts: dict, horizon: int, rows: RowsFn, into: DecodePlan | None, splits: int | None) -> None:
    if not isinstance(pages, Pages):
        raise TypeError(f"pages must be cpflex.Pages; got {type(pages).__name__}")
    for name, count in (("horizon", horizon), ("splits", 1 if splits is None else splits)):
        if not is_count(count, 1):
            raise ValueError(f"{name} must be an integer of at least 1; got {count!r}")
    if not callable(rows):
        raise TypeError(f"rows must be a function such as cpflex.everyone; got {rows!r}")
    if into is not None and (not isinstance(into, DecodePlan) or into.pages is not pages):
        raise ValueError("into must be a decode plan of the same pages, that is no longer used")


def _splits(pages: Pages) -> int:
    """Items that keep the device of the pools busy: on a GPU two for each multiprocessor, with all heads of keys."""
    for pool in pages.pools.values():
        if pool.k.is_cuda:
            programs = 2 * torch.cuda.get_device_properties(pool.k.device).multi_processor_count
            return max(1, -(-programs // pool.k.shape[1]))
    return 1


def _arena(tables: Mapping[str, Tables], num_sequences: int, num_tokens: int, into: DecodePlan | None) -> Arena:
    sizes = {"q_positions": (num_tokens, 1), "kv_len": (num_sequences, 1)}
    for kind, one in tables.items():
        sizes |= {f"{name} of {kind}": getattr(one, name).shape for name in ("items", "runs", "parts")}
    arena = Arena(sizes, num_moving=2)
    if into is not None:
        into.steps.over = "its memory was given to another plan"
        if into.steps.arena.holds(sizes):
            arena = into.steps.arena
    for kind, one in tables.items():
        arena.put({f"{name} of {kind}": getattr(one, name) for name in ("items", "runs", "parts")})
    return arena


def _facts(
    pages: Pages, counts: Mapping[Hashable, int], limits: Sequence[int], rows: Rows, masks: Mapping[str, TracedMask]
) -> dict[str, Any]:
    """Equal on two ranks iff their plans belong together."""
    new = [(pages.held(seq).number, count, limit) for (seq, count), limit in zip(counts.items(), limits, strict=True)]
    digest = hashlib.blake2b(repr(new).encode(), digest_size=8).hexdigest()
    return {
        "cpflex version": __version__,
        "pages": f"{pages.num_pages} of {pages.page_size} tokens",
        "what was done to the pages": pages.history,
        "sequences and new tokens": f"{len(new)} with {sum(counts.values())} new tokens, {digest}",
        "rows": f"{rows.name} {rows.counts or ''}",
        "masks": {kind: f"{one.__name__}, graph {one.mod.key}" for kind, one in masks.items()},
        "tensors captured by the masks": [one.content_key for one in masks.values()],
    }
