"""Who sends which rows to whom at each step: pure data, made alike on every rank.

The block of step t is the K/V that is visiting at that step; block 0 is the rank's own shard. A schedule function fills
in where each block comes from and, for backward, where its dK/dV goes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
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
    """The messages of one step."""

    sources: tuple[Source, ...] = ()
    """What the step's block consists of, in order."""
    sends: tuple[Transfer, ...] = ()
    """K/V rows sent so that peers have their block of this step; ``block`` is the one that holds the rows here."""
    receives: tuple[Transfer, ...] = ()
    """K/V rows that arrive for this step's block."""
    grad_sends: tuple[Transfer, ...] = ()
    """dK/dV rows of this step's block that leave once the step is computed."""
    grad_receives: tuple[Transfer, ...] = ()
    """dK/dV rows that arrive meanwhile, to be added to those of ``block``."""


@dataclass(frozen=True)
class Step:
    """One step of a plan: its messages, and what to compute with the block."""

    exchange: Exchange
    tile_mask: TileMask


class Needs(Protocol):
    """What a schedule may ask: how many K/V rows ranks need of one another, and which."""

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


@dataclass(frozen=True)
class Schedule:
    """A rank's exchanges, step by step, and why they are these."""

    name: str
    reason: str
    exchanges: tuple[Exchange, ...]
    recv_tokens: tuple[int, ...]
    """K/V rows that each rank receives, [world_size]; of other ranks never too few."""


ScheduleFn = Callable[[Layout, int, Needs], Schedule]


def ring(layout: Layout, rank: int, needs: Needs) -> Schedule:
    """Whole shards travel from each rank to the next (Ring Attention, arXiv:2310.01889).

    All ranks make the same number of hops, the largest that any needs. In backward dK/dV follow their shard one hop
    behind, each rank adding its own, and the last one sends the sum home in one message.
    """
    world_size, shard = layout.world_size, ((0, layout.local_len),)
    num_hops = _hops_needed(needs.tokens)
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


def direct(layout: Layout, rank: int, needs: Needs) -> Schedule:
    """Each owner sends exactly the tiles that a rank needs, straight to it; dK/dV return the same way.

    A local stage first, then as few remote ones as keep what a rank receives, and what it sends, within one shard a
    stage: with the next stage in flight while one computes, receive buffers stay within two shards. Stage by stage,
    ranks serve rank + 1, rank + 2, ...
    """
    shard = ((0, layout.local_len),)
    exchanges = [Exchange(sources=(Source(rank, shard),))]
    for distances in _stages(needs.tokens, layout.local_len):
        stage = _direct_stage(len(exchanges), distances, layout.world_size, rank, needs)
        exchanges.append(stage)
    foreign = needs.tokens.sum(axis=1) - np.diag(needs.tokens)
    return Schedule(
        "direct", f"asked for; {len(exchanges) - 1} remote stages", tuple(exchanges), tuple(foreign.tolist())
    )


def _direct_stage(index: int, distances: list[int], world_size: int, rank: int, needs: Needs) -> Exchange:
    sources, sends, receives, grad_sends, grad_receives = [], [], [], [], []
    offset = 0
    for distance in distances:
        peer, owner = (rank + distance) % world_size, (rank - distance) % world_size
        if rows := needs.rows_to(peer):
            sends.append(Transfer(peer, 0, rows))
            grad_receives.append(Transfer(peer, 0, rows))
        if rows := needs.rows_from(owner):
            num_rows = sum(stop - start for start, stop in rows)
            here = ((offset, offset + num_rows),)
            offset += num_rows
            sources.append(Source(owner, rows))
            receives.append(Transfer(owner, index, here))
            grad_sends.append(Transfer(owner, index, here))
    return Exchange(*(tuple(x) for x in (sources, sends, receives, grad_sends, grad_receives)))


def _stages(tokens: np.ndarray, limit: int) -> list[list[int]]:
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


def auto(layout: Layout, rank: int, needs: Needs) -> Schedule:
    """`direct` where the mean needed K/V is under half of what the ring would move, else `ring`."""
    num_hops = _hops_needed(needs.tokens)
    if num_hops == 0:
        return replace(ring(layout, rank, needs), reason="no rank needs another's keys")
    foreign = needs.tokens.sum() - np.trace(needs.tokens)
    mean, moved = foreign / layout.world_size, num_hops * layout.local_len
    chosen = direct if mean < moved / 2 else ring
    share = f"ranks need {mean:,.0f} K/V rows on average, the ring would move {moved:,}"
    return replace(chosen(layout, rank, needs), reason=f"{share}: {'under' if chosen is direct else 'not under'} half")


def _hops_needed(tokens: np.ndarray) -> int:
    ranks, owners = np.nonzero(tokens)
    return int(((ranks - owners) % len(tokens)).max(initial=0))
