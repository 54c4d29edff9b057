"""make_plan and Plan: everything that is decided once per batch, before any attention is computed."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from cpflex import handles, plan_bytes
from cpflex.check import check_kind, check_layout
from cpflex.links import Links, links_of
from cpflex.mask_kind import FORMAT, KindWork, MaskKind, plan_kind
from cpflex.masks import MaskFn, MaskMod
from cpflex.mods.graph import Graph, GraphBuilder, Mod, Node, Ref, table_sizes
from cpflex.mods.trace import UnsupportedMod, trace_mask_mod
from cpflex.plan_bytes import WrongPlan
from cpflex.ring.bound import Bound
from cpflex.ring.schedule import Exchange, ScheduleFn, Source, Step, Transfer, auto
from cpflex.sharding.balance import balanced
from cpflex.sharding.layout import Layout, LayoutFn
from cpflex.sharding.shard import shard, unshard
from cpflex.tile_mask import Runs, TileMask
from cpflex.version import __version__

Group = dist.ProcessGroup | DeviceMesh | Links

VERSION = f"cpflex {__version__}, plan format {FORMAT}"
PARTS = (Layout, MaskKind, Mod, Graph, Node, Ref, Step, Exchange, Source, Transfer, TileMask, Runs)
"""What a plan is made of, besides numbers, strings, tuples and tensors."""

log = logging.getLogger(__name__)

BROKEN = (
    *(ArithmeticError, AssertionError, AttributeError, IndexError, KeyError, MemoryError, NotImplementedError),
    *(RecursionError, RuntimeError, StopIteration, TypeError, UnsupportedMod, ValueError),
)
"""What planning on damaged tables may raise."""


def make_plan(
    mask: MaskFn | Mapping[str, MaskFn],
    seq_len: int,
    group: Group | None = None,
    *,
    rank: int | None = None,
    world_size: int | None = None,
    weights: Mapping[str, float] | None = None,
    batch_size: int | None = None,
    num_heads: int | None = None,
    layout: LayoutFn = balanced,
    schedule: ScheduleFn = auto,
) -> Plan:
    """Decide which tokens each rank holds, what travels when, and what is computed. Pure: never communicates.

    Args:
        mask: a mask_mod on global positions, or one per layer kind of a hybrid model, ``{"full": m1, "sliding": m2}``;
            all kinds share one layout. Captured tensors are copied.
        seq_len: tokens of the whole sequence, below 2**31; any number of them.
        group: the ranks that share the sequence: a process group, a 1-D device mesh such as ``mesh["cp"]``, or None for
            one rank.
        rank, world_size: instead of a group, to plan for any rank of any job, anywhere; `Plan.bind` adds the group.
        weights: layers of each kind; 1 each if None.
        batch_size, num_heads: needed when the mask depends on ``b`` or ``h``: what is computed and sent is then the
            union over them.
        layout: `balanced`, `zigzag`, `contiguous`, `striped`, or a function like them.
        schedule: `auto`, `ring`, `direct`, or a function like them.

    >>> plan = cpflex.make_plan(cpflex.causal() & cpflex.document(cu_seqlens=cu), seq_len=8192, group=mesh["cp"])

    Raises:
        ValueError: sizes that do not fit each other; the message says which.
        UnsupportedMod: the mask is not a pointwise bool function.
    """
    began = time.perf_counter()
    links, rank, world_size = _membership(group, rank, world_size)
    if not _is_count(seq_len, 1) or seq_len >= 2**31:
        raise ValueError(f"seq_len must be an integer from 1 to 2**31 - 1; got {seq_len!r}")
    masks = dict(mask) if isinstance(mask, Mapping) else {"mask": mask}
    if not masks or not all(isinstance(kind, str) for kind in masks):
        raise ValueError(f"mask must name at least one mask kind, by strings; got {masks or 'an empty dict'}")
    _check_options(batch_size, num_heads, layout, schedule)
    weights = _weights(weights, masks)
    copies: dict[int, tuple[Tensor, Tensor]] = {}  # kinds that capture one tensor share one copy
    mods = {kind: _traced(one, seq_len, batch_size, num_heads, copies) for kind, one in masks.items()}
    work = KindWork(mods, weights, batch_size or 1, num_heads or 1)
    table = layout(seq_len, world_size, work)
    if not isinstance(table, Layout) or (table.seq_len, table.world_size) != (seq_len, world_size):
        raise ValueError(f"layout must return a Layout of seq_len={seq_len} for {world_size} ranks; got {table!r}")
    planned = {
        kind: plan_kind(kind, mod, table, rank, work, schedule, batch_size, num_heads) for kind, mod in mods.items()
    }
    by_b, by_h = (any(mod.uses(name) for mod in mods.values()) for name in "bh")
    plan = Plan(table, rank, planned, links, batch_size if by_b else None, num_heads if by_h else None)
    if log.isEnabledFor(logging.INFO):
        log.info("%r made in %.1f ms: %s", plan, 1e3 * (time.perf_counter() - began), _summary(plan))
    return plan


class Plan:
    """What a rank knows about one batch: its tokens, and for each mask kind the steps of the attention.

    A plan of one kind is what `flex_attention` takes; a plan of several is indexed by kind first: ``plan["sliding"]``.
    Plans pickle; the group is left behind, and `bind` adds it again.
    """

    def __init__(
        self,
        layout: Layout,
        rank: int,
        kinds: Mapping[str, MaskKind],
        links: Links | None = None,
        batch_size: int | None = None,
        num_heads: int | None = None,
    ) -> None:
        self.layout = layout
        self.rank = rank
        self.kinds = dict(kinds)
        self.batch_size = batch_size
        self.num_heads = num_heads
        self.seq_len = layout.seq_len
        self.world_size = layout.world_size
        self.local_len = layout.local_len
        self._links = links
        self._one_kind: dict[str, Plan] = {}
        self.why_not_callable = ""
        """What to do first, where `flex_attention` cannot take this plan."""
        if len(kinds) > 1:
            self.why_not_callable = (
                f"this plan has the mask kinds {sorted(kinds)}; index it first, for instance plan[{min(kinds)!r}]"
            )
            self._one_kind = {
                name: Plan(layout, rank, {name: kind}, links, batch_size, num_heads) for name, kind in kinds.items()
            }
            return
        if links is None and self.world_size > 1:
            self.why_not_callable = (
                "this plan was made for inspection, without a group; call plan = plan.bind(group) first"
            )
        (kind,) = self.kinds.values()
        bound = Bound(kind.mask, kind.steps, links, kind.facts, kind.fingerprint, self.seq_len, self.positions)
        self.handle = handles.register(bound)
        """Stands for this plan in the operator, int64 []."""

    def __getitem__(self, kind: str) -> Plan:
        """The plan of one mask kind, on the same layout."""
        if kind not in self.kinds:
            raise KeyError(f"no mask kind {kind!r} in this plan; it has {sorted(self.kinds)}")
        return self._one_kind.get(kind, self)

    @cached_property
    def positions(self) -> Tensor:
        """Global position of each local token, int64 [S_local]; pads are numbered S, S + 1, ..."""
        return torch.from_numpy(self.layout.positions(self.rank))

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps of the one mask kind."""
        return self._kind.steps

    @property
    def fingerprint(self) -> str:
        """Equal on two ranks iff their plans belong together: same mask and captured values, layout and schedule."""
        return hashlib.sha256("".join(kind.fingerprint for kind in self.kinds.values()).encode()).hexdigest()[:16]

    @property
    def _kind(self) -> MaskKind:
        if len(self.kinds) > 1:
            raise TypeError(self.why_not_callable)
        (kind,) = self.kinds.values()
        return kind

    @cached_property
    def stats(self) -> dict[str, Any]:
        """Figures of the one mask kind, or of each: ``stats[kind]``.

        Of each rank: ``work`` (query, key) pairs in blocks with work, ``recv_tokens`` K/V rows received in one forward
        (exact for this rank, by block for others), ``needed_tokens`` K/V rows of other ranks that it needs, by block.
        ``imbalance`` max / mean work, ``all_gather_tokens`` what an all-gather would bring to each rank. Of this rank:
        ``sent_tokens``, ``full_tiles``, ``partial_tiles``, and how many of these are ``unproven_tiles``. ``schedule``
        and ``reason``.
        """
        figures = {name: self._stats_of(kind) for name, kind in self.kinds.items()}
        return figures if len(figures) > 1 else next(iter(figures.values()))

    def _stats_of(self, kind: MaskKind) -> dict[str, Any]:
        masks = [step.tile_mask for step in kind.steps]
        exchanges = [step.exchange for step in kind.steps]
        received = list(kind.recv_tokens)
        received[self.rank] = sum(t.num_rows for exchange in exchanges for t in exchange.receives)
        return {
            "work": kind.work.tolist(),
            "imbalance": float(kind.work.max() / kind.work.mean()) if kind.work.any() else 1.0,
            "recv_tokens": received,
            "sent_tokens": sum(t.num_rows for exchange in exchanges for t in exchange.sends),
            "needed_tokens": (kind.tokens.sum(axis=1) - np.diag(kind.tokens)).tolist(),
            "all_gather_tokens": self.local_len * (self.world_size - 1),
            "full_tiles": sum(mask.full.num_tiles for mask in masks),
            "partial_tiles": sum(mask.partial.num_tiles for mask in masks),
            "unproven_tiles": sum(mask.num_unproven for mask in masks),
            "schedule": kind.schedule,
            "reason": kind.reason,
        }

    def shard(self, x: Tensor, dim: int, *, pad_value: float | int | bool | None = None) -> Tensor:
        """This rank's tokens of ``x``, which every rank holds whole: ``x.shape[dim] == seq_len`` -> ``local_len``.

        Nothing is sent. Differentiable: the gradient is zero at other ranks' tokens. Shift labels before sharding them.

        Raises:
            ValueError: ``x`` has another length, or padding is needed and ``pad_value`` is None.
        """
        return shard(x, dim, self.layout, self.rank, pad_value)

    def unshard(self, x: Tensor, dim: int) -> Tensor:
        """All ranks' tokens in their original order, pads dropped: ``local_len`` -> ``seq_len``.

        All ranks must call it. Differentiable: the ranks' gradients are summed in fp32, in rank order.
        """
        if self._links is None and self.world_size > 1:
            raise RuntimeError("this plan has no group to gather from; call plan = plan.bind(group) first")
        return unshard(x, dim, self.layout, self.rank, self._links)

    def bind(self, group: Group | None) -> Plan:
        """This plan on a group.

        Raises:
            ValueError: the group has another size, or this process another rank in it.
        """
        links, rank, world_size = _membership(group, None, None)
        if (rank, world_size) != (self.rank, self.world_size):
            raise ValueError(
                f"the plan was made for rank {self.rank} of {self.world_size}; "
                f"the group makes this process rank {rank} of {world_size}"
            )
        return Plan(self.layout, self.rank, self.kinds, links, self.batch_size, self.num_heads)

    def to(self, device: torch.device | str | int) -> Plan:
        """Copy the plan's tables to a device now rather than at the first attention there. Returns the plan itself."""
        for plan in self._one_kind.values() or [self]:
            handles.resolve(plan.handle).on(torch.device(device))
        return self

    def refuse(self, error: Exception) -> None:
        """Make the other ranks' next attention on this plan raise too, before this one raises ``error``."""
        handles.resolve(next(iter(self._one_kind.values()), self).handle).refuse(error)

    def explain(self) -> str:
        """The plan in words: layout, work per rank, K/V received, tiles, schedule, and warnings."""
        from cpflex.explain import explain

        return explain(self)

    def plot(self, path: str) -> None:
        """Draw the mask coloured by rank, and bars of work and K/V received per rank (needs the extra ``viz``)."""
        from cpflex.explain import plot

        plot(self, path)

    def __repr__(self) -> str:
        return (
            f"Plan({', '.join(sorted(self.kinds))}; seq_len={self.seq_len}, {self.layout.name} on rank {self.rank} of "
            f"{self.world_size}, local_len={self.local_len})"
        )

    def to_bytes(self) -> bytes:
        """The plan, to be stored or sent; the group is left behind."""
        parts = (self.layout, self.rank, self.kinds, self.batch_size, self.num_heads)
        return plan_bytes.to_bytes(parts, VERSION)

    @staticmethod
    def from_bytes(data: bytes) -> Plan:
        """A plan that `to_bytes` gave, from anywhere: nothing in the bytes is run, and the plan is checked.

        Raises:
            ValueError: the bytes are no plan, damaged, of another version, or not what `make_plan` would make.
        """
        try:
            plan = _unpickled(data)
            plan.check()
            if plan.to_bytes() != data:
                raise WrongPlan("the plan is damaged: it is written in another way than Plan.to_bytes writes")
        except WrongPlan:
            raise
        except BROKEN as error:
            raise WrongPlan(f"the plan is damaged: {type(error).__name__}: {error}") from error
        return plan

    def check(self, schedule: ScheduleFn | None = None) -> None:
        """Plan again, from the traced masks and the layout, and compare everything.

        Args:
            schedule: the schedule function, if it is not one of cpflex's.

        Raises:
            ValueError: this plan is not what `make_plan` would make; the message names a part that differs.
        """
        check_layout(self.layout, self.rank)
        for name, kind in self.kinds.items():
            check_kind(name, kind, self.layout, self.rank, schedule)
        sizes = [next(filter(None, found), None) for found in zip(*(k.sizes for k in self.kinds.values()), strict=True)]
        if [self.batch_size, self.num_heads] != sizes:
            raise WrongPlan(f"the plan is wrong: batch_size={self.batch_size}, num_heads={self.num_heads}")

    def __reduce__(self):
        return _unpickled, (self.to_bytes(),)


def _summary(plan: Plan) -> str:
    """What was decided, for the log."""
    plans = {name: plan[name].stats for name in plan.kinds}
    return "; ".join(
        f"{name}: {s['schedule']}, work {s['imbalance']:.3f} x the mean at most, {s['recv_tokens'][plan.rank]} K/V "
        f"rows to receive, {s['full_tiles']} FULL and {s['partial_tiles']} PARTIAL tiles"
        for name, s in plans.items()
    )


def _unpickled(data: bytes) -> Plan:
    """Not checked, beyond damage on the way."""
    layout, rank, kinds, *sizes = plan_bytes.from_bytes(data, {part.__name__: part for part in PARTS}, VERSION)
    return Plan(layout, rank, kinds, None, *sizes)


def _check_options(batch_size: object, num_heads: object, layout: object, schedule: object) -> None:
    for name, size in (("batch_size", batch_size), ("num_heads", num_heads)):
        if size is not None and not _is_count(size, least=1):
            raise ValueError(f"{name} must be an integer of at least 1; got {size!r}")
    for name, function, example in (("layout", layout, "zigzag"), ("schedule", schedule, "ring")):
        if not callable(function):
            raise TypeError(f"{name} must be a function such as cpflex.{example}; got {function!r}")


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


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
    if not (_is_count(rank, 0) and _is_count(world_size, 1) and rank < world_size):
        raise ValueError(f"rank must be from 0 to world_size - 1; got rank={rank!r}, world_size={world_size!r}")
    return None, rank, world_size


def _weights(weights: Mapping[str, float] | None, masks: Mapping[str, Any]) -> dict[str, float]:
    if weights is None:
        return dict.fromkeys(masks, 1.0)
    numbers = all(isinstance(weight, int | float) and 0 < weight < float("inf") for weight in weights.values())
    if set(weights) != set(masks) or not numbers:
        raise ValueError(f"weights must give each mask kind of {sorted(masks)} a positive number; got {dict(weights)}")
    return dict(weights)


def _traced(
    mask: MaskFn, seq_len: int, batch_size: int | None, num_heads: int | None, copies: dict[int, tuple[Tensor, Tensor]]
) -> Mod:
    """The mask as a graph that is also false at pads, its captured tensors copied to the CPU."""
    if not callable(mask):
        raise TypeError(f"mask must be a mask_mod (b, h, q_idx, kv_idx) -> bool Tensor; got {type(mask).__name__}")
    if isinstance(mask, MaskMod) and mask.lengths - {seq_len}:
        raise ValueError(f"{mask!r} was made for {sorted(mask.lengths)} tokens; seq_len={seq_len}")

    def copied(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            # with the original: were it gone, another tensor might get its id
            copies[id(tensor)] = tensor, tensor.detach().to("cpu", copy=True)
        return copies[id(tensor)][1]

    mod = trace_mask_mod(mask).map_captured(copied)
    limits = {"q_idx": ("seq_len", seq_len), "kv_idx": ("seq_len", seq_len)}
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
    length = builder.add("captured", len(mod.captured), dtype=torch.int64)
    seen = mod.graph.outputs[0]
    for name in ("q_idx", "kv_idx"):
        position = builder.add("input", name, dtype=torch.int64)
        seen = builder.add("and", seen, builder.add("lt", position, length, dtype=torch.bool), dtype=torch.bool)
    return Mod(builder.graph(seen), (*mod.captured, torch.tensor(seq_len)), mod.name)
