"""balanced over nodes: fewer rows cross the network, and the work stays as equal."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest

import cpflex
from cpflex.sharding.nodes import estimated_ns
from cpflex.sharding.search import SLACK_PERMILLE
from cpflex.topology import Device, Heads, Machine

TOPOLOGY = cpflex.Topology.named("h100-ib")
SEQ_LEN = 1 << 16
WINDOW = 2048


@functools.cache
def starts() -> np.ndarray:
    """Where the document of each token starts: many short documents and a few long ones, in random order."""
    random = np.random.default_rng(0)
    lengths = np.minimum(np.exp(random.normal(7, 1.5, 1000)).astype(np.int64) + 1, SEQ_LEN // 8)
    ends = np.minimum(np.cumsum(lengths), SEQ_LEN)
    ends = np.append(ends[ends < SEQ_LEN], SEQ_LEN)
    return np.repeat(np.append(0, ends[:-1]), np.diff(np.append(0, ends)))


def masks() -> dict[str, cpflex.MaskMod]:
    cu = [*np.unique(starts()).tolist(), SEQ_LEN]
    documents = cpflex.causal() & cpflex.document(cu_seqlens=cu)
    return {
        "documents": documents,
        "documents within a window": documents & cpflex.sliding_window(WINDOW),
        "window": cpflex.causal() & cpflex.sliding_window(WINDOW),
    }


def first_key(mask: str) -> np.ndarray:
    """Of each query; it sees all keys from there to itself."""
    token = np.arange(SEQ_LEN)
    first = starts() if "documents" in mask else np.zeros_like(token)
    return np.maximum(first, token - WINDOW + 1) if "window" in mask else first


def node_rows(layout: cpflex.Layout, mask: str, size: int) -> np.ndarray:
    """Rows that each node needs of the others, token by token."""
    first, rows = first_key(mask), []
    for node in range(layout.world_size // size):
        change, held = np.zeros(SEQ_LEN + 1, dtype=np.int64), np.zeros(SEQ_LEN, dtype=bool)
        for start, stop in (run for runs in layout.fragments[node * size : (node + 1) * size] for run in runs):
            held[start:stop] = True
            np.add.at(change, first[start:stop], 1)
            np.add.at(change, np.arange(start, stop) + 1, -1)
        rows.append(np.count_nonzero((np.cumsum(change[:-1]) > 0) & ~held))
    return np.array(rows)


@functools.cache
def planned(mask: str, world_size: int, topology: cpflex.Topology | None = TOPOLOGY, rank: int = 0) -> cpflex.Plan:
    return cpflex.make_plan(masks()[mask], SEQ_LEN, rank=rank, world_size=world_size, topology=topology)


def busiest_node(mask: str, world_size: int, topology: cpflex.Topology | None) -> int:
    return node_rows(planned(mask, world_size, topology).layout, mask, TOPOLOGY.gpus_per_node).max()


@pytest.mark.parametrize("mask", ["documents", "documents within a window"])
def test_the_busiest_node_needs_half_the_rows_of_a_flat_deal_and_work_is_as_equal(mask: str):
    assert busiest_node(mask, 32, TOPOLOGY) <= busiest_node(mask, 32, None) / 2
    assert planned(mask, 32).stats["imbalance"] <= 1 + SLACK_PERMILLE / 1000


def test_where_the_network_takes_longer_than_the_work_rows_count_for_more():
    assert busiest_node("documents", 64, TOPOLOGY) <= busiest_node("documents", 64, None) / 2
    assert planned("documents", 64).stats["imbalance"] > 1 + SLACK_PERMILLE / 1000


def test_a_window_crosses_each_edge_between_nodes_once():
    rows = node_rows(planned("window", 32).layout, "window", TOPOLOGY.gpus_per_node)
    assert rows.max() <= 2 * WINDOW


@pytest.mark.parametrize("mask", ["documents", "window"])
def test_every_rank_finds_the_same_deal(mask: str):
    assert planned(mask, 32).layout.key == planned(mask, 32, rank=31).layout.key
    assert planned(mask, 32).layout.name == "balanced"


FLAT = {
    "one node": (8, TOPOLOGY),
    "nodes of one GPU": (8, dataclasses.replace(TOPOLOGY, gpus_per_node=1)),
    "a last node with fewer GPUs": (6, dataclasses.replace(TOPOLOGY, gpus_per_node=4)),
}


@pytest.mark.parametrize("case", FLAT)
def test_without_equal_nodes_all_ranks_are_dealt_to_alike(case: str):
    world_size, topology = FLAT[case]
    assert planned("documents", world_size, topology).layout.key == planned("documents", world_size, None).layout.key


@pytest.mark.parametrize("gpus_per_node", [2, 8])
@pytest.mark.parametrize("mask", ["documents", "window", "causal"])
def test_a_deal_is_estimated_to_take_no_longer_than_zigzag(mask: str, gpus_per_node: int):
    seen = []
    topology = dataclasses.replace(TOPOLOGY, gpus_per_node=gpus_per_node)

    def looked_at(layout, seq_len, world_size, work):
        table = layout(seq_len, world_size, work)
        seen.append(estimated_ns(table, work(table.chunk_len, table.num_chunks), work.weights, work.machine))
        return table

    for layout in (cpflex.balanced, cpflex.zigzag):
        mask_mod = cpflex.causal() if mask == "causal" else masks()[mask]
        taken = functools.partial(looked_at, layout)
        cpflex.make_plan(mask_mod, SEQ_LEN, rank=0, world_size=16, layout=taken, topology=topology)
    assert seen[0] <= 1.01 * seen[1]


def test_the_estimate_of_a_known_deal_is_known():
    """Two nodes of two GPUs, a dense causal mask, one piece each: the last GPU computes 7 of 16 parts, the second node
    needs the 2 pieces of the first.
    """
    topology = cpflex.Topology(2, intra_gb_per_s=100.0, inter_gb_per_s=10.0)
    machine = Machine(topology, Device(tflops=1.0), Heads())
    found = []

    def looked_at(seq_len, world_size, work):
        table = cpflex.contiguous(seq_len, world_size)
        found.append(estimated_ns(table, work(table.chunk_len, table.num_chunks), work.weights, work.machine))
        return table

    cpflex.make_plan(
        cpflex.causal(), 4096, rank=0, world_size=4, layout=looked_at, topology=topology, device=machine.device
    )
    pairs = 1024 * 3072 + 128 * 128 * 36  # tiles of the last piece: all of three pieces, and of its own half
    compute_s = 3.5 * pairs * 4 * 32 * 128 / 1e12
    row = 8 * 256 * 2
    network_s = 2048 * (row + 2 * row) / 20e9  # K/V in forward; in backward their gradients back, which is more
    assert found == [pytest.approx(1e9 * (max(compute_s, network_s) + min(compute_s, network_s) / 5), rel=1e-6)]
