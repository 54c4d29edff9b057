"""Who sends which rows to whom at each step: pure data, made alike on every rank.

The block of step t is the K/V that is visiting at that step; block 0 is the rank's own shard. Blocks of other numbers
are on their way to other ranks. A schedule function fills in where each block comes from and, for backward, where its
dK/dV goes.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np

from cpflex.sharding.layout import Layout
from cpflex.tile_mask import TileMask
from cpflex.topology import Machine

Rows = tuple[tuple[int, int], ...]
"""(start, stop) ranges of rows of a block."""


class Transfer(NamedTuple):
    """One message: rows of a block, to or from a peer (rank within the group)."""

    peer: int
    block: int
    rows: Rows

    @property
    def num_rows(self) -> int:
        return sum(stop - start for start, stop in self.rows)


class Source(NamedTuple):
    """Part of a block: rows of the owner's shard."""

    owner: int
    rows: Rows


@dataclass(frozen=True)
class Exchange:
    """The messages of one step. A rank's own among them, to itself, are copies from one block to another."""

    sources: tuple[Source, ...] = ()
    """What the step's block consists of, in order."""
    sends: tuple[Transfer, ...] = ()
    """K/V rows that leave before the step; ``block`` is the one that holds the rows here."""
    receives: tuple[Transfer, ...] = ()
    """K/V rows that arrive for this step's block, or for one that is passed on; together they fill their blocks."""
    grad_sends: tuple[Transfer, ...] = ()
    """dK/dV rows that leave once the step is computed: of its block, or of one that was passed on."""
    grad_receives: tuple[Transfer, ...] = ()
    """dK/dV rows that arrive meanwhile, to be added to those of ``block``."""
    after: tuple[Exchange, ...] = ()
    """Of the last step: what follows it, gradients alone."""


@dataclass(frozen=True)
class Step:
    """One step of a plan: its messages, and what to compute with the block."""

    exchange: Exchange
    tile_mask: TileMask


class Needs(Protocol):
    """What a schedule may ask: how many K/V rows ranks need of one another, and which.

    A shard is tiles, all shards alike; T of them.
    """

    @property
    def machine(self) -> Machine | None:
        """What carries the rows and computes, if it is known."""
        ...

    @cached_property
    def tokens(self) -> np.ndarray:
        """Rows of rank o's shard that rank r needs, never too few, the same on every rank; int64 [world_size (r),
        world_size (o)].
        """
        ...

    def rows_from(self, owner: int) -> Rows:
        """Rows of the owner's shard that this rank needs."""
        ...

    def rows_to(self, peer: int) -> Rows:
        """Rows of this rank's shard that the peer needs."""
        ...

    @cached_property
    def tile_starts(self) -> np.ndarray:
        """Row at which each tile of a shard begins, and the end of the last; int64 [T + 1]."""
        ...

    @cached_property
    def received(self) -> np.ndarray:
        """Tiles of all shards that this rank needs, bool [world_size (owner), T]."""
        ...

    @cached_property
    def sent(self) -> np.ndarray:
        """Tiles of this rank's shard that each rank needs, bool [world_size (rank), T]."""
        ...

    def seen(self, line: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Tiles that any rank of a line needs, bool [lines, world_size (owner), T], as exact as those above.

        Args:
            line: of each rank, -1 for none; int64 [world_size].
            columns: tiles to be looked at, bool [world_size (owner), T]; others come out False.
        """
        ...

    def foreseen(self, line: np.ndarray, owners: Sequence[int]) -> np.ndarray:
        """As `seen`, of all tiles of some owners, by block: never too few, cheap, the same on every rank; bool [lines,
        owners, T].
        """
        ...

    def tokens_of(self, line: np.ndarray) -> np.ndarray:
        """As `tokens`, of lines of ranks; int64 [lines, world_size (o)]."""
        ...


@dataclass(frozen=True)
class Schedule:
    """A rank's exchanges, step by step, and why they are these."""

    name: str
    reason: str
    exchanges: tuple[Exchange, ...]
    recv_tokens: tuple[int, ...]
    """K/V rows that each rank receives, [world_size]; of other ranks never too few."""


ScheduleFn = Callable[[Layout, int, Needs], Schedule]

Ask = Callable[[int], Rows]
"""Rows by the rank at the other end."""

Stages = int | tuple[int, ...]
"""How many parts, or parts in proportion: ``(1, 4, 4)``."""


def ring(layout: Layout, rank: int, needs: Needs) -> Schedule:
    """Whole shards travel from each rank to the next (Ring Attention, arXiv:2310.01889).

    All ranks make the same number of hops, the largest that any needs. In backward dK/dV follow their shard one hop
    behind, each rank adding its own, and the last one sends the sum home in one message.
    """
    world_size, shard = layout.world_size, ((0, layout.local_len),)
    num_hops = hops_needed(needs.tokens)
    following, previous = (rank + 1) % world_size, (rank - 1) % world_size
    exchanges = [Exchange(sources=(Source(rank, shard),))]
    for hop in range(1, num_hops + 1):
        owner = (rank - hop) % world_size
        if hop < num_hops:
            grad_sends = Transfer(following, hop, shard)
            grad_receives = Transfer(previous, hop + 1, shard)
        else:
            grad_sends = Transfer(owner, hop, shard)
            grad_receives = Transfer((rank + hop) % world_size, 0, shard)
        exchanges.append(
            Exchange(
                sources=(Source(owner, shard),),
                sends=(Transfer(following, hop - 1, shard),),
                receives=(Transfer(previous, hop, shard),),
                grad_sends=(grad_sends,),
                grad_receives=(grad_receives,),
            )
        )
    moved = (num_hops * layout.local_len,) * world_size
    return Schedule("ring", f"asked for; {num_hops} of {world_size - 1} hops are needed", tuple(exchanges), moved)


def ring_both(layout: Layout, rank: int, needs: Needs) -> Schedule:
    """Whole shards travel both ways round the ring, so that links are used in both directions and there are half as
    many steps, each with two shards: one from either side. Receive buffers hold four. In backward each way's dK/dV
    follow it as in `ring`.
    """
    world_size, shard = layout.world_size, ((0, layout.local_len),)
    hops = hops_both_ways(needs.tokens)
    exchanges = [Exchange(sources=(Source(rank, shard),))]
    for hop in range(1, max(hops) + 1):
        parts = [_hop(way, hop, hops, layout.local_len, world_size, rank) for way in (0, 1) if hop <= hops[way]]
        exchanges.append(Exchange(*(tuple(itertools.chain(*x)) for x in zip(*parts, strict=True))))
    moved = (sum(hops) * layout.local_len,) * world_size
    reason = f"asked for; {hops[0]} hops one way and {hops[1]} the other of {world_size - 1} are needed"
    return Schedule("ring:both", reason, tuple(exchanges), moved)


def _hop(way: int, hop: int, hops: tuple[int, int], shard_len: int, world_size: int, rank: int) -> tuple[tuple, ...]:
    """Of one way round (0: to the next rank, 1: to the previous), as the fields of an `Exchange`."""
    sign = (1, -1)[way]

    def rows(hop: int) -> Rows:
        """Where the shard of this way is in the block of a hop: after that of the other, if that still travels."""
        begin = shard_len if way == 1 and 1 <= hop <= hops[0] else 0
        return ((begin, begin + shard_len),)

    to, from_, owner = ((rank + step * sign) % world_size for step in (1, -1, -hop))
    is_last = hop == hops[way]
    return (
        (Source(owner, ((0, shard_len),)),),
        (Transfer(to, hop - 1, rows(hop - 1)),),
        (Transfer(from_, hop, rows(hop)),),
        (Transfer(owner if is_last else to, hop, rows(hop)),),
        (
            Transfer((rank + hop * sign) % world_size, 0, rows(0))
            if is_last
            else Transfer(from_, hop + 1, rows(hop + 1)),
        ),
    )


def hops_both_ways(tokens: np.ndarray) -> tuple[int, int]:
    """The fewest steps, then the fewest hops, that bring every shard to where it is needed, from either side."""
    ranks, owners = np.nonzero(tokens)
    distances = sorted({0, *((ranks - owners) % len(tokens)).tolist()})
    ends = [*distances[1:], len(tokens)]
    return min(
        ((near, len(tokens) - far) for near, far in zip(distances, ends, strict=True)),
        key=lambda hops: (max(hops), sum(hops)),
    )


def direct(layout: Layout, rank: int, needs: Needs) -> Schedule:
    """Each owner sends exactly the tiles that a rank needs, straight to it; dK/dV return the same way.

    A local stage first, then as few remote ones as keep what a rank receives, and what it sends, within one shard a
    stage: with the next stage in flight while one computes, receive buffers stay within two shards. Stage by stage,
    ranks serve rank + 1, rank + 2, ...
    """
    shard = ((0, layout.local_len),)
    exchanges = [Exchange(sources=(Source(rank, shard),))]
    for distances in pack_distances(needs.tokens, layout.local_len):
        ends = _at(distances, layout.world_size, rank)
        exchanges.append(straight(len(exchanges), ends, needs.rows_to, needs.rows_from))
    reason = f"asked for; {len(exchanges) - 1} remote stages"
    return Schedule("direct", reason, tuple(exchanges), _foreign(needs.tokens))


def straight(index: int, ends: Iterable[tuple[int, int]], to: Ask, from_: Ask) -> Exchange:
    """What step ``index`` brings from owners without a stop. ``ends``: a peer to serve and an owner, in turn."""
    sources, sends, receives, grad_sends, grad_receives = [], [], [], [], []
    offset = 0
    for peer, owner in ends:
        if rows := to(peer):
            sends.append(Transfer(peer, 0, rows))
            grad_receives.append(Transfer(peer, 0, rows))
        if rows := from_(owner):
            num_rows = sum(stop - start for start, stop in rows)
            here = ((offset, offset + num_rows),)
            offset += num_rows
            sources.append(Source(owner, rows))
            receives.append(Transfer(owner, index, here))
            grad_sends.append(Transfer(owner, index, here))
    return Exchange(*(tuple(x) for x in (sources, sends, receives, grad_sends, grad_receives)))


def _at(distances: Iterable[int], world_size: int, rank: int) -> list[tuple[int, int]]:
    """The ranks so far after this one, and before it."""
    return [((rank + distance) % world_size, (rank - distance) % world_size) for distance in distances]


def pack_distances(tokens: np.ndarray, limit: int) -> list[list[int]]:
    """Distances packed, the heaviest first, into the first stage where no rank receives or sends more than ``limit``
    rows.
    """
    ranks = np.arange(len(tokens))
    received = [tokens[ranks, (ranks - distance) % len(tokens)] for distance in range(len(tokens))]
    sent = [tokens[(ranks + distance) % len(tokens), ranks] for distance in range(len(tokens))]
    moved = [np.stack(both) for both in zip(received, sent, strict=True)]
    stages: list[list[int]] = []
    totals: list[np.ndarray] = []
    for distance in sorted(range(1, len(tokens)), key=lambda d: (-int(moved[d].max()), d)):
        if not moved[distance].any():
            continue
        fits = (i for i, total in enumerate(totals) if (total + moved[distance]).max() <= limit)
        stage = next(fits, len(stages))
        if stage == len(stages):
            stages.append([])
            totals.append(np.zeros_like(moved[distance]))
        stages[stage].append(distance)
        totals[stage] = totals[stage] + moved[distance]
    return [sorted(stage) for stage in stages]


def even(stages: Stages) -> ScheduleFn:
    """A schedule like `direct`, but every pair's needed rows are cut into parts, one for each remote stage: so all
    stages are of one size, or in the proportions given, whichever owners a rank needs. A small first part is soon
    there; many parts leave little for the last step to wait for.

    Receive buffers hold two stages. The stages of dynamic context parallelism (MagiAttention's overlap degree) are
    alike, cut by cost of a solver rather than by share.

    >>> cpflex.make_plan(mask, seq_len, group, schedule=cpflex.even((1, 4, 4)))

    Raises:
        ValueError: no stage, or one of no share.
    """
    parts = parts_of(stages)

    def cut_evenly(layout: Layout, rank: int, needs: Needs) -> Schedule:
        return _even(f"even:{name_of(parts)}", parts, layout, rank, needs)

    return with_name(cut_evenly, f"even:{name_of(parts)}")


def gather(layout: Layout, rank: int, needs: Needs) -> Schedule:
    """All that a rank needs of others in one remote step: the fewest messages and steps, and the most memory. An
    all-gather (Llama 3, arXiv:2407.21783, section 3.3.2) of what is needed only.
    """
    return _even("gather", (1,), layout, rank, needs)


def _even(name: str, parts: tuple[int, ...], layout: Layout, rank: int, needs: Needs) -> Schedule:
    world_size = layout.world_size
    exchanges = [Exchange(sources=(Source(rank, ((0, layout.local_len),)),))]
    received = _foreign(needs.tokens)
    if any(received):
        both, starts = rank + np.arange(world_size), needs.tile_starts
        parts_to, parts_from = cut(needs.sent, parts, both), cut(needs.received, parts, both)
        for part in range(len(parts)):
            tiles = needs.sent & (parts_to == part), needs.received & (parts_from == part)
            to, from_ = ([rows_of(needed, starts) for needed in one] for one in tiles)
            ends = _at(range(1, world_size), world_size, rank)
            exchanges.append(straight(part + 1, ends, to.__getitem__, from_.__getitem__))
    return Schedule(name, f"asked for; {remote_stages(len(exchanges) - 1)}", tuple(exchanges), received)


def parts_of(stages: Stages) -> tuple[int, ...]:
    """The proportions of stages.

    Raises:
        ValueError: no stage, or one of no share.
    """
    parts = (stages,) if isinstance(stages, int) else stages
    if not isinstance(parts, tuple) or not parts or not all(type(part) is int and part >= 1 for part in parts):
        raise ValueError(f"stages must be a number of at least 1, or a tuple of such shares; got {stages!r}")
    return (1,) * stages if isinstance(stages, int) else parts


def name_of(parts: tuple[int, ...]) -> str:
    """``"4"`` of four equal parts, ``"1/4/4"`` of others."""
    return "/".join(map(str, parts)) if set(parts) != {1} else str(len(parts))


def with_name(schedule: ScheduleFn, name: str) -> ScheduleFn:
    """The function, called by the name of its schedules."""
    schedule.__name__ = schedule.__qualname__ = name  # type: ignore[attr-defined]
    return schedule


def cut(needed: np.ndarray, parts: tuple[int, ...], phase: np.ndarray) -> np.ndarray:
    """The part to which each needed tile of a shard belongs: of n needed ones, part i ends before number
    ``(n * sum(parts[: i + 1]) + phase) // sum(parts)``.

    Args:
        needed: bool [..., T].
        phase: rounds up for some shards what it rounds down for others, int64 [...].

    Returns:
        int64 [..., T]; of tiles that are not needed it says nothing.
    """
    total = sum(parts)
    before = np.cumsum(needed, axis=-1) - needed
    counts = needed.sum(axis=-1)
    ends = [(counts * share + phase % total) // total for share in itertools.accumulate(parts)]
    return np.sum([before >= end[..., None] for end in ends], axis=0)


def rows_of(needed: np.ndarray, tile_starts: np.ndarray) -> Rows:
    """Rows of a shard's tiles, bool [T]."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], needed.astype(np.int8), [0]])))
    return tuple((int(tile_starts[a]), int(tile_starts[b])) for a, b in edges.reshape(-1, 2))


def last_uses(exchanges: Sequence[Exchange]) -> list[list[int]]:
    """The blocks that no message needs any more once that of step i + 1 is posted, for each step i."""
    last = {index: index for index in range(len(exchanges))}
    for index, exchange in enumerate(exchanges):
        for transfer in exchange.sends:
            last[transfer.block] = max(last.get(transfer.block, 0), index - 1)
    ended: list[list[int]] = [[] for _ in exchanges]
    for block, index in last.items():
        ended[index].append(block)
    return ended


def most_rows(exchanges: Sequence[Exchange]) -> int:
    """K/V rows of other ranks in memory at once, at most: blocks, and the messages that they are made of. What is
    packed to be sent comes on top.
    """
    ended, held, most = last_uses(exchanges), {0: 0}, 0
    arriving = [sum(t.num_rows for t in exchange.receives) for exchange in exchanges]
    for index, exchange in enumerate(exchanges):
        blocks = Counter(t.block for t in exchange.receives)
        joined = sum(t.num_rows for t in exchange.receives if blocks[t.block] > 1)
        most = max(most, sum(held.values()) + arriving[index] + joined)
        for t in exchange.receives:
            held[t.block] = held.get(t.block, 0) + t.num_rows
        most = max(most, sum(held.values()) + sum(arriving[index + 1 : index + 2]))
        for block in ended[index]:
            if block != index:
                held.pop(block, None)
        most = max(most, sum(held.values()) + sum(arriving[index + 1 : index + 2]))
        held.pop(index, None)
    return most


def _foreign(tokens: np.ndarray) -> tuple[int, ...]:
    """Rows of other ranks that each needs."""
    return tuple((tokens.sum(axis=1) - np.diag(tokens)).tolist())


def remote_stages(stages: int) -> str:
    """So many of them, in words."""
    return f"{stages} remote stage{'' if stages == 1 else 's'}"


def hops_needed(tokens: np.ndarray) -> int:
    """Of a ring, until no rank needs another shard."""
    ranks, owners = np.nonzero(tokens)
    return int(((ranks - owners) % len(tokens)).max(initial=0))
