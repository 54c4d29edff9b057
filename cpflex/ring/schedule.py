"""Who sends which rows to whom at each step: pure data, made alike on every rank.

The block of step t is the K/V that is visiting at that step; block 0 is the rank's own shard. A schedule function fills in where each
block comes from and, for backward, where its dK/dV goes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cpflex.sharding.layout import Layout
from cpflex.tile_mask import TileMask

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

    sources: tuple[Source, ...]
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


ScheduleFn = Callable[[Layout, int, np.ndarray], tuple[Exchange, ...]]
"""(layout, rank, needed) -> the rank's exchanges; ``needed[rank, chunk]``: the rank's queries see a key of the chunk, bool."""


def ring(layout: Layout, rank: int, needed: np.ndarray) -> tuple[Exchange, ...]:
    """Whole shards travel from each rank to the next (Ring Attention, arXiv:2310.01889).

    All ranks make the same number of hops, the largest that any needs. In backward dK/dV follow their shard one hop behind, each rank
    adding its own, and the last one sends the sum home in one message.
    """
    world_size, shard = layout.world_size, ((0, layout.local_len),)
    num_hops = _hops_needed(layout, needed)
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
    return tuple(exchanges)


def _hops_needed(layout: Layout, needed: np.ndarray) -> int:
    ranks, chunks = np.nonzero(needed)
    return int(((ranks - layout.owner[chunks]) % layout.world_size).max(initial=0))
