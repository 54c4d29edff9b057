"""Plan: what a rank knows about one batch, before any attention is computed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpflex.links.grid import GridLinks, lanes_of
from cpflex.links.processes import Group, links_of
from cpflex.links.protocol import Links
from cpflex.mods.graph import Graph, Mod, Node, Ref
from cpflex.mods.row_bounds import row_bounds
from cpflex.mods.trace import UnsupportedMod
from cpflex.planning import plan_bytes
from cpflex.planning.check import check_degrees, check_kind, check_layout
from cpflex.planning.mask_kind import FORMAT, MaskKind
from cpflex.planning.plan_bytes import WrongPlan
from cpflex.ring import handles
from cpflex.ring.bound import Bound
from cpflex.ring.heads import HeadExchange
from cpflex.ring.schedule import Exchange, ScheduleFn, Source, Step, Transfer
from cpflex.sharding.joined import Joined, cut_keys
from cpflex.sharding.layout import Layout, cut_shards
from cpflex.sharding.shard import shard, unshard
from cpflex.tile_mask import Idle, Runs, TileMask
from cpflex.topology import Device, Heads, Machine, Topology
from cpflex.version import __version__

VERSION = f"cpflex {__version__}, plan format {FORMAT}"
PARTS = (
    *(Layout, Joined, MaskKind, Mod, Graph, Node, Ref, Step, Exchange, Source, Transfer, TileMask, Runs, Idle),
    *(Machine, Topology, Device, Heads),
)
"""What a plan is made of, besides numbers, strings, tuples and tensors."""

BROKEN = (
    *(ArithmeticError, AssertionError, AttributeError, IndexError, KeyError, MemoryError, NotImplementedError),
    *(RecursionError, RuntimeError, StopIteration, TypeError, UnsupportedMod, ValueError),
)
"""What planning on damaged tables may raise."""


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
        ulysses_size: int = 1,
    ) -> None:
        self.outer = layout
        """The shards among which keys travel, of ``ulysses_size`` ranks each. Of a plan of several mask kinds they are
        the largest: ``plan[kind].outer`` are those on which a kind is planned.
        """
        self.ulysses_size = ulysses_size
        self.layout = layout = cut_shards(layout, ulysses_size)
        self.rank = rank
        self.outer_rank = rank // ulysses_size
        self.kinds = dict(kinds)
        self.batch_size = batch_size
        self.num_heads = num_heads
        self.seq_len = layout.seq_len
        self.start = layout.start
        """Position of the first token: 0, or where the chunk is in its sequence."""
        self.world_size = layout.world_size
        self.local_len = layout.local_len
        keys = next(iter(kinds.values())).keys if len(kinds) == 1 else None
        self.keys = layout if keys is None else cut_keys(keys, ulysses_size)
        """Where the keys of the one mask kind are: with the queries, or where `cross` or `cached` said."""
        self.kv_seq_len = self.keys.seq_len
        self.kv_local_len = self.keys.local_len
        self._links = links
        self._one_kind: dict[str, Plan] = {}
        self.why_not_callable = ""
        """What to do first, where `flex_attention` cannot take this plan."""
        if len(kinds) > 1:
            self.why_not_callable = (
                f"this plan has the mask kinds {sorted(kinds)}; index it first, for instance plan[{min(kinds)!r}]"
            )
            self._one_kind = {
                name: Plan(self.outer_of(kind), rank, {name: kind}, links, batch_size, num_heads, kind.ulysses_size)
                for name, kind in kinds.items()
            }
            return
        if links is None and self.world_size > 1:
            self.why_not_callable = (
                "this plan was made for inspection, without a group; call plan = plan.bind(group) first"
            )
        (kind,) = self.kinds.values()
        self.handle = handles.register(self._bound(kind))
        """Stands for this plan in the operator, int64 []."""

    def outer_of(self, kind: MaskKind) -> Layout:
        """The shards on which a mask kind is planned."""
        return cut_shards(self.outer, self.ulysses_size // kind.ulysses_size)

    def _bound(self, kind: MaskKind) -> Bound:
        links, size = self._links, self.ulysses_size
        inner, outer = (None, links) if links is None or size == 1 else lanes_of(links, size)
        heads = HeadExchange(size, self.rank % size, inner)
        mask, idle = heads.of_mask(kind.mask, self.num_heads), heads.of_idle(kind.idle)
        return Bound(mask, kind.steps, idle, links, kind.facts, kind.fingerprint, outer, heads)

    def __getitem__(self, kind: str) -> Plan:
        """The plan of one mask kind, on the same layout."""
        if kind not in self.kinds:
            raise KeyError(f"no mask kind {kind!r} in this plan; it has {sorted(self.kinds)}")
        return self._one_kind.get(kind, self)

    @cached_property
    @torch.inference_mode(False)
    def positions(self) -> Tensor:
        """Global position of each local token, int64 [S_local]: its position id. Pads are numbered on from the last."""
        return torch.from_numpy(self.layout.positions(self.rank))

    @cached_property
    @torch.inference_mode(False)
    def kv_positions(self) -> Tensor:
        """Global position of each local key of the one mask kind, int64 [kv_local_len]."""
        return torch.from_numpy(self.keys.positions(self.rank % self.keys.world_size))

    @cached_property
    @torch.inference_mode(False)
    def row_bounds(self) -> tuple[Tensor, Tensor] | None:
        """(first, end), int32 [1 or B, 1 or Hq, S] for the S tokens of the outer shard, which is this rank's where no
        heads are exchanged: a query sees the held keys at ``first <= position < end`` and no others; both are 0 where
        it sees none. None if the keys of some query are not one interval, or are not known to be.

        Found when it is first asked for, from the mask of the one mask kind: once per query and key, never per pair.
        """
        kind, keys = self._kind, self._kind.keys or self.outer
        queries = torch.from_numpy(self.outer.positions(self.outer_rank))
        sizes = (size or 1 for size in kind.sizes)
        found = row_bounds(kind.mask, len(queries), keys.end, *sizes, queries=queries, first_key=keys.start)
        return None if found is None else (found[0].int(), found[1].int())

    @property
    def fragments(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Of each rank, its runs of consecutive tokens, (start, stop) in global positions, rising; pads are left out.
        A rank's local tokens are its fragments one after the other, then pads.

        >>> cpflex.make_plan(cpflex.causal(), 60, rank=0, world_size=2, layout=cpflex.zigzag).fragments
        (((0, 16), (48, 60)), ((16, 48),))
        """
        return self.layout.fragments

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

        Of each outer shard, which is a rank's where no heads are exchanged: ``work`` (query, key) pairs in tiles with
        work, ``recv_tokens`` K/V rows received in one forward, those to be passed on included (exact for this one, by
        block for others), ``needed_tokens`` K/V rows of others that it needs, by block. ``imbalance`` max / mean work,
        ``all_gather_tokens`` what an all-gather would bring to each. Of this one: ``sent_tokens``, ``full_tiles``,
        ``partial_tiles``, and how many of these are ``unproven_tiles``. ``schedule`` and ``reason``. ``cross_tokens``
        K/V rows that it sends to other nodes, if the topology is known. Each rank of a row has so many rows and pairs
        of its heads.
        """
        figures = {name: self[name]._stats_of(kind) for name, kind in self.kinds.items()}
        return figures if len(figures) > 1 else next(iter(figures.values()))

    def _stats_of(self, kind: MaskKind) -> dict[str, Any]:
        masks = [step.tile_mask for step in kind.steps]
        exchanges = [step.exchange for step in kind.steps]
        keys, received = kind.keys or self.outer, list(kind.recv_tokens)
        received[self.outer_rank] = self._num_rows(t for exchange in exchanges for t in exchange.receives)
        return {
            "work": kind.work.tolist(),
            "imbalance": float(kind.work.max() / kind.work.mean()) if kind.work.any() else 1.0,
            "recv_tokens": received,
            "sent_tokens": self._num_rows(t for exchange in exchanges for t in exchange.sends),
            "needed_tokens": (kind.tokens.sum(axis=1) - np.diag(kind.tokens)).tolist(),
            "all_gather_tokens": keys.local_len * (keys.world_size - 1),
            "full_tiles": sum(mask.full.num_tiles for mask in masks),
            "partial_tiles": sum(mask.partial.num_tiles for mask in masks),
            "unproven_tiles": sum(mask.num_unproven for mask in masks),
            "schedule": kind.schedule,
            "reason": kind.reason,
            **self._across(kind, [t for exchange in exchanges for t in exchange.sends]),
        }

    def _num_rows(self, transfers: Iterable[Transfer]) -> int:
        """Of messages to or from other ranks."""
        return sum(t.num_rows for t in transfers if t.peer != self.outer_rank)

    def _across(self, kind: MaskKind, sends: Sequence[Transfer]) -> dict[str, int]:
        if kind.machine is None:
            return {}
        node_of = kind.machine.topology.node_of
        return {"cross_tokens": self._num_rows(t for t in sends if node_of(t.peer) != node_of(self.outer_rank))}

    def shard(
        self, x: Tensor, dim: int, *, pad_value: float | int | bool | None = None, require_same: bool = False
    ) -> Tensor:
        """This rank's tokens of ``x``, which every rank holds whole: ``x.shape[dim] == seq_len`` -> ``local_len``.

        Nothing is sent. Differentiable: the gradient is zero at other ranks' tokens. Shift labels before sharding them.

        Args:
            require_same: compare ``x`` with what the other ranks hold, all of which must call it (`require_same`).

        Raises:
            ValueError: ``x`` has another length, or padding is needed and ``pad_value`` is None.
            RankMismatch: another rank holds another ``x``, if it is compared.
        """
        if require_same:
            self.require_same(x=x)
        return shard(x, dim, self.layout, self.rank, pad_value)

    def require_same(self, **tensors: Tensor) -> None:
        """Compare tensors that every rank of the group must hold whole and alike, as the tokens of a batch, by their
        checksums: one all-gather of a number. Ranks that read different samples of one length would train on a
        sequence that nobody has. All ranks must call it.

        >>> plan.require_same(input_ids=input_ids, labels=labels)

        Raises:
            RankMismatch: on every rank, naming the tensor and who holds which.
        """
        self._any_bound.require_same(tensors)

    def unshard(self, x: Tensor, dim: int) -> Tensor:
        """All ranks' tokens in their original order, pads dropped: ``local_len`` -> ``seq_len``.

        All ranks must call it. Differentiable: the ranks' gradients are summed in rank order, in fp32 or wider.
        """
        if self._links is None and self.world_size > 1:
            raise RuntimeError("this plan has no group to gather from; call plan = plan.bind(group) first")
        return unshard(x, dim, self.layout, self.rank, self._links)

    def bind(self, group: Group | None) -> Plan:
        """This plan on a group.

        Raises:
            ValueError: the group has another size, or this process another rank in it.
        """
        links = None if group is None else links_of(group)
        rank, world_size = (0, 1) if links is None else (links.rank, links.world_size)
        if isinstance(links, GridLinks) and links.inner.world_size != self.ulysses_size:
            made = f"for heads exchanged among {self.ulysses_size} ranks"
            made = made if self.ulysses_size > 1 else "without an exchange of heads"
            raise ValueError(f"the plan was made {made}; the group exchanges them among {links.inner.world_size} ranks")
        if (rank, world_size) != (self.rank, self.world_size):
            raise ValueError(
                f"the plan was made for rank {self.rank} of {self.world_size}; "
                f"the group makes this process rank {rank} of {world_size}"
            )
        return Plan(self.outer, self.rank, self.kinds, links, self.batch_size, self.num_heads, self.ulysses_size)

    def to(self, device: torch.device | str | int) -> Plan:
        """Bring the plan's tables to a device now, with those of the kernels that 16-bit tensors use there, rather
        than at the first attention. The host does not wait for it: one copy for each mask kind, from pinned memory.
        Returns the plan itself.
        """
        for plan in self._one_kind.values() or [self]:
            handles.resolve(plan.handle).tables_on(torch.device(device), with_work=True)
        return self

    def agree(self, facts: Mapping[str, Any], device: torch.device) -> None:
        """Compare, by a number, what all ranks are about to exchange on ``device``: for layers other than attention.

        Raises:
            RankMismatch: on every rank, naming which of the ``facts`` differ.
        """
        self._any_bound.agree(dict(facts), device)
        self._any_bound.settle(str(facts["direction"]))

    def wait_for_agreement(self, at_every_call: bool = True) -> None:
        """Let this rank's host wait at every call until all ranks are known to make the same, rather than at the first
        of a kind: a disagreement is then raised where it happens, and no device is stopped. For all plans of the group.
        """
        links = self._any_bound.links
        if links is not None:
            links.waits = at_every_call

    def refuse(self, error: Exception) -> None:
        """Make the other ranks' next attention on this plan raise too, before this one raises ``error``."""
        self._any_bound.refuse(error)

    @property
    def _any_bound(self) -> Bound:
        """That of the first mask kind, for what concerns the group alone."""
        return handles.resolve(next(iter(self._one_kind.values()), self).handle)

    def explain(self) -> str:
        """The plan in words: layout, work per rank, K/V received, tiles, schedule, and warnings."""
        from cpflex.seeing.explain import explain

        return explain(self)

    def plot(self, path: str) -> None:
        """Draw the mask coloured by rank, and bars of work and K/V received per rank (needs the extra ``viz``)."""
        from cpflex.seeing.explain import plot

        plot(self, path)

    def __repr__(self) -> str:
        start = f" from {self.start}" if self.start else ""
        grid = f", heads among {self.ulysses_size}" if self.ulysses_size > 1 else ""
        return (
            f"Plan({', '.join(sorted(self.kinds))}; seq_len={self.seq_len}{start}, {self.layout.name} on rank "
            f"{self.rank} of {self.world_size}{grid}, local_len={self.local_len})"
        )

    def to_bytes(self) -> bytes:
        """The plan, to be stored or sent; the group is left behind."""
        parts = (self.outer, self.rank, self.kinds, self.batch_size, self.num_heads, self.ulysses_size)
        return plan_bytes.to_bytes(parts, VERSION)

    @staticmethod
    @torch.inference_mode(False)
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
        check_layout(self.outer, self.rank, self.ulysses_size)
        check_degrees([kind.ulysses_size for kind in self.kinds.values()], self.ulysses_size)
        for name, kind in self.kinds.items():
            check_kind(name, kind, self.outer_of(kind), self.rank // kind.ulysses_size, schedule)
        sizes = [next(filter(None, found), None) for found in zip(*(k.sizes for k in self.kinds.values()), strict=True)]
        if [self.batch_size, self.num_heads] != sizes:
            raise WrongPlan(f"the plan is wrong: batch_size={self.batch_size}, num_heads={self.num_heads}")

    def __reduce__(self):
        return _unpickled, (self.to_bytes(),)


@torch.inference_mode(False)
def _unpickled(data: bytes) -> Plan:
    """Not checked, beyond damage on the way."""
    layout, rank, kinds, *sizes = plan_bytes.from_bytes(data, {part.__name__: part for part in PARTS}, VERSION)
    return Plan(layout, rank, kinds, None, *sizes)
