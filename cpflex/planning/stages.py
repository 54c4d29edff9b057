"""What all ranks send and compute at each step of a schedule, from tables of traffic: its exchanges from above."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from cpflex.planning.timing import BACKWARD_FLOPS, Batch, Kernels
from cpflex.planning.traffic import Traffic
from cpflex.ring.schedule import hops_both_ways, hops_needed, pack_distances
from cpflex.topology import Machine


class Flow(NamedTuple):
    """Rows on their way, one entry per message."""

    source: np.ndarray  # rank, int64 [messages]
    target: np.ndarray  # rank, int64 [messages]
    rows: np.ndarray  # float64 [messages], whole numbers

    def sent(self, world_size: int) -> np.ndarray:
        return np.bincount(self.source, self.rows, world_size)

    def received(self, world_size: int) -> np.ndarray:
        return np.bincount(self.target, self.rows, world_size)

    @staticmethod
    def of(flows: Sequence[Flow]) -> Flow:
        """All messages, one after the other."""
        return Flow(*(np.concatenate(parts) for parts in zip(*flows, strict=True)))

    @property
    def back(self) -> Flow:
        """The same rows the other way."""
        return Flow(self.target, self.source, self.rows)


NOTHING = Flow(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))


def merged(flows: Sequence[Flow]) -> Flow:
    """What goes from one rank to another as one message."""
    source, target, rows = Flow.of([NOTHING, *flows])
    ranks = int(max(source.max(initial=0), target.max(initial=0))) + 1
    pair, at = np.unique(source * ranks + target, return_inverse=True)
    return Flow(pair // ranks, pair % ranks, np.bincount(at, rows, len(pair)))


@dataclass(frozen=True)
class Stage:
    """One step of all ranks."""

    pairs: np.ndarray  # (query, key) pairs computed, float64 [world_size]
    touched: np.ndarray  # queries that see a key of the step, float64 [world_size]
    arrives: Flow = NOTHING
    """K/V rows of the step's exchange."""
    returns: Flow = NOTHING
    """dK/dV rows that leave once the step is computed."""
    copied: np.ndarray | float = 0.0
    """K/V rows packed before they leave, and joined where they arrive, [world_size]."""
    computes: bool = True
    """Otherwise nothing but gradients on their way, after the last step."""

    def returned(self, world_size: int) -> np.ndarray:
        """dK/dV rows that each rank sends or receives."""
        return self.returns.sent(world_size) + self.returns.received(world_size)


def stage_seconds(
    stage: Stage, first: bool, backward: bool, machine: Machine, returned: np.ndarray | float = 0.0
) -> np.ndarray:
    """Of the kernels of a stage, [world_size]: products, launches, and what is read and written besides.

    Args:
        returned: dK/dV rows that leave and arrive once it is computed, [world_size].
    """
    device, heads = machine.device, machine.heads
    flops = stage.pairs * heads.flops_per_pair * (BACKWARD_FLOPS if backward else 1.0)
    launches = (1 + backward) * (stage.pairs > 0) * device.launch_us * 1e-6
    # acc or dq in fp32, read and written
    moved = (0.0 if first else stage.touched) * heads.query * (heads.value_dim or heads.dim) * 8.0
    moved = moved + stage.copied * 2.0 * heads.row_bytes
    if backward:  # written and packed; or read, and added to what is there
        moved = moved + returned * 3.0 * heads.grad_row_bytes
    return flops / (device.tflops * 1e12) + launches + moved / (device.memory_gb_per_s * 1e9)


def program(
    stages: Sequence[Stage],
    machine: Machine,
    backward: bool,
    grad_row_bytes: int | None = None,
    sizes: dict[tuple[int, int], np.ndarray] | None = None,
) -> list[Batch | Kernels]:
    """As `Transport` runs them: the next stage is posted, this one computed, and in backward its dK/dV leave; all
    exchanges on one lane.

    Args:
        grad_row_bytes: of dK/dV of one token on the way; fp32 if None.
        sizes: of messages, to be shared with other programs of the stages.
    """
    world_size, heads = len(stages[0].pairs), machine.heads
    grad_row_bytes = grad_row_bytes or heads.grad_row_bytes
    host = (machine.device.backward_step_us if backward else machine.device.forward_step_us) * 1e-6
    operations: list[Batch | Kernels] = []
    kernels: list[int] = []
    returned: dict[int, np.ndarray] = {}
    arrived: dict[int, tuple[int, ...]] = {}
    sizes = {} if sizes is None else sizes  # stages may share their flows

    def post(flow: Flow, row_bytes: int, after: tuple[int, ...], carries: str) -> tuple[int, ...]:
        if not len(flow.source):
            return ()
        size = sizes.setdefault((id(flow.rows), row_bytes), flow.rows * row_bytes)
        operations.append(Batch(flow.source, flow.target, size, after, carries=carries))
        return (len(operations) - 1,)

    arrived[0] = post(stages[0].arrives, heads.row_bytes, (), "K/V")
    for index, stage in enumerate(stages):
        if not backward and not stage.computes:
            continue
        if index + 1 < len(stages):
            gate = (*kernels[-1:], *arrived.get(index, ()))
            arrived[index + 1] = post(stages[index + 1].arrives, heads.row_bytes, gate, "K/V")
        rows = id(stage.returns.rows)
        if backward and rows not in returned:
            returned[rows] = stage.returned(world_size)
        seconds = stage_seconds(stage, index == 0, backward, machine, returned.get(rows, 0.0))
        operations.append(Kernels(seconds, arrived.get(index, ()), host))
        kernels.append(len(operations) - 1)
        if backward:
            post(stage.returns, grad_row_bytes, (kernels[-1],), "dK/dV")
    return operations


# -- the schedules


def ring(traffic: Traffic) -> list[Stage]:
    """Whole shards to the next rank."""
    return _rings(traffic, (hops_needed(traffic.rows), 0))


def ring_both(traffic: Traffic) -> list[Stage]:
    """Whole shards both ways round."""
    return _rings(traffic, hops_both_ways(traffic.rows))


def _rings(traffic: Traffic, hops: tuple[int, int]) -> list[Stage]:
    """So many hops each way; dK/dV follow one hop behind, then go home."""
    ranks, size = np.arange(traffic.world_size), traffic.world_size
    shard = np.full(size, float(traffic.shard_len))
    flows: dict[tuple[int, ...], Flow] = {}

    def shift(*distances: int) -> Flow:
        """Whole shards to the ranks so far on."""
        if distances not in flows:
            flows[distances] = Flow.of([Flow(ranks, (ranks + distance) % size, shard) for distance in distances])
        return flows[distances]

    stages = [own_stage(traffic)]
    for hop in range(1, max(hops) + 1):
        ways = [(way, last) for way, last in zip((1, -1), hops, strict=True) if hop <= last]
        returns = shift(*(way if hop < last else -hop * way for way, last in ways))
        distances = [hop * way % size for way, _ in ways]
        stages.append(_of_distances(traffic, distances, shift(*(way for way, _ in ways)), returns))
    return stages


def direct(traffic: Traffic) -> list[Stage]:
    """Needed rows straight from their owners, distances packed into stages of one shard."""
    stages, ranks = [own_stage(traffic)], np.arange(traffic.world_size)
    for distances in pack_distances(traffic.rows, traffic.shard_len):
        owners = [(ranks - distance) % len(ranks) for distance in distances]
        flow = between(traffic.rows, np.tile(ranks, len(owners)), np.concatenate(owners))
        stage = _of_distances(traffic, distances, flow, flow.back)
        copied = flow.sent(len(ranks)) + flow.received(len(ranks))
        stages.append(replace(stage, copied=copied))
    return stages


def even(traffic: Traffic, parts: Sequence[int]) -> list[Stage]:
    """Every pair's needed rows cut into stages, in proportion to ``parts``."""
    stages, ranks = [own_stage(traffic)], np.arange(traffic.world_size)
    tile, total, before = int(traffic.length.max()), sum(parts), np.zeros_like(traffic.rows)
    tiles, phase = -(-traffic.rows // tile), (ranks[:, None] + ranks) % total
    for share in itertools.accumulate(parts):
        end = np.minimum((tiles * share + phase) // total * tile, traffic.rows)
        flow = between(end - before, *np.nonzero(end - before))
        stages.append(with_share(traffic, end - before, flow, flow.back))
        before = end
    return stages


def between(rows: np.ndarray, target: np.ndarray, owner: np.ndarray) -> Flow:
    """Rows [world_size (r), world_size (o)] from owners to ranks, of the pairs that have any."""
    count = rows[target, owner].astype(float)
    return Flow(owner[count > 0], target[count > 0], count[count > 0])


def own_stage(traffic: Traffic) -> Stage:
    return Stage(np.diag(traffic.pairs).astype(float), np.diag(traffic.touched).astype(float))


def _of_distances(traffic: Traffic, distances: Sequence[int], arrives: Flow, returns: Flow) -> Stage:
    """With all keys that each rank needs of the ranks so far before it."""
    pairs, touched = (table[list(distances)].sum(axis=0) for table in traffic.by_distance)
    return Stage(pairs.astype(float), np.minimum(touched, traffic.local_len).astype(float), arrives, returns)


def with_share(traffic: Traffic, rows: np.ndarray, arrives: Flow, returns: Flow) -> Stage:
    """A stage in which rank r computes with so many rows of rank o, [world_size (r), world_size (o)]."""
    share = rows / np.maximum(traffic.rows, 1)
    touched = np.minimum((traffic.touched * (rows > 0)).sum(axis=1), traffic.local_len)
    copied = arrives.sent(len(rows)) + arrives.received(len(rows))
    return Stage(np.floor(traffic.pairs * share).sum(axis=1), touched.astype(float), arrives, returns, copied)
