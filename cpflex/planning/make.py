"""make_plan: everything that is decided once per batch, before any attention is computed."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from cpflex.links.grid import GridLinks
from cpflex.links.processes import Group, links_of
from cpflex.links.protocol import Links
from cpflex.masks import MaskFn, MaskMod, is_count
from cpflex.masks_from import as_mask
from cpflex.mods.graph import GraphBuilder, Mod, table_sizes
from cpflex.mods.trace import trace_mask_mod
from cpflex.planning.bounds import waits_for_links
from cpflex.planning.choose import auto, degrees, family_of
from cpflex.planning.cross import Cached, Cross
from cpflex.planning.mask_kind import KindWork, plan_kind
from cpflex.planning.plan import Plan
from cpflex.planning.predict import heads_us, outer_machine
from cpflex.ring.heads import why_not_divided
from cpflex.ring.schedule import ScheduleFn
from cpflex.sharding.balance import balanced
from cpflex.sharding.layout import ALIGNMENT, STRIPE, ChunkWork, Layout, LayoutFn, cut_shards
from cpflex.topology import Device, Heads, Machine, Topology

log = logging.getLogger(__name__)

CHEAP_HEADS = 0.125
"""Where an exchange of heads takes at most this part of the time, and links do not decide, no layout is made without
it: the ranks compute as much without, wait for as many rows, and spare no more than the exchange.
"""


Mask = MaskFn | BlockMask | Cross | Cached


@torch.inference_mode(False)
def make_plan(
    mask: Mask | Mapping[str, Mask],
    seq_len: int,
    group: Group | None = None,
    *,
    start: int | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    ulysses_size: int | Mapping[str, int] | None = None,
    weights: Mapping[str, float] | None = None,
    batch_size: int | None = None,
    num_heads: int | None = None,
    layout: LayoutFn = balanced,
    schedule: ScheduleFn = auto,
    topology: Topology | None = None,
    device: Device | None = None,
    heads: Heads | None = None,
) -> Plan:
    """Decide which tokens each rank holds, what travels when, and what is computed. Pure: never communicates. A
    plan made in `torch.inference_mode` serves training too.

    Args:
        mask: a mask_mod on global positions, or one per layer kind of a hybrid model, ``{"full": m1, "sliding": m2}``;
            all kinds share one layout. Captured tensors are copied. A torch BlockMask is a mask too: its mask_mod in
            the blocks of its table (`masks_from.block_mask`). `cross` makes a mask kind whose keys are another
            sequence, with a plan of their own, `cached` one whose keys are those of earlier chunks and then the
            chunk's: all kinds of one plan share the layout of its queries.
        seq_len: tokens of the whole sequence, or of the chunk; any number of them, that end below 2**31.
        group: the ranks that share the sequence: a process group, a 1-D device mesh such as ``mesh["cp"]``, or None for
            one rank. A 2-D mesh, ``mesh["cp", "heads"]``, or two groups, ``(heads_group, cp_group)``, exchange heads
            among the ranks of the dim that is named "heads", or is the first, and keys among those of the other.
        start: if the tokens are a chunk of a longer sequence, the position of the first: queries, and keys that are not
            of another sequence, are at ``start`` and up. Masks may then be made for more tokens than end here. Keys
            before ``start`` are those of `cached` kinds alone, others see none. If None, it is where the earlier chunks
            of these end, else 0.
        rank, world_size: instead of a group, to plan for any rank of any job, anywhere; `Plan.bind` adds the group.
        ulysses_size: ranks among which heads are exchanged, so many that are next to each other in the group; they then
            share longer shards. It must divide the query heads, and the heads of keys or be a multiple of them. By mask
            kind, ``{"full": 8}``, others exchange none: what pays for long documents seldom does for windows. If None,
            known from two groups or a 2-D mesh, else predicted where ``topology`` and ``heads`` are given and the
            schedule is `auto`, else 1.
        weights: layers of each kind; 1 each if None.
        batch_size, num_heads: needed when the mask depends on ``b`` or ``h``: what is computed and sent is then the
            union over them.
        layout: `balanced`, `zigzag`, `contiguous`, `striped`, or a function like them.
        schedule: `auto`, `ring`, `direct`, or a function like them.
        topology: the links between the ranks, for instance ``cpflex.Topology.named("h100-ib")``: layout and schedule
            then suit them. All ranks must give the same.
        device, heads: what computes, and on which heads; with a topology only. An H100 with 32 query and 8 key heads of
            128 if None.

    >>> plan = cpflex.make_plan(cpflex.causal() & cpflex.document(cu_seqlens=cu), seq_len=8192, group=mesh["cp"])

    Raises:
        ValueError: sizes that do not fit each other; the message says which.
        UnsupportedMod: the mask is not a pointwise bool function.
    """
    began = time.perf_counter()
    links, rank, world_size = _membership(group, rank, world_size)
    if not is_count(seq_len, 1) or seq_len >= 2**31:
        raise ValueError(f"seq_len must be an integer from 1 to 2**31 - 1; got {seq_len!r}")
    masks = dict(mask) if isinstance(mask, Mapping) else {"mask": mask}
    if not masks or not all(isinstance(kind, str) for kind in masks):
        raise ValueError(f"mask must name at least one mask kind, by strings; got {masks or 'an empty dict'}")
    _check_options(batch_size, num_heads, layout, schedule)
    begin = _begin(start, seq_len, masks, world_size)
    is_chunk = start is not None or any(isinstance(one, Cached) for one in masks.values())
    sizes = _ulysses_sizes(ulysses_size, links, world_size, num_heads, masks)
    machine = Machine.of(topology, device, heads)
    weights = _weights(weights, masks)
    copies: dict[int, tuple[Tensor, Tensor]] = {}  # kinds that capture one tensor share one copy
    crosses = {kind: one for kind, one in masks.items() if isinstance(one, Cross)}
    earlier = {kind: one.earlier for kind, one in masks.items() if isinstance(one, Cached) and one.earlier}
    mods = {
        kind: traced(one, seq_len, batch_size, num_heads, copies, begin if is_chunk else None)
        for kind, one in masks.items()
    }
    asked = _Asked(
        *(mods, crosses, earlier, weights, seq_len, begin, rank, world_size, batch_size, num_heads, layout, schedule),
        *(machine, {}, {}),
    )
    is_open = ulysses_size is None and not isinstance(links, GridLinks)
    if is_open and heads is not None and schedule is auto and not crosses and not earlier:
        sizes = _predicted_sizes(asked)
    plan = _planned(asked, links, sizes)
    if log.isEnabledFor(logging.INFO):
        log.info("%r made in %.1f ms: %s", plan, 1e3 * (time.perf_counter() - began), _summary(plan))
    return plan


Keys = Mapping[str, tuple[Layout, int]]
"""Of mask kinds whose keys are another sequence, as `KindWork` takes them."""


class _Asked(NamedTuple):
    """What is to be planned, whatever heads are exchanged."""

    mods: Mapping[str, Mod]
    crosses: Mapping[str, Cross]
    earlier: Mapping[str, tuple[Layout, ...]]
    weights: Mapping[str, float]
    seq_len: int
    start: int
    rank: int
    world_size: int
    batch_size: int | None
    num_heads: int | None
    layout: LayoutFn
    schedule: ScheduleFn
    machine: Machine | None
    works: dict[int, KindWork]
    layouts: dict[int, Layout]


def _planned(asked: _Asked, links: Links | None, sizes: Mapping[str, int]) -> Plan:
    """The plan if so many ranks exchange heads for each mask kind."""
    most, keys = max(sizes.values()), {}
    for kind, one in asked.crosses.items():
        keys[kind] = one.shards(kind, asked.world_size, sizes[kind]), most // sizes[kind]
    outer, kinds = _shards(asked, most, keys), {}
    own = cut_shards(outer, most)
    for kind, mod in asked.mods.items():
        size = sizes[kind]
        kinds[kind] = plan_kind(
            kind, mod, cut_shards(outer, most // size), asked.rank // size, _work(asked, size, keys), asked.schedule,
            asked.batch_size, asked.num_heads, size, own,
        )  # fmt: skip
    by_b, by_h = (any(mod.uses(name) for mod in asked.mods.values()) for name in "bh")
    counts = asked.batch_size if by_b else None, asked.num_heads if by_h else None
    return Plan(outer, asked.rank, kinds, links, *counts, most)


def _work(asked: _Asked, size: int, keys: Keys | None = None) -> KindWork:
    """The masks as shards of ``size`` ranks see them, known once."""
    if size not in asked.works:
        machine = _outer_machine(asked.machine, size)
        counts = asked.batch_size or 1, asked.num_heads or 1
        earlier = {kind: (layouts, size) for kind, layouts in asked.earlier.items()}
        asked.works[size] = KindWork(asked.mods, asked.weights, *counts, machine, keys, earlier, asked.start)
    return asked.works[size]


def _shards(asked: _Asked, size: int, keys: Keys | None = None) -> Layout:
    """Of so many ranks each, known once."""
    if size not in asked.layouts:
        world_size = asked.world_size // size
        outer = _outer_layout(asked.layout, asked.seq_len, world_size, size, _work(asked, size, keys))
        asked.layouts[size] = replace(outer, start=asked.start)
    return asked.layouts[size]


class _Sizes(NamedTuple):
    """Ranks that exchange heads, by mask kind, on the layout of the largest of them."""

    sizes: dict[str, int]
    total_us: float
    """Forward and backward of all layers, predicted."""
    heads_us: float
    """Of the exchange of heads, a part of it."""
    waits: bool
    """Links and not kernels decide, for one of the kinds that exchange heads."""


def _predicted_sizes(asked: _Asked) -> dict[str, int]:
    """With which exchange of heads, if any, a model's layers are predicted to take least time: none, or as many ranks
    as a node and the heads allow, for all mask kinds or for those that gain by it.
    """
    machine = asked.machine
    assert machine is not None, "heads are given with a topology only"
    shared = _sizes_with(asked, machine, max(degrees(asked.world_size, machine, asked.num_heads)))
    is_cheap = shared.heads_us <= CHEAP_HEADS * shared.total_us and not shared.waits
    if max(shared.sizes.values()) == 1 or is_cheap:
        return shared.sizes
    return min(_sizes_with(asked, machine, 1), shared, key=lambda found: found.total_us).sizes


def _sizes_with(asked: _Asked, machine: Machine, most: int) -> _Sizes:
    """The best sizes, none or ``most`` by mask kind, on a layout of shards of ``most`` ranks."""
    outer, sizes, total, heads, waits = _shards(asked, most), {}, 0.0, 0.0, False
    for kind, weight in asked.weights.items():
        times, found = {}, {}
        for size in {1, most} if len(asked.mods) > 1 else {most}:
            table = cut_shards(outer, most // size)
            found[size] = _work(asked, size).predicted(kind, table)
            alone = found[size][1].best.total_us
            times[size] = alone + heads_us(table.local_len // size, size, machine), alone
        size = sizes[kind] = min(times, key=lambda size: (times[size][0], size))
        total += weight * times[size][0]
        heads += weight * (times[size][0] - times[size][1])
        traffic, (best, *_) = found[size]
        waits |= size > 1 and waits_for_links(family_of(best.name), traffic, best.machine)
    return _Sizes(sizes, total, heads, waits)


def _summary(plan: Plan) -> str:
    """What was decided, for the log."""
    plans = {name: plan[name] for name in plan.kinds}
    return "; ".join(
        f"{name}: {(s := one.stats)['schedule']}, work {s['imbalance']:.3f} x the mean at most, "
        f"{s['recv_tokens'][one.outer_rank]} K/V rows to receive, "
        f"{s['full_tiles']} FULL and {s['partial_tiles']} PARTIAL tiles"
        for name, one in plans.items()
    )


def _begin(start: int | None, seq_len: int, masks: Mapping[str, Any], world_size: int) -> int:
    """Position of the first token."""
    cached = {kind: one for kind, one in masks.items() if isinstance(one, Cached)}
    ends = [one.earlier[-1].end for one in cached.values() if one.earlier]
    begin = start if start is not None else max(ends, default=0)
    if not is_count(begin, 0) or begin + seq_len >= 2**31:
        raise ValueError(f"start must be an integer of at least 0, and start + seq_len below 2**31; got {start!r}")
    for kind, one in cached.items():
        one.require(kind, begin, world_size)
        if begin and not one.earlier:
            raise ValueError(
                f"mask kind {kind!r} is of a chunk that starts at {begin}, and no earlier ones are given; pass their "
                "plans to cpflex.cached, or the mask alone for attention within the chunk"
            )
    return begin


def _check_options(batch_size: object, num_heads: object, layout: object, schedule: object) -> None:
    for name, size in (("batch_size", batch_size), ("num_heads", num_heads)):
        if size is not None and not is_count(size, least=1):
            raise ValueError(f"{name} must be an integer of at least 1; got {size!r}")
    for name, function, example in (("layout", layout, "zigzag"), ("schedule", schedule, "ring")):
        if not callable(function):
            raise TypeError(f"{name} must be a function such as cpflex.{example}; got {function!r}")


def _ulysses_sizes(
    given: int | Mapping[str, int] | None,
    links: Links | None,
    world_size: int,
    num_heads: int | None,
    kinds: Iterable[str],
) -> dict[str, int]:
    """Ranks that exchange heads, by mask kind."""
    if isinstance(given, Mapping):
        if not set(given) <= set(kinds):
            raise ValueError(f"ulysses_size must name mask kinds of {sorted(kinds)}; got {dict(given)}")
        found = dict.fromkeys(kinds, 1) | dict(given)
    else:
        found = dict.fromkeys(kinds, given)
    sizes = {kind: _ulysses_size(size, links, world_size, num_heads) for kind, size in found.items()}
    most = max(sizes.values())
    if any(most % size for size in sizes.values()):
        raise ValueError(f"the largest ulysses_size must be a multiple of the others; got {sizes}")
    return sizes


def _ulysses_size(given: int | None, links: Links | None, world_size: int, num_heads: int | None) -> int:
    if given is not None and not is_count(given, 1):
        raise ValueError(f"ulysses_size must be an integer of at least 1; got {given!r}")
    by_groups = links.inner.world_size if isinstance(links, GridLinks) else None
    if by_groups is not None and given not in (None, by_groups):
        raise ValueError(
            f"heads are exchanged among the {by_groups} ranks of their group, for every mask kind; got "
            f"ulysses_size={given} - pass one group of all ranks to exchange them among others"
        )
    size = by_groups or given or 1
    if world_size % size:
        raise ValueError(f"ulysses_size must divide the ranks of the group; got {size} for {world_size} ranks")
    if num_heads is not None and num_heads % size:
        raise ValueError(f"the ranks that exchange heads must divide them; got {size} ranks and num_heads={num_heads}")
    return size


def _outer_layout(layout: LayoutFn, seq_len: int, world_size: int, ulysses_size: int, work: ChunkWork) -> Layout:
    """Of shards that ``ulysses_size`` ranks can share equally: where they cannot, with more pads."""
    at_least = seq_len
    for unit in (1, 2 * ALIGNMENT, 2 * STRIPE):
        unit = unit * world_size * ulysses_size if unit > 1 else 1
        at_least = -(-seq_len // unit) * unit
        table = layout(at_least, world_size, work)
        if not isinstance(table, Layout) or (table.seq_len, table.world_size) != (at_least, world_size):
            raise ValueError(f"layout must return a Layout of seq_len={at_least} for {world_size} ranks; got {table!r}")
        if table.local_len % ulysses_size == 0:
            return replace(table, seq_len=seq_len)
    raise ValueError(
        f"layout must give shards that {ulysses_size} ranks can share equally; got {table.local_len} tokens, also of "
        f"{at_least} - use another ulysses_size, or a layout that gives multiples of it"
    )


def _outer_machine(machine: Machine | None, ulysses_size: int) -> Machine | None:
    """As the outer shards see it, if heads can be divided among so many ranks."""
    if machine is None or ulysses_size == 1:
        return machine
    heads = machine.heads
    if error := why_not_divided(heads.query, heads.kv, ulysses_size):
        raise ValueError(f"{error}; make_plan takes those of the model as heads=cpflex.Heads(query, kv, dim)")
    return outer_machine(machine, ulysses_size)


def _membership(group: Group | None, rank: int | None, world_size: int | None) -> tuple[Links | None, int, int]:
    if group is not None:
        if rank is not None or world_size is not None:
            raise ValueError("pass either a group, or rank and world_size; the group knows both")
        links = links_of(group)
        return links, links.rank, links.world_size
    if (rank is None) != (world_size is None):
        raise ValueError(f"rank and world_size go together; got rank={rank}, world_size={world_size}")
    if rank is None or world_size is None:
        return None, 0, 1
    if not (is_count(rank, 0) and is_count(world_size, 1) and rank < world_size):
        raise ValueError(f"rank must be from 0 to world_size - 1; got rank={rank!r}, world_size={world_size!r}")
    return None, rank, world_size


def _weights(weights: Mapping[str, float] | None, masks: Mapping[str, Any]) -> dict[str, float]:
    if weights is None:
        return dict.fromkeys(masks, 1.0)
    numbers = all(isinstance(weight, int | float) and 0 < weight < float("inf") for weight in weights.values())
    if set(weights) != set(masks) or not numbers:
        raise ValueError(f"weights must give each mask kind of {sorted(masks)} a positive number; got {dict(weights)}")
    return dict(weights)


def traced(
    mask: Mask,
    seq_len: int,
    batch_size: int | None,
    num_heads: int | None,
    copies: dict[int, tuple[Tensor, Tensor]],
    start: int | None = None,
) -> Mod:
    """The mask as a graph that is also false at pads, its captured tensors copied to the CPU. Last among them is where
    both sequences end, or two ends.

    Args:
        start: of a chunk; masks may then be made for more tokens than end there.
    """
    q_end = (start or 0) + seq_len
    kv_end = mask.keys.end if isinstance(mask, Cross) else q_end
    has_two_ends = isinstance(mask, Cross) or (isinstance(mask, Cached) and len(mask.earlier) > 0)
    is_cross = isinstance(mask, Cross)
    is_longer = start is not None, mask.keys.start > 0 if isinstance(mask, Cross) else start is not None
    mask = as_mask(mask.mask if isinstance(mask, Cross | Cached) else mask)
    if not callable(mask):
        raise TypeError(f"mask must be a mask_mod (b, h, q_idx, kv_idx) -> bool Tensor; got {type(mask).__name__}")
    if isinstance(mask, MaskMod):
        _require_lengths(mask, (q_end, kv_end), is_longer, is_cross)

    def copied(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            # with the original: were it gone, another tensor might get its id
            copies[id(tensor)] = tensor, tensor.detach().to("cpu", copy=True)
        return copies[id(tensor)][1]

    mod = trace_mask_mod(mask).map_captured(copied)
    name = "seq_len" if not start else "start + seq_len"
    limits = {"q_idx": (name, q_end), "kv_idx": ("number of keys" if is_cross else name, kv_end)}
    limits |= {"b": ("batch_size", batch_size), "h": ("num_heads", num_heads)}
    for name, (argument, size) in limits.items():
        if size is None:
            if mod.uses(name):
                raise ValueError(f"mask {mod.name!r} depends on {name}; pass {argument}= to make_plan")
            continue
        for table_len in table_sizes(mod, [name]):
            if table_len < size:
                raise ValueError(
                    f"mask {mod.name!r} indexes a captured tensor of {table_len} elements with {name}; "
                    f"{argument}={size}"
                )
    builder = GraphBuilder(mod.graph.nodes)
    seen = mod.graph.outputs[0]
    for name in ("q_idx", "kv_idx"):
        slot = len(mod.captured) + (has_two_ends and name == "kv_idx")
        length = builder.add("captured", slot, dtype=torch.int64)
        position = builder.add("input", name, dtype=torch.int64)
        seen = builder.add("and", seen, builder.add("lt", position, length, dtype=torch.bool), dtype=torch.bool)
    ends = [q_end, kv_end][: 1 + has_two_ends]
    return Mod(builder.graph(seen), (*mod.captured, *map(torch.tensor, ends)), mod.name)


def _require_lengths(mask: MaskMod, ends: tuple[int, int], is_longer: tuple[bool, bool], is_cross: bool) -> None:
    """Of the mask, on each axis: where the tokens end, or more if they are a chunk of a longer sequence."""
    wrong = [
        made
        for made in sorted(mask.lengths)
        if any(n < end or (n > end and not longer) for n, end, longer in zip(made, ends, is_longer, strict=True))
    ]
    if not wrong:
        return
    if is_cross:
        raise ValueError(
            f"{mask!r} was made for (queries, keys) {wrong}; these are {ends[0]} queries and {ends[1]} keys"
        )
    tokens, said = sorted({n for both in wrong for n in both}), "end of the chunk" if is_longer[0] else "seq_len"
    raise ValueError(f"{mask!r} was made for {tokens} tokens; {said}={ends[0]}")
