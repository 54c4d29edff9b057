"""Stages of the two-level schedules: rows cross to a node once, and fan out inside it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from cpflex.planning.stages import Flow, Stage, between, merged, own_stage, with_share
from cpflex.planning.traffic import Traffic
from cpflex.ring.two_level import OWN_NODE, Nodes


class Leveled(NamedTuple):
    """Rows of the own node, straight, and parts of the rows of other nodes, leg by leg."""

    rows: list[np.ndarray]
    """What rank r computes with of rank o, [world_size (r), world_size (o)]: of the own node, then of each part."""
    straight: Flow
    """Of the own node."""
    legs: list[list[Flow]]
    """The ways of each part, the last one first: fan-out, crossing, spread."""


def relay(traffic: Traffic, gpus_per_node: int, parts: Sequence[int], stripe: bool = False) -> list[Stage]:
    """A part fans out in the exchange of its own step, each leg before it in the exchange before; dK/dV go back leg by
    leg, the last ones after the last step.
    """
    nodes = Nodes(traffic.world_size, gpus_per_node)
    rows, straight, legs = leveled(traffic, nodes, parts, stripe)
    crosses = any(len(flow.source) for flows in legs for flow in flows)
    num_steps = OWN_NODE + 1 + len(parts) * crosses
    arriving: list[list[Flow]] = [[] for _ in range(num_steps)]
    returning: list[list[Flow]] = [[] for _ in range(num_steps + 2 + len(parts))]
    arriving[OWN_NODE].append(straight)
    returning[OWN_NODE].append(straight.back)
    for step, flows in enumerate(legs if crosses else [], OWN_NODE + 1):
        for ahead, flow in enumerate(flows):
            arriving[step - ahead].append(flow)
            returning[step + ahead].append(flow.back)
    stages = [replace(own_stage(traffic), arrives=merged(arriving[0]))]
    for share, come, go in zip(rows, arriving[1:], returning[1:], strict=False):
        stages.append(with_share(traffic, share, merged(come), merged(go)))
    none = np.zeros(traffic.world_size)
    later = itertools.takewhile(len, returning[num_steps:])
    return stages + [Stage(none, none, returns=merged(go), computes=False) for go in later]


def leveled(traffic: Traffic, nodes: Nodes, parts: Sequence[int], stripe: bool = False) -> Leveled:
    """Rows that a node needs of an owner, cut in proportion to ``parts``, each crossing once: to the GPU on the owner's
    rail, or striped over the node's NICs.
    """
    if (nodes.gpus_per_node, stripe) not in traffic.ways:
        traffic.ways[nodes.gpus_per_node, stripe] = _ways(traffic, nodes, stripe)
    ways, size = traffic.ways[nodes.gpus_per_node, stripe], traffic.world_size
    part = _part_of_blocks(traffic, ways.needed, parts)
    across = _sums(
        part[ways.needed], ways.carrier_and_node, traffic.length[ways.crossing], (len(parts), size, nodes.count)
    )
    at, tokens = part.ravel()[ways.node_and_block], traffic.length[ways.block]
    computed = _sums(at, ways.rank_and_owner, tokens, (len(parts), size, size))
    inside = _sums(at, ways.relay_and_rank, tokens, (len(parts), size, size))
    own = np.where(nodes.of[:, None] == nodes.of, traffic.rows, 0)
    legs = []
    for index in range(len(parts)):
        source, to = np.nonzero(across[index])
        legs.append([
            _flow(inside[index], *np.nonzero(inside[index])),
            _flow(across[index][source, to], source, nodes.relay(source, to)),
        ])  # fmt: skip
        if stripe:
            leaves, owner = (part == index).any(axis=0), traffic.owner
            spread = np.bincount(
                owner[leaves] * size + ways.carrier[leaves], traffic.length[leaves], size * size
            ).reshape(size, size)
            legs[-1].append(_flow(spread, *np.nonzero(spread)))
    return Leveled([own, *computed], between(own, *np.nonzero(own)), legs)


class _Ways(NamedTuple):
    """The ways of blocks to nodes and to ranks, however they are cut into parts; an index of two is in the array of the
    first, times the number of the second.
    """

    needed: np.ndarray  # a rank of the node needs the block of another node, bool [nodes, blocks]
    carrier: np.ndarray  # who sends it to other nodes, int64 [blocks]
    crossing: np.ndarray  # blocks by the nodes that need them, int64 [crossings]
    carrier_and_node: np.ndarray  # int64 [crossings]
    block: np.ndarray  # blocks by the ranks of other nodes that need them, int64 [arrivals]
    node_and_block: np.ndarray  # int64 [arrivals], each
    rank_and_owner: np.ndarray
    relay_and_rank: np.ndarray


def _ways(traffic: Traffic, nodes: Nodes, stripe: bool) -> _Ways:
    owner, size = traffic.owner, traffic.world_size
    carrier = owner
    if stripe:
        place = np.arange(len(owner)) - traffic.first_block[owner]
        carrier = nodes.of[owner] * nodes.gpus_per_node + place % nodes.size[nodes.of[owner]]
    needed = traffic.seen_by_nodes(nodes.gpus_per_node)
    to, crossing = np.nonzero(needed)
    rank, block = np.nonzero(traffic.sees & needed[nodes.of])
    node = nodes.of[rank]
    return _Ways(
        *(needed, carrier, crossing, carrier[crossing] * nodes.count + to, block),
        node_and_block=node * len(owner) + block,
        rank_and_owner=rank * size + owner[block],
        relay_and_rank=nodes.relay(carrier[block], node) * size + rank,
    )


def _sums(first: np.ndarray, others: np.ndarray, weight: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Weights by an index and two more in one, float64 of the shape."""
    index = first * (shape[1] * shape[2]) + others
    return np.bincount(index, weight, shape[0] * shape[1] * shape[2]).reshape(shape)


def _part_of_blocks(traffic: Traffic, needed: np.ndarray, parts: Sequence[int]) -> np.ndarray:
    """The part in which a block crosses to a node, -1 if it does not: int64 [nodes, blocks]."""
    before = needed.cumsum(axis=1) - needed
    first = before[:, traffic.first_block]
    last = np.append(first[:, 1:], needed.sum(axis=1)[:, None], axis=1)
    phase = np.add.outer(np.arange(len(needed)), np.arange(traffic.world_size)) % sum(parts)
    part = np.zeros(needed.shape, dtype=np.int64)
    for share in itertools.accumulate(parts[:-1]):
        end = first + ((last - first) * share + phase) // sum(parts)
        part += before >= end[:, traffic.owner]
    return np.where(needed, part, -1)


def _flow(rows: np.ndarray, source: np.ndarray, target: np.ndarray) -> Flow:
    """Messages to others; ``rows``: of each, or of each pair of ranks."""
    count = rows[source, target] if rows.ndim > 1 else rows
    kept = source != target
    return Flow(source[kept], target[kept], count[kept])
