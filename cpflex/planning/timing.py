"""Timing: when each rank of a program ends, by a model of its links and kernels, all ranks at once.

A batch is what one call of `batch_isend_irecv` posts. At a rank it starts when its lane is free and what it waits for
is done; a message starts when both of its ends have started it; a batch holds its lane at a rank until all of the
rank's messages are done. Messages of a batch that leave or enter a GPU share its link of that kind: inside the node, or
its share of the NICs. Batches on different lanes do not slow each other, and kernels do not slow messages: the model is
kind where a program keeps several lanes busy at once.

Sizes are whole numbers, and times grow by sums and maxima of single elements, so that every host gets the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from cpflex.topology import Topology

BACKWARD_FLOPS = 2.5
"""Of backward, in those of forward (FlashAttention-2, arXiv:2307.08691, section 4.1)."""


@dataclass(frozen=True)
class Batch:
    """Messages that ranks post together."""

    source: np.ndarray  # rank, int64 [messages]
    target: np.ndarray  # rank, int64 [messages]
    size: np.ndarray  # bytes, float64 [messages]
    after: tuple[int, ...] = ()
    """Earlier operations, by their place in the program, that must be done at the rank."""
    lane: str = "links"
    carries: str = "K/V"
    """What, in words."""


@dataclass(frozen=True)
class Collective:
    """All ranks together, for so long."""

    seconds: float
    bytes_across: float = 0.0
    """Sent to other nodes by each rank, in mean."""
    after: tuple[int, ...] = ()
    lane: str = "links"


@dataclass(frozen=True)
class Kernels:
    """What a step computes; in the order of the program."""

    seconds: np.ndarray  # [world_size]
    after: tuple[int, ...] = ()
    host: float = 0.0
    """Seconds that the host takes to issue it."""


Program = Sequence[Batch | Collective | Kernels]


class Span(NamedTuple):
    """When an operation ran, [world_size] each."""

    start: np.ndarray
    end: np.ndarray


@dataclass(frozen=True)
class Timeline:
    """What running a program took, in seconds and bytes."""

    program: Program = field(repr=False)
    topology: Topology
    spans: list[Span] = field(repr=False)
    end: np.ndarray  # [world_size]
    busy: np.ndarray  # seconds of kernels, [world_size]
    bytes_across: np.ndarray = field(repr=False)  # sent to other nodes, [world_size]

    @property
    def makespan(self) -> float:
        return float(self.end.max())


class Costs(NamedTuple):
    """Of the messages of a batch."""

    seconds: np.ndarray  # from when both ends have started, [messages]
    crosses: np.ndarray  # to another node, bool [messages]


def run(
    program: Program,
    world_size: int,
    topology: Topology,
    lead: float = 0.0,
    messages: dict[tuple[int, int, int], Messages] | None = None,
) -> Timeline:
    """Every operation at every rank.

    Args:
        lead: seconds that the host is ahead of the device at first.
        messages: of batches by the ids of their arrays, to be shared with other programs that have the same.
    """
    messages = {} if messages is None else messages
    spans: list[Span] = []
    lanes: dict[str, np.ndarray] = {}
    free, busy, across, host = np.zeros(world_size), np.zeros(world_size), np.zeros(world_size), -lead
    for step in program:
        ready = spans[step.after[0]].end if step.after else np.zeros(world_size)
        for other in step.after[1:]:
            ready = np.maximum(ready, spans[other].end)
        if isinstance(step, Kernels):
            host += step.host
            start = np.maximum(np.maximum(free, ready), host)
            free = end = start + step.seconds
            busy = busy + step.seconds
        elif isinstance(step, Collective):
            start = np.maximum(ready, lanes.get(step.lane, 0.0))
            lanes[step.lane] = end = np.full(world_size, start.max() + step.seconds)
            across = across + step.bytes_across
        else:
            batch = id(step.source), id(step.target), id(step.size)
            if batch not in messages:
                messages[batch] = _messages(step, world_size, topology)
            held = lanes.get(step.lane, np.zeros(world_size))
            start, end, lanes[step.lane] = messages[batch].run(ready, held)
            across = across + messages[batch].crossed
        spans.append(Span(start, end))
    last = np.maximum.reduce([free, *(span.end for span in spans)])
    return Timeline(program, topology, spans, last, busy, across)


class Messages(NamedTuple):
    """Of a batch, whenever it runs."""

    source: np.ndarray  # [messages]
    target: np.ndarray
    seconds: np.ndarray
    takes_part: np.ndarray | None  # bool [world_size]; None if all do
    crossed: np.ndarray  # bytes sent to other nodes, [world_size]

    def run(self, ready: np.ndarray, held: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(start, end, until when the lane is held) at each rank, [world_size] each."""
        start = np.maximum(ready, held)
        arrival = np.maximum(start[self.source], start[self.target]) + self.seconds
        end = start.copy()
        np.maximum.at(end, self.source, arrival)
        np.maximum.at(end, self.target, arrival)
        part = self.takes_part
        if part is None:
            return start, end, end
        return np.where(part, start, ready), np.where(part, end, ready), np.where(part, end, held)


def _messages(batch: Batch, world_size: int, topology: Topology) -> Messages:
    seconds, crosses = message_costs(batch, world_size, topology)
    takes_part = np.zeros(world_size, dtype=bool)
    takes_part[batch.source] = takes_part[batch.target] = True
    crossed = np.bincount(batch.source[crosses], batch.size[crosses], world_size)
    return Messages(batch.source, batch.target, seconds, None if takes_part.all() else takes_part, crossed)


def message_costs(batch: Batch, world_size: int, topology: Topology) -> Costs:
    """A message takes a latency, and as long as the busiest of the links on its way has to carry its share."""
    source, target, size, gpus = batch.source, batch.target, batch.size, topology.gpus_per_node
    crosses = source // gpus != target // gpus
    seconds = np.zeros(len(source))
    rates = np.where(crosses, topology.nic_gb_per_s, topology.intra_gb_per_s) * 1e9
    for ends in (source, target):
        link = ends + world_size * crosses
        seconds = np.maximum(seconds, np.bincount(link, size, 2 * world_size)[link] / rates)
        if topology.oversubscription > 1:
            num_gpus = np.minimum(gpus, world_size - np.arange(0, world_size, gpus))
            up = num_gpus * topology.nic_gb_per_s * 1e9 / topology.oversubscription
            leaving = np.bincount(ends[crosses] // gpus, size[crosses], len(up))
            seconds = np.maximum(seconds, np.where(crosses, (leaving / up)[ends // gpus], 0.0))
    peers = np.maximum(*(np.bincount(ends, minlength=world_size) for ends in (source, target)))
    latency = np.where(crosses, topology.inter_latency_us, topology.intra_latency_us)
    latency = latency + topology.message_us * np.maximum(peers[source], peers[target])
    return Costs(seconds + latency * 1e-6, crosses)
