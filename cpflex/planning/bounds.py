"""Bounds: what a schedule takes at least on a machine, known sooner than what it is predicted to take."""

from __future__ import annotations

import numpy as np

from cpflex.planning.predict import heads_us, outer_machine
from cpflex.planning.timing import BACKWARD_FLOPS
from cpflex.planning.traffic import Traffic
from cpflex.ring.schedule import hops_both_ways, hops_needed
from cpflex.topology import Machine, Topology


def least_us(family: str, traffic: Traffic, machine: Machine, degree: int = 1) -> int:
    """Forward and backward of the schedules of a family, at most what `predict` gives for any of them: what the busiest
    rank must compute and copy, or what the busiest links must carry, the longer in each pass.

    Args:
        family: "ring", "ring:both", "direct", "even", "relay" or "striped".
        traffic, machine, degree: as `predict` takes them.
    """
    outer = outer_machine(machine, degree)
    total = sum(map(max, _kernels_and_links_s(family, traffic, outer)))
    return int(total * 1e6) + heads_us(traffic.local_len // degree, degree, machine)


def waits_for_links(family: str, traffic: Traffic, machine: Machine) -> bool:
    """The busiest links carry longer than the busiest rank computes, in one of the passes."""
    return any(links > kernels for kernels, links in _kernels_and_links_s(family, traffic, machine))


def _kernels_and_links_s(family: str, traffic: Traffic, machine: Machine) -> list[tuple[float, float]]:
    """Of forward, and of backward."""
    if family.startswith("ring"):
        hops = (hops_needed(traffic.rows), 0) if family == "ring" else hops_both_ways(traffic.rows)
        kernels = [_ring_kernels_s(traffic, machine, hops, backward) for backward in (False, True)]
        links = _ring_links_s(traffic, machine.topology, max(hops))
    else:
        is_straight = family in ("direct", "even") or machine.topology.num_nodes(traffic.world_size) == 1
        kernels = [_kernels_s(traffic, machine, is_straight, backward) for backward in (False, True)]
        links = (_straight_links_s if is_straight else _leveled_links_s)(traffic, machine.topology)
    row_bytes = machine.heads.row_bytes, machine.heads.row_bytes + machine.heads.grad_row_bytes  # on one lane
    return [(kernels[backward], links * row_bytes[backward]) for backward in (0, 1)]


def _products_s(traffic: Traffic, machine: Machine, backward: bool) -> np.ndarray:
    flops = traffic.pairs.sum(axis=1) * float(machine.heads.flops_per_pair) * (BACKWARD_FLOPS if backward else 1.0)
    return flops / (machine.device.tflops * 1e12)


def _state_bytes(machine: Machine) -> float:
    """Of acc or dq of a query, read and written in fp32."""
    return machine.heads.query * (machine.heads.value_dim or machine.heads.dim) * 8.0


def _kernels_s(traffic: Traffic, machine: Machine, is_straight: bool, backward: bool) -> float:
    """Needed rows are packed and joined once, and once more as gradients; who packs them is known if they go straight,
    else only how many they are in all.
    """
    device, heads = machine.device, machine.heads
    touched = np.minimum(traffic.touched.sum(axis=1) - np.diag(traffic.touched), traffic.local_len)
    row = 2.0 * heads.row_bytes + (3.0 * heads.grad_row_bytes if backward else 0.0)
    received, sent = traffic.rows.sum(axis=1), traffic.rows.sum(axis=0)
    moved = touched * _state_bytes(machine) + received * row
    done = _products_s(traffic, machine, backward) + moved / (device.memory_gb_per_s * 1e9)
    with_sent = done + sent * row / (device.memory_gb_per_s * 1e9)
    return float(with_sent.max()) if is_straight else max(float(done.max()), float(with_sent.mean()))


def _ring_kernels_s(traffic: Traffic, machine: Machine, hops: tuple[int, int], backward: bool) -> float:
    """Every hop reads and writes the state of what it touches, and passes two shards' gradients on."""
    size, moved = traffic.world_size, np.zeros(traffic.world_size)
    touched, there, back = traffic.by_distance[1], np.arange(1, hops[0] + 1), -np.arange(1, hops[1] + 1)
    steps = np.zeros((max(hops), size), dtype=np.int64)
    steps[: hops[0]] += touched[there]
    steps[: hops[1]] += touched[back]
    moved = np.minimum(steps, traffic.local_len).sum(axis=0) * _state_bytes(machine)
    if backward:
        moved = moved + 2.0 * sum(hops) * traffic.shard_len * 3.0 * machine.heads.grad_row_bytes
    done = _products_s(traffic, machine, backward) + moved / (machine.device.memory_gb_per_s * 1e9)
    return float(done.max())


# -- seconds of the busiest links, for a byte of each row


def _ring_links_s(traffic: Traffic, topology: Topology, hops: int) -> float:
    one_node = topology.num_nodes(traffic.world_size) == 1
    return hops * traffic.shard_len / ((topology.intra_gb_per_s if one_node else topology.nic_gb_per_s) * 1e9)


def _straight_links_s(traffic: Traffic, topology: Topology) -> float:
    """Of the busiest rank: inside its node, or across."""
    node = np.arange(traffic.world_size) // topology.gpus_per_node
    across, most = node[:, None] != node, 0.0
    for which, rate in ((~across, topology.intra_gb_per_s), (across, topology.nic_gb_per_s)):
        rows = np.where(which, traffic.rows, 0)
        most = max(most, max(int(rows.sum(axis=0).max()), int(rows.sum(axis=1).max())) / (rate * 1e9))
    return most


def _leveled_links_s(traffic: Traffic, topology: Topology) -> float:
    """Of the NICs of the busiest node, each row once."""
    size = traffic.world_size
    starts = np.arange(0, size, topology.gpus_per_node)
    across = traffic.by_owner(traffic.seen_by_nodes(topology.gpus_per_node))
    gpus = np.minimum(topology.gpus_per_node, size - starts)
    sent = np.add.reduceat(across.sum(axis=0), starts)
    return float((np.maximum(across.sum(axis=1), sent) / gpus).max()) / (topology.nic_gb_per_s * 1e9)
