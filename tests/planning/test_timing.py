"""The engine of predictions: cases computed by hand, and against one that goes event by event."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

import cpflex
import fluid
from cpflex.planning.make import traced
from cpflex.planning.needs import classifier
from cpflex.planning.predict import predict
from cpflex.planning.timing import Batch, Collective, Kernels, Program, run
from cpflex.planning.traffic import Traffic, traffic_of
from cpflex.sharding.layout import zigzag
from cpflex.tile_mask import Tiles
from cpflex.topology import Device, Heads, Machine, Topology

# 100 bytes a second inside a node of two, 10 across; latencies of 0.1 and 0.5 s
TOY = Topology(2, 100e-9, 10e-9, intra_latency_us=1e5, inter_latency_us=5e5, message_us=0.0)


def batch(source: list[int], target: list[int], size: list[float], after: tuple[int, ...] = (), **more: str) -> Batch:
    return Batch(np.array(source), np.array(target), np.array(size), after, **more)


def ring_of_four() -> Program:
    """Shards of 10 bytes; kernels of 1 s; the link between nodes takes 1.5 s a hop."""
    following = [1, 2, 3, 0]
    steps: list[Batch | Collective | Kernels] = [batch([0, 1, 2, 3], following, [10.0] * 4), Kernels(np.ones(4))]
    for arrived, computed in ((0, 1), (2, 3)):
        steps.append(batch([0, 1, 2, 3], following, [10.0] * 4, (arrived, computed)))
        steps.append(Kernels(np.ones(4), (arrived,)))
    return [*steps, Kernels(np.ones(4), (4,))]


@dataclass(frozen=True)
class ByHand:
    program: Program
    world_size: int
    end: float
    topology: Topology = TOY
    lead: float = 0.0


BY_HAND = {
    # 0.1 + 50 / 100, then a kernel of 1 s
    "a message, then a kernel": ByHand(
        [batch([0], [1], [50.0]), Kernels(np.array([0.5, 0.0])), Kernels(np.array([0.0, 1.0]), (0,))], 2, 1.6
    ),
    # 0.5 + (5 + 15) / 10
    "two messages of one NIC": ByHand([batch([0, 0], [2, 3], [5.0, 15.0])], 4, 2.5),
    "two senders to one NIC": ByHand([batch([0, 2], [4, 4], [10.0, 10.0])], 6, 2.5),
    # inside and across at once: the longer of 0.1 + 300 / 100 and 0.5 + 10 / 10
    "both kinds of links at once": ByHand([batch([0, 0], [1, 2], [300.0, 10.0])], 4, 3.1),
    # the lane is held: 1.5 + 1.5
    "two batches on one lane": ByHand([batch([0], [2], [10.0]), batch([0], [3], [10.0])], 4, 3.0),
    "two batches on two lanes": ByHand([batch([0], [2], [10.0]), batch([1], [3], [10.0], lane="other")], 4, 1.5),
    # hops end after 1.5, 3 and 4.5 s, and one kernel follows
    "a ring over two nodes": ByHand(ring_of_four(), 4, 5.5),
    "a slow host": ByHand([Kernels(np.ones(2), (), 2.0), Kernels(np.ones(2), (), 2.0)], 2, 5.0),
    "a host that is ahead": ByHand([Kernels(np.ones(2), (), 2.0), Kernels(np.ones(2), (), 2.0)], 2, 3.0, lead=2.0),
    "a collective waits for all": ByHand(
        [Kernels(np.array([1.0, 3.0])), Collective(2.0, after=(0,)), Kernels(np.ones(2), (1,))], 2, 6.0
    ),
    # one NIC for two GPUs: 5 bytes a second each
    "a shared NIC": ByHand([batch([0], [2], [10.0])], 4, 2.5, replace(TOY, nics_per_node=1)),
    # 20 bytes a second into the node, halved above it
    "an oversubscribed network": ByHand(
        [batch([0, 1], [2, 3], [10.0, 10.0])], 4, 2.5, replace(TOY, oversubscription=2.0)
    ),
    "more for each peer": ByHand([batch([0, 0], [1, 2], [0.0, 0.0])], 3, 1.5, replace(TOY, message_us=5e5)),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_what_is_easily_computed_by_hand_comes_out(name: str):
    case = BY_HAND[name]
    found = run(case.program, case.world_size, case.topology, case.lead)
    assert found.makespan == pytest.approx(case.end)
    assert fluid.makespan(case.program, case.world_size, case.topology, case.lead) == pytest.approx(case.end)


def test_bytes_that_cross_are_counted_where_they_leave():
    found = run([batch([0, 0, 2], [1, 2, 1], [7.0, 10.0, 20.0]), Collective(1.0, 5.0)], 4, TOY)
    assert found.bytes_across.tolist() == [15.0, 5.0, 25.0, 5.0]


def tables(mask: cpflex.MaskMod, seq_len: int, world_size: int) -> Traffic:
    layout = zigzag(seq_len, world_size)
    mod = traced(mask, seq_len, None, None, {})
    return traffic_of(classifier(mod, 1, 1), layout, Tiles(layout.chunk_len, layout.num_chunks))


DOCUMENTS = cpflex.causal() & cpflex.document(cu_seqlens=[0, 3000, 9000, 9500, 20000, 21000, 30000, 1 << 15])
MACHINE = Machine(Topology(4, 370.0, 47.0), Device(tflops=50.0), Heads())


@pytest.mark.parametrize("mask", [cpflex.causal(), DOCUMENTS], ids=["causal", "documents"])
@pytest.mark.parametrize("schedule", ["ring", "ring:both", "direct", "gather", "even:3/2/1", "relay:2", "striped:2"])
def test_messages_that_share_links_by_the_batch_end_as_those_that_share_them_by_the_moment(
    schedule: str, mask: cpflex.MaskMod
):
    """The fast engine lets every message of a batch take as long as its busiest link; the slow one shares links anew
    at every event. They differ where a batch is uneven, by little.
    """
    found = predict(schedule, tables(mask, 1 << 15, 8), MACHINE)
    for timeline in (found.forward, found.backward):
        exact = fluid.makespan(timeline.program, 8, MACHINE.topology, MACHINE.device.lead_us * 1e-6)
        assert timeline.makespan == pytest.approx(exact, rel=0.06)
