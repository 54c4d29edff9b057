"""How other libraries would fare on the same mask and machine, by the same model: what each sends, when, on which lane.

Each assumption is said where it is made; docs/scale.md lists them with their sources.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from cpflex.planning.predict import between_exchanges, outer_machine
from cpflex.planning.relays import leveled
from cpflex.planning.stages import Flow, Stage, even, own_stage, program, ring, stage_seconds, with_share
from cpflex.planning.timing import BACKWARD_FLOPS, Batch, Collective, Kernels, Program, Timeline, run
from cpflex.planning.traffic import Traffic
from cpflex.ring.two_level import Nodes
from cpflex.sharding.layout import ChunkWork, Layout, aligned_chunk_len
from cpflex.topology import Machine

OVERLAP_DEGREES = (1, 2, 4)
"""Of MagiAttention: stages of remote keys; its best one is shown."""

STEP_US = (100.0, 200.0)
"""Of their hosts for a step of a ring, forward and backward: Python, messages, launches."""

MAGI_STEP_US = (50.0, 100.0)
"""Of MagiAttention's host for a stage."""

CHUNKS_PER_RANK = 8
"""Of its dispatch."""


class Passes(NamedTuple):
    """Forward and backward of one layer."""

    forward: Timeline
    backward: Timeline

    @property
    def seconds(self) -> float:
        return self.forward.makespan + self.backward.makespan


@dataclass(frozen=True)
class Scene:
    """A mask kind on a machine, as peers see it."""

    seq_len: int
    machine: Machine
    world_size: int
    total_pairs: float
    dealt: Traffic
    """On the chunks that longest-first deals out (`longest_first`)."""
    zigzag: Callable[[int], Traffic] | None
    """On so many ranks, if zigzag rings can compute the mask; `documents` then says how."""
    documents: Sequence[int] | None = None
    """Lengths of packed documents, each of which zigzag rings cut into 2 pieces a rank; None: one sequence."""


def peers(scene: Scene) -> Iterator[tuple[str, Passes]]:
    """(name, its passes) of each that can compute the mask on so many ranks."""
    size, gpus, heads = scene.world_size, scene.machine.topology.gpus_per_node, scene.machine.heads
    yield "all-gather (torch)", _all_gather(scene)
    if size <= heads.query:
        yield "Ulysses", _ulysses(scene)
    if scene.zigzag is not None:
        yield "zigzag ring (TE, RFA)", _zigzag_ring(scene, 1)
        if size > gpus > 1:
            yield "double ring (LoongTrain)", _double_ring(scene)
        degree = min(8, gpus, heads.kv)
        if size > degree > 1 and size % degree == 0:
            yield "a2a + ring (TE, USP)", _zigzag_ring(scene, degree)
    yield "MagiAttention a2av", _best(_magi_flat(scene, degree) for degree in OVERLAP_DEGREES)
    if size > gpus > 1:
        yield "MagiAttention hierarchical", _best(_magi_two_level(scene, degree) for degree in OVERLAP_DEGREES)


def longest_first(seq_len: int, world_size: int, work: ChunkWork | None) -> Layout:
    """MagiAttention's dispatch: the heaviest chunk left goes to the least busy rank that has room."""
    num_chunks = CHUNKS_PER_RANK * world_size
    chunk_len = aligned_chunk_len(seq_len, num_chunks)
    needs = work(chunk_len, num_chunks) if work is not None else {}
    share = np.zeros(num_chunks)
    for kind, need in needs.items():
        share += work.weights[kind] * need.work if work is not None else 0
    load, held = np.zeros(world_size), [[] for _ in range(world_size)]
    for chunk in np.argsort(-share, kind="stable").tolist():
        rank = int(np.argmin(np.where([len(h) < CHUNKS_PER_RANK for h in held], load, np.inf)))
        held[rank].append(chunk)
        load[rank] += share[chunk]
    return Layout(seq_len, chunk_len, tuple(tuple(sorted(h)) for h in held), "longest first")


def _best(found: Iterator[Passes]) -> Passes:
    return min(found, key=lambda passes: passes.seconds)


def _passes(make: Callable[[bool], Program], machine: Machine, world_size: int) -> Passes:
    lead = machine.device.lead_us * 1e-6
    return Passes(*(run(make(backward), world_size, machine.topology, lead) for backward in (False, True)))


def _kernels(scene: Scene, backward: bool, after: tuple[int, ...]) -> Kernels:
    """All of the work in one go, equal on all ranks."""
    device, heads = scene.machine.device, scene.machine.heads
    flops = scene.total_pairs / scene.world_size * heads.flops_per_pair * (BACKWARD_FLOPS if backward else 1.0)
    seconds = flops / (device.tflops * 1e12) + (1 + backward) * device.launch_us * 1e-6
    return Kernels(np.full(scene.world_size, seconds), after)


def _all_gather(scene: Scene) -> Passes:
    """K/V of all ranks gathered, one kernel, dK/dV reduce-scattered in the model's dtype; work balanced perfectly."""
    gather = _ring_collective(scene.seq_len * scene.machine.heads.row_bytes, scene)

    def make(backward: bool) -> Program:
        if backward:  # K/V were kept
            return [_kernels(scene, backward, ()), replace(gather, after=(0,))]
        return [gather, _kernels(scene, backward, (0,))]

    return _passes(make, scene.machine, scene.world_size)


def _ring_collective(total_bytes: float, scene: Scene) -> Collective:
    """NCCL's ring, one for each NIC of a node; latencies a hop of its tuning model (src/graph/tuning.cc, 2.27)."""
    topology, size = scene.machine.topology, scene.world_size
    nodes, gpus = topology.num_nodes(size), min(size, topology.gpus_per_node)
    across = gpus * topology.nic_gb_per_s / topology.oversubscription
    rate = topology.intra_gb_per_s if nodes == 1 else min(topology.intra_gb_per_s, across)
    if total_bytes > 1e6:
        latency_us = 8.4 + (size - nodes) * 3.4 + (nodes - 1) * 14
    else:
        latency_us = 6.6 + (size - nodes) * 0.6 * (1.8 if nodes > 1 else 1) + (nodes - 1) * 2.7
    moved = total_bytes * (size - 1) / size
    return Collective(latency_us * 1e-6 + moved / (rate * 1e9), moved / gpus if nodes > 1 else 0.0)


def _ulysses(scene: Scene) -> Passes:
    """All heads exchanged over all ranks, whole sequences computed; work balanced perfectly."""
    size, machine = scene.world_size, scene.machine

    def make(backward: bool) -> Program:
        return between_exchanges([_kernels(scene, backward, ())], scene.seq_len // size, size, machine, backward)

    return _passes(make, machine, size)


def _ring_tables(scene: Scene, world_size: int) -> tuple[Traffic, float]:
    """What the hops of a zigzag ring compute, and the rows with padding of each without it.

    Packed documents are each cut into two pieces a rank: equal work at every hop, all hops, and pads where a document
    is no multiple of so many pieces.
    """
    assert scene.zigzag is not None
    if scene.documents is None:
        return scene.zigzag(world_size), 1.0
    pieces, lengths = 2 * scene.world_size, np.asarray(scene.documents)
    padded = float((-(-lengths // pieces) * pieces).sum()) / scene.seq_len
    local = scene.seq_len // world_size
    every = (world_size, world_size)
    alike = np.full(every, local)
    blocks = np.arange(world_size)
    pairs = np.full(every, int(scene.total_pairs / world_size**2))
    return Traffic(local, local, blocks, np.full(world_size, local), np.ones(every, bool), pairs, alike), padded


def _padded(stages: Sequence[Stage], padded: float) -> list[Stage]:
    def wider(flow: Flow) -> Flow:
        return Flow(flow.source, flow.target, np.round(flow.rows * padded))

    return [replace(stage, arrives=wider(stage.arrives), returns=wider(stage.returns)) for stage in stages]


def _zigzag_ring(scene: Scene, degree: int) -> Passes:
    """A ring over the ranks that are left when ``degree`` share heads by all-to-all; dK/dV in the model's dtype."""
    size = scene.world_size // degree
    traffic, padded = _ring_tables(scene, size)
    machine = outer_machine(_with_host(scene.machine, STEP_US), degree)
    stages, grad_bytes = _padded(ring(traffic), padded), machine.heads.row_bytes
    tokens = round(scene.seq_len * padded / scene.world_size)

    def make(backward: bool) -> Program:
        inner = program(stages, machine, backward, grad_bytes)
        return between_exchanges(inner, tokens, degree, scene.machine, backward)

    return _passes(make, machine, size)


def _double_ring(scene: Scene) -> Passes:
    """An inner ring over NVLink while every NIC passes its node's shards on to the next node (LoongTrain), on lanes of
    their own; dK/dV in the model's dtype.
    """
    machine, size, gpus = scene.machine, scene.world_size, scene.machine.topology.gpus_per_node
    traffic, padded = _ring_tables(scene, size)
    ranks, nodes = np.arange(size), size // gpus
    node, place = ranks // gpus, ranks % gpus
    shard = np.full(size, float(round(traffic.local_len * padded)) * machine.heads.row_bytes)
    beside, beyond = node * gpus + (place + 1) % gpus, (node + 1) % nodes * gpus + place
    returned = Flow(ranks, beside, np.full(size, float(traffic.local_len)))

    def make(backward: bool) -> Program:
        steps: list[Batch | Collective | Kernels] = []
        kernels: list[int] = []
        outer: tuple[int, ...] = ()
        grad: tuple[int, ...] = ()

        def add(step: Batch | Kernels) -> tuple[int, ...]:
            steps.append(step)
            return (len(steps) - 1,)

        for turn in range(nodes):
            here = outer
            if turn + 1 < nodes:
                outer = add(Batch(ranks, beyond, shard, (*here, *kernels[-1:]), "across"))
            for hop in range(gpus):
                after = (*here, *kernels[-2:-1])
                onward = add(Batch(ranks, beside, shard, after, "inside")) if hop + 1 < gpus else ()
                owner = (node - turn) % nodes * gpus + (place - hop) % gpus
                first = turn + hop == 0
                stage = Stage(
                    traffic.pairs[ranks, owner].astype(float),
                    traffic.touched[ranks, owner].astype(float),
                    returns=Flow(*(part[: 0 if first else size] for part in returned)),
                )
                seconds = stage_seconds(stage, first, backward, machine, stage.returned(size))
                kernels += add(Kernels(seconds, here, STEP_US[backward] * 1e-6))
                if backward:
                    grad = add(Batch(ranks, beside, shard, (kernels[-1], *grad), "inside", "dK/dV"))
                here = onward
            if backward and turn:
                grad = add(Batch(ranks, beyond, shard, grad, "across", "dK/dV"))
        return steps

    return _passes(make, machine, size)


def _with_host(machine: Machine, step_us: tuple[float, float]) -> Machine:
    device = replace(machine.device, forward_step_us=step_us[0], backward_step_us=step_us[1])
    return machine._replace(device=device)


def _magi_flat(scene: Scene, degree: int) -> Passes:
    """Group cast and reduce by all-to-all-v: needed rows straight from their owners, in equal stages; dK/dV in the
    model's dtype.
    """
    machine = _with_host(scene.machine, MAGI_STEP_US)
    stages, grad_bytes = even(scene.dealt, [1] * degree), machine.heads.row_bytes
    return _passes(lambda backward: program(stages, machine, backward, grad_bytes), machine, scene.world_size)


def _magi_two_level(scene: Scene, degree: int) -> Passes:
    """The same with rows that cross to a node once and fan out inside it, on two lanes: what crosses is a stage further
    ahead.
    """
    machine, traffic = _with_host(scene.machine, MAGI_STEP_US), scene.dealt
    nodes = Nodes(traffic.world_size, machine.topology.gpus_per_node)
    (own, far), straight, ((inside, across),) = leveled(traffic, nodes, [1])
    across, inside = (Flow(flow.source, flow.target, flow.rows / degree) for flow in (across, inside))
    stages = [own_stage(traffic), with_share(traffic, own, straight, straight.back)]
    stages += [with_share(traffic, far / degree, inside, inside.back)] * degree
    crossings = [None, None, *[across] * degree]

    def make(backward: bool) -> Program:
        return _two_lanes(stages, crossings, machine, backward)

    return _passes(make, machine, scene.world_size)


def _two_lanes(stages: Sequence[Stage], crossings: Sequence[Flow | None], machine: Machine, backward: bool) -> Program:
    """Stages whose rows first cross, then fan out; dK/dV back the same way."""
    row_bytes = machine.heads.row_bytes
    host = (machine.device.backward_step_us if backward else machine.device.forward_step_us) * 1e-6
    steps: list[Batch | Collective | Kernels] = []
    kernels: list[int] = []
    crossed: dict[int, tuple[int, ...]] = {}
    arrived: dict[int, tuple[int, ...]] = {}

    def post(flow: Flow | None, after: tuple[int, ...], lane: str, carries: str = "K/V") -> tuple[int, ...]:
        if flow is None or not len(flow.source):
            return after
        steps.append(Batch(flow.source, flow.target, flow.rows * row_bytes, after, lane, carries))
        return (len(steps) - 1,)

    def cross(index: int, after: tuple[int, ...]) -> None:
        if index < len(stages):
            crossed[index] = post(crossings[index], after, "across")

    cross(1, ())
    for index, stage in enumerate(stages):
        gate = tuple(kernels[-1:])
        cross(index + 2, gate)
        if index + 1 < len(stages):
            after = (*crossed.get(index + 1, ()), *gate)
            arrived[index + 1] = post(stages[index + 1].arrives, after, "inside")
        seconds = stage_seconds(stage, index == 0, backward, machine, stage.returned(len(stage.pairs)))
        steps.append(Kernels(seconds, arrived.get(index, ()), host))
        kernels.append(len(steps) - 1)
        if backward:
            crossing = crossings[index]
            back = post(stage.returns, (kernels[-1],), "inside", "dK/dV")
            post(crossing.back if crossing is not None else None, back, "across", "dK/dV")
    return steps
