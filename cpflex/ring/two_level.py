"""Two levels: K/V rows that a node needs cross to it once and fan out inside; dK/dV are added inside before they cross
back once.

Who passes on what is said in ids: tile t of owner o's shard is ``o * T + t``, and a block is a list of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from cpflex.ring.schedule import (
    Exchange,
    Needs,
    Rows,
    Schedule,
    ScheduleFn,
    Source,
    Stages,
    Transfer,
    cut,
    even,
    name_of,
    parts_of,
    remote_stages,
    rows_of,
    straight,
    with_name,
)
from cpflex.sharding.layout import Layout

OWN_NODE = 1
"""The step of the own node's rows; stage s of the others' is step s + 2."""


def relay(stages: Stages, stripe: bool = False) -> ScheduleFn:
    """Rows of an owner that any rank of another node needs cross to that node once, to the GPU with the owner's place
    there (its rail), which passes them on inside. Rows of the own node come straight, in a stage before; those of other
    nodes in as many stages, or in the proportions given.

    In backward dK/dV of a stage are added where the rows were passed on, in a fixed order, and cross back once. While a
    stage is computed the next one fans out and the one after it crosses. So a rank holds its block and the next one as
    with `even`, the rows that it passes on, and those that it will pass on next: `most_rows` counts them.

    Node unions and rails are those of hierarchical all-to-all (DeepSeek-V3's dispatch, arXiv:2412.19437, section 3.2.2,
    sends a token over InfiniBand once per node).

    Args:
        stripe: deal each owner's rows out to all GPUs of its node first, tile by tile, so that all NICs carry alike
            even where some shards are needed much more than others. These rows are held a stage longer.

    >>> cpflex.make_plan(mask, seq_len, group, topology=cpflex.Topology.named("h100-ib"), schedule=cpflex.relay(2))

    Raises:
        ValueError: no stage, or one of no share; when it plans, also that the topology is not known.
    """
    parts = parts_of(stages)
    name = f"{'striped' if stripe else 'relay'}:{name_of(parts)}"

    def on_two_levels(layout: Layout, rank: int, needs: Needs) -> Schedule:
        if needs.machine is None:
            raise ValueError(
                f"schedule {name} must know which ranks share a node - pass topology=cpflex.Topology(...) to make_plan"
            )
        nodes = Nodes(layout.world_size, needs.machine.topology.gpus_per_node)
        if nodes.count == 1:
            reason = f"{name} was asked for; all ranks are on one node"
            return replace(even(stages)(layout, rank, needs), reason=reason)
        return _relay(name, parts, stripe, layout, rank, needs, nodes)

    return with_name(on_two_levels, name)


class Nodes:
    """The ranks of a group by node: rank r has place ``r % gpus_per_node`` there. The last node may be smaller."""

    def __init__(self, world_size: int, gpus_per_node: int) -> None:
        self.gpus_per_node = gpus_per_node
        self.of = np.arange(world_size) // gpus_per_node
        self.size = np.bincount(self.of)
        self.count = len(self.size)

    def ranks(self, node: int) -> range:
        """The ranks of a node."""
        first = node * self.gpus_per_node
        return range(first, first + int(self.size[node]))

    def ends(self, rank: int) -> list[tuple[int, int]]:
        """The other ranks of its node in turn, from the next on and from the previous back."""
        mates = self.ranks(int(self.of[rank]))
        place = rank - mates[0]
        return [(mates[(place + d) % len(mates)], mates[(place - d) % len(mates)]) for d in range(1, len(mates))]

    def relay(self, carrier: np.ndarray | int, node: np.ndarray | int) -> np.ndarray:
        """The rank of a node to which a rank of another sends: that of its place, modulo the size of the node."""
        return node * self.gpus_per_node + np.asarray(carrier) % self.gpus_per_node % self.size[node]

    def carrier(self, num_tiles: int, stripe: bool) -> np.ndarray:
        """Who sends each tile of each owner to other nodes, int64 [world_size (owner), T]: the owner, or the ranks of
        its node in turn.
        """
        owner = np.arange(len(self.of))[:, None]
        if not stripe:
            return np.broadcast_to(owner, (len(self.of), num_tiles))
        return self.of[:, None] * self.gpus_per_node + np.arange(num_tiles) % self.size[self.of][:, None]


class _Leg(NamedTuple):
    """Messages of one kind, of one stage."""

    sends: tuple[Transfer, ...] = ()
    receives: tuple[Transfer, ...] = ()


class _Block:
    """Where the tiles of a block are."""

    def __init__(self, index: int, ids: np.ndarray, num_ids: int, length: np.ndarray) -> None:
        """``length``: of each tile of a shard, int64 [T]."""
        self.index, self.ids, self.length = index, ids, length
        self.start = np.zeros(num_ids, dtype=np.int64)
        self.start[ids] = np.cumsum(length[ids % len(length)]) - length[ids % len(length)]

    def rows(self, ids: np.ndarray) -> Rows:
        """Of some tiles, in the order given."""
        begin = self.start[ids]
        end = begin + self.length[ids % len(self.length)]
        breaks = np.flatnonzero(begin[1:] != end[:-1]) + 1
        firsts, lasts = np.append(0, breaks), np.append(breaks, len(ids)) - 1
        return tuple(zip(begin[firsts].tolist(), end[lasts].tolist(), strict=True))

    def transfers(self, parts: Iterable[tuple[int, np.ndarray]]) -> tuple[Transfer, ...]:
        """To or from the peers, in this order; without those of no tile."""
        return tuple(Transfer(peer, self.index, self.rows(ids)) for peer, ids in parts if len(ids))


class _Duties:
    """What one rank needs, sends and passes on, by stage. Each leg lists first the rank itself, then others rising:
    the order in which gradients are added.
    """

    def __init__(
        self, parts: tuple[int, ...], stripe: bool, layout: Layout, rank: int, needs: Needs, nodes: Nodes
    ) -> None:
        self.parts, self.stripe, self.rank, self.needs, self.nodes = parts, stripe, rank, needs, nodes
        self.node = int(nodes.of[rank])
        self.mates = [rank, *(r for r in nodes.ranks(self.node) if r != rank)]
        self.others = [n for n in range(nodes.count) if n != self.node]
        self.length = np.diff(needs.tile_starts)
        self.shape = layout.world_size, len(self.length)
        self.carrier = nodes.carrier(len(self.length), stripe)
        self.relay = nodes.relay(self.carrier, self.node)
        self.is_outside = nodes.of != self.node
        self.owners = self.mates if stripe else [rank]  # whose rows this rank sends to other nodes

    @cached_property
    def stage(self) -> np.ndarray:
        """At which stage this node has each tile, int64 [world_size (owner), T]."""
        return self._stages(np.where(self.is_outside, -1, 0), [self.node], range(self.shape[0]))[0]

    def _stages(self, line: np.ndarray, nodes: Sequence[int], owners: Sequence[int]) -> np.ndarray:
        """What each node, a line of ranks, foresees of an owner, cut alike by all; int64 [nodes, owners, T]."""
        return cut(self.needs.foreseen(line, owners), self.parts, np.add.outer(nodes, owners))

    @cached_property
    def needed(self) -> np.ndarray:
        """Tiles of other nodes that this rank needs, bool [world_size (owner), T]."""
        return self.needs.received & self.is_outside[:, None]

    @cached_property
    def passed_on(self) -> np.ndarray:
        """Tiles that come through this rank, for each of ``mates``; bool [mates, world_size (owner), T]."""
        line = np.full(self.shape[0], -1)
        line[self.mates] = np.arange(len(self.mates))
        return self.needs.seen(line, self.is_outside[:, None] & (self.relay == self.rank))

    @cached_property
    def carried(self) -> np.ndarray:
        """The stage at which this rank sends a tile to each of ``others``, -1 for never; int64 [others, owners, T]."""
        needed = self._needed_of_own[:, None]
        if self.stripe:
            columns = np.zeros(self.shape, dtype=bool)
            columns[self.owners] = self.carrier[self.owners] == self.rank
            needed = self.needs.seen(self._line_of_others, columns)[:, self.owners]
        return np.where(needed, self._stages(self._line_of_others, self.others, self.owners), -1)

    @cached_property
    def _line_of_others(self) -> np.ndarray:
        line = np.full(self.nodes.count, -1)
        line[self.others] = np.arange(len(self.others))
        return line[self.nodes.of]

    @cached_property
    def _needed_of_own(self) -> np.ndarray:
        """Tiles of this rank's shard that each of ``others`` needs, bool [others, T]."""
        return np.stack([self.needs.sent[list(self.nodes.ranks(node))].any(axis=0) for node in self.others])

    @cached_property
    def _stages_of_own(self) -> np.ndarray:
        """At which stage each of ``others`` has this rank's tiles, [others, T]."""
        return self._stages(self._line_of_others, self.others, [self.rank])[:, 0]

    def ids(self, tiles: np.ndarray, owners: Sequence[int] | None = None) -> np.ndarray:
        """Of tiles, bool [owners, T], by owner; ``owners`` are all ranks if None."""
        owner, tile = np.nonzero(tiles)
        return (owner if owners is None else np.asarray(owners)[owner]) * self.shape[1] + tile

    def block(self, index: int, ids: np.ndarray) -> _Block:
        """A block of these tiles."""
        return _Block(index, ids, self.shape[0] * self.shape[1], self.length)

    def by_carrier(self, ids: np.ndarray) -> np.ndarray:
        """The order in which rows cross."""
        return ids[np.argsort(self.carrier.reshape(-1)[ids], kind="stable")]

    def visiting(self, stage: int, step: int) -> _Block:
        """What is computed with. Owners of one rail are neighbours: they come together, if not striped."""
        ids = self.ids(self.needed & (self.stage == stage))
        rail = self.nodes.relay(ids // self.shape[1], self.node)
        return self.block(step, ids[np.argsort(rail, kind="stable")])

    def legs(self, stage: int, step: int, num_steps: int) -> tuple[_Block, list[_Leg]]:
        """What a stage is computed with, and its fan-out, crossing and spread."""
        own = self.block(0, self.rank * self.shape[1] + np.arange(self.shape[1]))
        visiting = self.visiting(stage, step)
        is_now = self.stage == stage
        landed = self.block(num_steps + step, self.by_carrier(self.ids(self.passed_on.any(axis=0) & is_now)))
        relays, carriers = (x.reshape(-1) for x in (self.relay, self.carrier))
        arriving = self.by_carrier(np.sort(visiting.ids))
        passed_on = self.passed_on.reshape(len(self.mates), -1)
        fan_out = _Leg(
            landed.transfers((m, landed.ids[passed_on[i][landed.ids]]) for i, m in enumerate(self.mates)),
            visiting.transfers((m, arriving[relays[arriving] == m]) for m in self.mates),
        )
        sent = [self.ids(one == stage, self.owners) for one in self.carried]
        dealt = self.block(2 * num_steps + step, np.unique(np.concatenate(sent))) if self.stripe else own
        across = [int(self.nodes.relay(self.rank, node)) for node in self.others]
        crossing = _Leg(
            dealt.transfers((to, np.sort(ids)) for to, ids in zip(across, sent, strict=True)),
            landed.transfers(
                (c, landed.ids[carriers[landed.ids] == c]) for c in np.unique(carriers[landed.ids]).tolist()
            ),
        )
        if not self.stripe:
            return visiting, [fan_out, crossing]
        leaving = self.ids((self._needed_of_own & (self._stages_of_own == stage)).any(axis=0)[None], [self.rank])
        spread = _Leg(
            own.transfers((m, leaving[carriers[leaving] == m]) for m in self.mates),
            dealt.transfers((m, dealt.ids[dealt.ids // self.shape[1] == m]) for m in self.mates),
        )
        return visiting, [fan_out, crossing, spread]


def _relay(
    name: str, parts: tuple[int, ...], stripe: bool, layout: Layout, rank: int, needs: Needs, nodes: Nodes
) -> Schedule:
    received = _received(needs, nodes, parts, stripe)
    between = needs.tokens * (nodes.of[:, None] != nodes.of)
    local = Exchange(sources=(Source(rank, ((0, layout.local_len),)),))
    num_stages = len(parts) if between.any() else 0
    if not any(received):
        return Schedule(name, "asked for; no rank needs another's keys", (local,), received)
    exchanges = [local, straight(OWN_NODE, nodes.ends(rank), needs.rows_to, needs.rows_from)]
    num_steps = len(exchanges) + num_stages
    duties = _Duties(parts, stripe, layout, rank, needs, nodes)
    legs: dict[tuple[int, int], _Leg] = {}
    for stage in range(num_stages):
        step = len(exchanges)
        visiting, found = duties.legs(stage, step, num_steps)
        legs |= {(step, ahead): leg for ahead, leg in enumerate(found)}
        exchanges.append(Exchange(sources=_sources(visiting.ids, needs.tile_starts)))
    for step in range(num_steps):
        exchanges[step] = _with_legs(exchanges[step], step, legs)
    after = tuple(_with_legs(Exchange(), num_steps + late, legs) for late in range(2 if stripe else 1) if num_stages)
    exchanges[-1] = replace(exchanges[-1], after=after)
    reason = f"asked for; {remote_stages(num_stages)} after that of the own node, on {nodes.count} nodes"
    return Schedule(name, reason, tuple(exchanges), received)


def _with_legs(exchange: Exchange, step: int, legs: dict[tuple[int, int], _Leg]) -> Exchange:
    """With what travels at a step: K/V before their stage, the farther leg the earlier; dK/dV after it, the same way
    back.
    """
    there = [legs.get((step + ahead, ahead), _Leg()) for ahead in range(3)]
    back = [legs.get((step - ahead, ahead), _Leg()) for ahead in range(3)]
    return replace(
        exchange,
        sends=exchange.sends + tuple(itertools.chain(*(leg.sends for leg in there))),
        receives=exchange.receives + tuple(itertools.chain(*(leg.receives for leg in there))),
        grad_sends=exchange.grad_sends + tuple(itertools.chain(*(leg.receives for leg in back))),
        grad_receives=exchange.grad_receives + tuple(itertools.chain(*(leg.sends for leg in back))),
    )


def _sources(ids: np.ndarray, tile_starts: np.ndarray) -> tuple[Source, ...]:
    """Tiles in their order, which is rising for each owner, as rows of owners."""
    num_tiles = len(tile_starts) - 1
    owners = ids // num_tiles
    firsts = np.flatnonzero(np.diff(owners, prepend=-1))
    sources = []
    for own in np.split(ids, firsts[1:]) if len(ids) else []:
        needed = np.zeros(num_tiles, dtype=bool)
        needed[own % num_tiles] = True
        sources.append(Source(int(own[0] // num_tiles), rows_of(needed, tile_starts)))
    return tuple(sources)


def _received(needs: Needs, nodes: Nodes, parts: tuple[int, ...], stripe: bool) -> tuple[int, ...]:
    """Rows that each rank receives, its own and those that it passes on; never too few."""
    ranks, tokens = np.arange(len(nodes.of)), needs.tokens
    received = tokens.sum(axis=1) - np.diag(tokens)
    of_node = needs.tokens_of(nodes.of)
    of_node = np.where(np.arange(nodes.count)[:, None] == nodes.of, 0, of_node)
    # a rank of a node deals itself so much of a shard at most
    dealt = -(-(len(needs.tile_starts) - 1) // nodes.size[nodes.of]) * int(np.diff(needs.tile_starts).max())
    for rank in ranks.tolist():
        node = int(nodes.of[rank])
        comes = nodes.relay(ranks, node) == rank
        if not stripe:
            received[rank] += of_node[node, comes].sum() - tokens[rank, comes & (nodes.of != node)].sum()
            continue
        from_node = np.bincount(nodes.of, np.minimum(of_node[node], dealt), nodes.count).astype(np.int64)
        mates = [r for r in nodes.ranks(node) if r != rank]
        received[rank] += from_node[nodes.of[comes]].sum()
        received[rank] += np.minimum(of_node.sum(axis=0), len(parts) * dealt)[mates].sum()
    return tuple(received.tolist())
