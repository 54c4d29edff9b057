"""Nodes: chunks dealt out over the nodes of a group first, then over the GPUs of each.

A row that several GPUs of a node need crosses the network once and fans out inside, and its gradients are added inside
before they cross back. So a deal over nodes looks at what nodes need, and the deal inside at what their GPUs do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from cpflex.sharding.layout import ChunkNeeds, ChunkWork, Layout, aligned_chunk_len, work_per_rank
from cpflex.sharding.search import (
    SLACK_PERMILLE,
    Deal,
    Problem,
    contiguous_deal,
    least_overload,
    longest_first,
    refine,
    zigzag_deal,
)
from cpflex.topology import Machine

NODE_SLACK_PERMILLE, GPU_SLACK_PERMILLE = 15, 10
"""How far above the mean work a node may go, and a GPU above the mean of its node: messages hide behind work, so that
less of them is worth less than in one node.
"""

CHUNKS_PER_NODE = 16
"""At most so many chunks per node are dealt over the nodes; then they are cut further."""

ENOUGH_PERMILLE = 20
"""How far above the least time a deal may be that is searched no further."""

MAX_COUNTS, MAX_CHUNKS = 2, 4096
"""Numbers of chunks per rank that are tried; of all ranks, where more than one is."""

NODE_LOOKS, GPU_LOOKS = 60, 24
"""Looks in the refinement of one deal over nodes, and of one inside a node."""

EXPOSED = 5
"""Of the shorter of computing and messages one in so many is not hidden: the first stage's, or the last's."""

Needs = Mapping[str, ChunkNeeds]


def over_nodes(seq_len: int, world_size: int, counts: list[int], work: ChunkWork, machine: Machine) -> Layout | None:
    """`balanced` of several nodes: of the deals tried, the one with the least estimated time of forward and backward.
    None where all ranks are of one node, or nodes have unequally many.

    Args:
        counts: chunks per rank that may be tried, rising.
    """
    size = machine.topology.gpus_per_node
    num_nodes, rest = divmod(world_size, size)
    if num_nodes < 2 or size == 1 or rest:
        return None
    best: tuple[int, Layout] | None = None
    counts = [count for count in counts[:MAX_COUNTS] if count == counts[0] or world_size * count <= MAX_CHUNKS]
    for count in counts:
        chunk_len, num_chunks = aligned_chunk_len(seq_len, world_size * count), world_size * count
        needs = work(chunk_len, num_chunks)
        if count < counts[-1] and least_overload(needs, world_size) > 1:
            continue
        least = _least_ns(needs, work.weights, machine, world_size)
        for deal in _deals(needs, work.weights, machine, num_nodes, count):
            table = Layout(seq_len, chunk_len, tuple(tuple(sorted(held)) for held in deal.tolist()), "balanced")
            cost = estimated_ns(table, needs, work.weights, machine)
            if best is None or cost < best[0]:
                best = cost, table
            if best[0] * 1000 <= least * (1000 + ENOUGH_PERMILLE):
                return best[1]
        assert best is not None, "every number of chunks gives deals"
        if all(_is_even(work_per_rank(best[1], one)) for one in work(best[1].chunk_len, best[1].num_chunks).values()):
            break
    assert best is not None, "some number of chunks is searched"
    return best[1]


def _is_even(load: np.ndarray) -> bool:
    return int(load.max()) * len(load) * 1000 <= int(load.sum()) * (1000 + SLACK_PERMILLE)


def _deals(
    needs: Needs, weights: Mapping[str, float], machine: Machine, num_nodes: int, count: int
) -> Iterator[np.ndarray]:
    """Deals of the chunks to ranks, the cheapest to find first; int64 [world_size, count]."""
    world_size, per_node = num_nodes * machine.topology.gpus_per_node, machine.topology.gpus_per_node * count
    whole = Problem.of(needs, weights, world_size, 0.0)
    yield zigzag_deal(whole)
    yield contiguous_deal(whole)
    cut = next(cut for cut in range(1, per_node + 1) if per_node % cut == 0 and per_node // cut <= CHUNKS_PER_NODE)
    coarse = {kind: _merged(one, cut) for kind, one in needs.items()}
    nodes = min(_over_nodes(coarse, weights, num_nodes), key=lambda deal: _node_ns(deal, coarse, weights, machine))
    held = (nodes[:, :, None] * cut + np.arange(cut)).reshape(num_nodes, per_node)
    deal = np.concatenate([_inside(whole, np.sort(ids), machine) for ids in held])
    yield refine(whole, deal, most_looks=1)  # a node may hold one heavy chunk more than it has GPUs


def _merged(needs: ChunkNeeds, cut: int) -> ChunkNeeds:
    """Of chunks ``cut`` times as long."""
    work = needs.work.reshape(-1, cut).sum(axis=1)
    sees = np.logical_or.reduce(needs.sees.reshape(len(work), cut, needs.sees.shape[1]), axis=1)
    return replace(needs, work=work, sees=sees, block_chunk=needs.block_chunk // cut)


def _over_nodes(needs: Needs, weights: Mapping[str, float], num_nodes: int) -> list[np.ndarray]:
    """int64 [nodes, chunks per node]."""
    problem = Problem.of(needs, weights, num_nodes, 0.0)
    problem = replace(problem, limit=problem.work.sum(axis=1) * (1000 + NODE_SLACK_PERMILLE) // (1000 * num_nodes))
    starts = [contiguous_deal(problem), zigzag_deal(problem), longest_first(problem)]
    return [refine(problem, start, NODE_LOOKS) for start in starts]


def _node_ns(deal: np.ndarray, needs: Needs, weights: Mapping[str, float], machine: Machine) -> int:
    """Of a deal over nodes, as `estimated_ns`, but for what happens inside."""
    total = 0.0
    for kind in sorted(needs):
        one = needs[kind]
        load = int(one.work[deal].sum(axis=1).max()) / machine.topology.gpus_per_node
        owner = np.empty(deal.size, dtype=np.int64)
        owner[deal] = np.arange(len(deal))[:, None]
        seen = np.stack([one.sees[held].any(axis=0) for held in deal])
        total += weights[kind] * _together(_compute_s(load, machine), _network_s(seen, owner, one, machine))
    return round(1e9 * total)


def _inside(whole: Problem, ids: np.ndarray, machine: Machine) -> np.ndarray:
    """The chunks of a node dealt to its GPUs, int64 [gpus, count]."""
    size = machine.topology.gpus_per_node
    work = whole.work[:, ids]
    limit = work.sum(axis=1) * (1000 + GPU_SLACK_PERMILLE) // (1000 * size)
    part = replace(whole, world_size=size, work=work, limit=limit, sees=whole.sees[:, ids], holds=whole.holds[ids])
    starts = [zigzag_deal(part), longest_first(part)]
    deals = [refine(part, start, GPU_LOOKS) for start in starts]
    return ids[min(deals, key=lambda deal: Deal(part, deal).cost())]


def estimated_ns(layout: Layout, needs: Needs, weights: Mapping[str, float], machine: Machine) -> int:
    """Forward and backward of all kinds, in whole ns, so that hosts that round differently agree: what the slowest GPU
    computes beside what the busiest NICs and GPUs move, the longer and a part of the shorter.
    """
    total = 0.0
    for kind in sorted(needs):
        one = needs[kind]
        owner, size = one.held_by(layout.owner), machine.topology.gpus_per_node
        seen = np.stack([one.sees[list(held)].any(axis=0) for held in layout.chunks])
        inside = int(((seen & (owner != np.arange(len(seen))[:, None])) @ one.block_len).max())
        row = 2 * machine.heads.row_bytes + machine.heads.grad_row_bytes
        fanned_s = inside * row / (machine.topology.intra_gb_per_s * 1e9)
        nodes = np.logical_or.reduce(seen.reshape(len(seen) // size, size, len(owner)), axis=1)
        moved = max(fanned_s, _network_s(nodes, layout.owner // size, one, machine))
        load = int(work_per_rank(layout, one).max())
        total += weights[kind] * _together(_compute_s(load, machine), moved)
    return round(1e9 * total)


def _least_ns(needs: Needs, weights: Mapping[str, float], machine: Machine, world_size: int) -> int:
    """Of an even deal without messages."""
    loads = {kind: _compute_s(int(one.work.sum()) / world_size, machine) for kind, one in needs.items()}
    return round(1e9 * sum(weights[kind] * loads[kind] for kind in sorted(needs)))


def _together(compute_s: float, moved_s: float) -> float:
    return max(compute_s, moved_s) + min(compute_s, moved_s) / EXPOSED


def _compute_s(pairs: float, machine: Machine) -> float:
    """Forward, and backward at 2.5 times as much."""
    return 3.5 * pairs * machine.heads.flops_per_pair / (machine.device.tflops * 1e12)


def _network_s(seen: np.ndarray, owner: np.ndarray, needs: ChunkNeeds, machine: Machine) -> float:
    """Of the busiest node: K/V rows cross once per node that needs them, twice, and their gradients go back.

    Args:
        seen: by node, bool [nodes, blocks].
        owner: node of each chunk.
    """
    topology, heads = machine.topology, machine.heads
    holder = needs.held_by(owner, machine.topology.gpus_per_node)
    crosses = seen & (holder != np.arange(len(seen))[:, None])
    received = crosses @ needs.block_len
    sent = np.bincount(holder, crosses.sum(axis=0) * needs.block_len, len(seen))
    forward = np.maximum(received, sent) * heads.row_bytes
    there = received * heads.row_bytes + sent * heads.grad_row_bytes
    back = sent * heads.row_bytes + received * heads.grad_row_bytes
    rate = topology.nic_gb_per_s * topology.gpus_per_node / topology.oversubscription * 1e9
    return float((forward + np.maximum(there, back)).max()) / rate
