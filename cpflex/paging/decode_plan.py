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
from cpflex.paging.pages import Held, Pages
from cpflex.paging.parcels import Parcels, Returns, parcels_of, returns_of
from cpflex.paging.rows import Rows, RowsFn, everyone
from cpflex.paging.steps import Steps
from cpflex.paging.tables import BLOCK, Blocks, Kept, Tables, blocks_of, kept_pages, tables_of
from cpflex.paging.traffic import AllPages, Needs, Traffic, num_waves_of, tables_of_rank, traffic_of
from cpflex.paging.travel import Costs, TravelFn, bytes_of_a_message, bytes_of_rows, cheaper
from cpflex.topology import Heads, Topology
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

    def explain(self) -> str:
        """In words, of the steps that are left: who keeps and reads what, what travels, and what the other way would
        cost.
        """
        from cpflex.seeing.explain_steps import explain

        return explain(self)

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

    @property
    def traffic(self) -> Traffic:
        """What ranks that have different tokens compute for one another, and fetch."""
        return self.steps.traffic[self.one_kind]

    def name_of(self, wave: int | None = None) -> str:
        """Of tables: over the pages that a rank keeps, or over those fetched in a wave."""
        return self.one_kind if wave is None else _name(self.one_kind, wave)

    def tables_of(self, wave: int | None = None) -> Tables:
        """Those of this rank, as `name_of` has them."""
        return self.steps.tables[self.name_of(wave)]

    def work(self, device: torch.device, wave: int | None = None) -> PageWork:
        """What the kernels of this rank compute, on a device."""
        asked, tables = ("work", self.name_of(wave), device), self.tables_of(wave)
        made = (
            self.steps.made if tables.tokens is None else self.steps.made_for_step
        )  # of some tokens, positions are copied
        if asked not in made:
            made[asked] = self._work(device, wave)
        return made[asked]

    def _work(self, device: torch.device, wave: int | None) -> PageWork:
        steps, name, tables = self.steps, self.name_of(wave), self.tables_of(wave)
        whole = device.type != "cpu"  # there a launch of one size serves the next plan, too
        items, runs = (steps.arena.on(device, f"{table} of {name}") for table in ("items", "runs"))
        if not whole:
            items, runs = items[: len(tables.items)], runs[: len(tables.runs)]
        positions = steps.arena.on(device, "q_positions")[: steps.num_tokens, 0]
        if tables.tokens is not None:
            positions = positions.index_select(0, self._tokens(device, name, tables.tokens))
        lengths = steps.arena.on(device, "kv_len")[: len(steps.new), 0]
        return PageWork(items, runs, positions, lengths, min(BLOCK, max(steps.new)), tables.num_partials)

    def _tokens(self, device: torch.device, name: str, tokens: np.ndarray) -> Tensor:
        kind = "tokens", name, device
        if kind not in self.steps.made:
            self.steps.made[kind] = torch.from_numpy(tokens).to(device)
        return self.steps.made[kind]

    def parts(self, device: torch.device, wave: int | None = None) -> Tensor:
        """The partials of each token, int32 [N, 3]."""
        return self.steps.arena.on(device, f"parts of {self.name_of(wave)}")[: len(self.tables_of(wave).parts)]

    def parcels(self, device: torch.device, *, new_ones_travel: bool) -> Parcels:
        """What this rank sends and receives in this step."""
        kind, made = ("parcels", self.one_kind, device, new_ones_travel), self.steps.made_for_step
        if kind not in made:
            made[kind] = parcels_of(self.traffic, self.steps, device, new_ones_travel=new_ones_travel)
        return made[kind]

    def returns(self, device: torch.device) -> Returns:
        """Where partials of this rank's tokens lie, and go."""
        kind, made = ("returns", self.one_kind, device), self.steps.made
        if kind not in made:
            made[kind] = returns_of(self.traffic, self.pages.rank, device)
        return made[kind]

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
    travel: TravelFn | None = None,
    heads: Heads | None = None,
    topology: Topology | None = None,
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
        num_heads: query heads, if a mask depends on ``h``, and to count what travels.
        splits: parts into which the pages of a rank are cut, for as many programs; what keeps the device of the pools
            busy if None.
        travel: where ranks have different tokens, `queries` travel to keys or `keys` to queries; what moves fewer
            bytes if None, for each sequence and mask kind.
        heads: the shape of the attention, to count those bytes; that of all pools so far if None, with ``num_heads``
            query heads, or as many for each head of keys as `Heads` has.
        topology: of the links, to weigh messages against bytes; without it, bytes alone count.

    >>> plan = cpflex.make_decode_plan(mask, pages, {"chat 7": 1, "chat 9": 1})

    Raises:
        ValueError: a sequence that holds no pages, more tokens than are reserved, a table of a mask that is too short,
            an evicted page that the mask may see.
        UnsupportedMod: the mask is not a pointwise bool function.
    """
    masks = traced_masks(mask, num_heads)
    counts = counts_of(new)
    _check(pages, counts, horizon, rows, into, splits)
    _check_travel(travel, heads, topology)
    helds = [pages.held(seq) for seq in counts]
    starts, limits = [one.length for one in helds], _limits(pages, counts, horizon)
    for one in masks.values():
        require_tables(one, len(counts), max(limits))
        if one.lengths and (wrong := [pair for pair in one.lengths if min(pair) < max(limits)]):
            raise ValueError(
                f"{one!r} was made for {sorted(wrong)} (queries, keys), and the plan reaches {max(limits)}"
            )
    chosen = _chosen(rows, travel, tuple(counts.values()), pages.world_size)
    new_tokens, is_divided = list(counts.values()), chosen.counts is not None and pages.world_size > 1
    cut = _splits(pages) if splits is None else splits
    blocks, names, size = blocks_of(starts, new_tokens, limits), list(counts), pages.page_size
    kept = {kind: kept_pages(one, blocks, helds, size, names) for kind, one in masks.items()}
    read, tables, traffic = [(blocks, one) for one in kept.values()], {}, {}
    shapes = _shapes(pages, num_heads) if heads is None else [heads]
    if is_divided:
        bounds = np.cumsum([0, *chosen.counts])  # type: ignore[misc]
        of_ranks = blocks_of(starts, new_tokens, limits, bounds.tolist())
        all_pages = AllPages.of(helds, limits, size)
        for kind, one in masks.items():
            read.append((of_ranks, kept_pages(one, of_ranks, helds, size, names)))
            needs = Needs(all_pages, bounds, (blocks, kept[kind]), read[-1])
            costs = _costs(needs, np.array(starts), np.array(new_tokens), pages, shapes, topology)
            traffic[kind] = traffic_of(
                needs, _travelling(travel, costs), np.array(new_tokens), pages.num_pages, size, costs
            )
            own, *waves = tables_of_rank(needs, traffic[kind], pages.rank, pages.num_pages, size, cut)
            tables |= {kind: own} | {_name(kind, number): wave for number, wave in enumerate(waves)}
    else:
        tables = {kind: tables_of(one, blocks, pages.rank, size, cut) for kind, one in kept.items()}
    arena = _arena(tables, len(counts), sum(new_tokens), into)
    pages.num_plans += 1
    _note_read(read, helds, pages.num_plans)
    facts = _facts(pages, counts, limits, chosen, masks, traffic)
    pages.note("plan", pages.num_plans)
    steps = Steps(pages, counts, helds, limits, chosen, masks, tables, traffic, arena, facts)
    steps.shapes, steps.topology = shapes, topology
    return DecodePlan(steps, None)


def _limits(pages: Pages, counts: Mapping[Hashable, int], horizon: int) -> list[int]:
    """Tokens of each sequence at the end of the plan."""
    limits = []
    for seq, count in counts.items():
        length, capacity = pages.length(seq), pages.capacity(seq)
        if length + count > capacity:
            raise ValueError(
                f"sequence {seq!r} keeps {length} tokens and has pages for {capacity}; {count} new ones need "
                f"pages.reserve({seq!r}, {count}) first"
            )
        limits.append(min(length + max(horizon, count), capacity))
    return limits


def _chosen(rows: RowsFn, travel: TravelFn | None, counts: tuple[int, ...], world_size: int) -> Rows:
    chosen = rows(counts, world_size)
    if not isinstance(chosen, Rows):
        raise TypeError(f"rows must be a function such as cpflex.everyone; got {rows!r}")
    if travel is not None and chosen.counts is None:
        raise ValueError(
            f"travel= is for ranks that have different tokens, rows=cpflex.by_token or cpflex.by_sequence; got "
            f"rows={chosen.name}"
        )
    return chosen


def _name(kind: str, wave: int) -> str:
    return f"{kind}, wave {wave}"


def _note_read(read: Sequence[tuple[Blocks, Kept]], helds: Sequence[Held], number: int) -> None:
    """Let sequences know what their newest plan reads."""
    for place, held in enumerate(helds):
        found = np.zeros(len(held.slot), bool)
        for blocks, kept in read:
            found[kept.page[blocks.place[kept.block] == place] if len(helds) > 1 else kept.page] = True
        held.planned_from, held.newest_plan, held.read = held.length, number, found


def _costs(
    needs: Needs,
    lengths: np.ndarray,
    new: np.ndarray,
    pages: Pages,
    shapes: Sequence[Heads],
    topology: Topology | None,
) -> Costs:
    query_bytes, key_bytes = bytes_of_rows(shapes)
    asked, given, sent = needs.rows(lengths, new, pages.page_size)
    return Costs(
        tuple(int(x) for x in asked * query_bytes + given * key_bytes),
        tuple(int(x) for x in sent * key_bytes),
        num_waves_of(needs, pages.page_size),
        bytes_of_a_message(topology, pages.world_size),
    )


def _shapes(pages: Pages, num_heads: int | None) -> list[Heads]:
    """Of the attentions of all pools so far; those of `Heads` before there is one."""
    found = []
    for kv_heads, dim, v_dim, element_bytes in pages.shapes or [(Heads.kv, Heads.dim, Heads.dim, Heads.element_bytes)]:
        group_size = Heads.query // Heads.kv if num_heads is None else -(-num_heads // kv_heads)
        found.append(Heads(group_size * kv_heads, kv_heads, dim, v_dim, element_bytes))
    return found


def _travelling(travel: TravelFn | None, costs: Costs) -> np.ndarray:
    """Of each sequence: whether keys travel."""
    found = list((travel or cheaper)(costs))
    if len(found) != len(costs.keys_bytes) or not all(isinstance(one, bool | np.bool_) for one in found):
        raise ValueError(f"travel must give a bool for each of {len(costs.keys_bytes)} sequences; got {found}")
    return np.array(found, bool)


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


def _check_travel(travel: TravelFn | None, heads: Heads | None, topology: Topology | None) -> None:
    if travel is not None and not callable(travel):
        raise TypeError(f"travel must be cpflex.queries, cpflex.keys, a function like them or None; got {travel!r}")
    for name, value, kind in (("heads", heads, Heads), ("topology", topology, Topology)):
        if value is not None and not isinstance(value, kind):
            raise TypeError(f"{name} must be a cpflex.{kind.__name__}; got {type(value).__name__}")


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
    pages: Pages,
    counts: Mapping[Hashable, int],
    limits: Sequence[int],
    rows: Rows,
    masks: Mapping[str, TracedMask],
    traffic: Mapping[str, Traffic],
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
        "what travels": {kind: one.in_words for kind, one in traffic.items()},
        "masks": {kind: f"{one.__name__}, graph {one.mod.key}" for kind, one in masks.items()},
        "tensors captured by the masks": [one.content_key for one in masks.values()],
    }
