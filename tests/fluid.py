"""The model of `cpflex.planning.timing` event by event: every message a flow of its own, links shared max-min fairly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cpflex.planning.timing import Batch, Collective, Kernels, Program
from cpflex.topology import Topology

SOON = 1e-12


@dataclass(eq=False)
class Message:
    operation: int
    source: int
    target: int
    links: tuple[tuple, ...]
    starts: float
    left: float


def makespan(program: Program, world_size: int, topology: Topology, lead: float = 0.0) -> float:
    """When the last operation of the last rank ends; small worlds only."""
    world = _World(program, world_size, topology, lead)
    while world.advance():
        pass
    assert all(np.isfinite(done).all() for done in world.done), "some operation never ended"
    return max(float(done.max()) for done in world.done)


class _World:
    def __init__(self, program: Program, world_size: int, topology: Topology, lead: float) -> None:
        self.program, self.topology, self.size, self.now = program, topology, world_size, 0.0
        self.done = [np.full(world_size, np.inf) for _ in program]
        self.started: set[tuple[int, int]] = set()
        self.ends: dict[tuple[int, int], float] = {}  # of kernels and collectives that run
        self.messages: list[Message] = []
        self.pending = [np.zeros(world_size, dtype=int) for _ in program]
        hosts = np.cumsum([step.host if isinstance(step, Kernels) else 0.0 for step in program])
        self.issued = np.maximum(hosts - lead, 0.0)
        self.queues: dict[tuple[int, str], list[int]] = {}
        for index, step in enumerate(program):
            for rank in range(world_size):
                self.queues.setdefault((rank, "kernels" if isinstance(step, Kernels) else step.lane), []).append(index)
            if isinstance(step, Batch):
                for ends in (step.source, step.target):
                    np.add.at(self.pending[index], ends, 1)

    def advance(self) -> bool:
        """To the next event; False when nothing is left."""
        while sum(self._start_next(*key) for key in self.queues):
            pass
        running = [m for m in self.messages if m.starts <= self.now + SOON]
        rates = self._rates(running)
        times = [*self.ends.values(), *(m.starts for m in self.messages if m.starts > self.now + SOON)]
        times += [self.now + m.left / rates[m] for m in running]
        times += [t for t in self.issued if t > self.now + SOON]
        if not times:
            return False
        until = min(times)
        for message in running:
            message.left -= rates[message] * (until - self.now)
        self.now = until
        for key in [key for key, end in self.ends.items() if end <= self.now + SOON]:
            del self.ends[key]
            self.done[key[0]][key[1]] = self.now
        for message in [m for m in running if m.left <= rates[m] * SOON]:
            self.messages.remove(message)
            for rank in (message.source, message.target):
                self.pending[message.operation][rank] -= 1
                if not self.pending[message.operation][rank]:
                    self.done[message.operation][rank] = self.now
        return True

    def _start_next(self, rank: int, lane: str) -> bool:
        queue = self.queues[rank, lane]
        if not queue:
            return False
        index = queue[0]
        step, done = self.program[index], self.done
        if done[index][rank] <= self.now:
            queue.pop(0)
            return True
        if (index, rank) in self.started or any(done[other][rank] > self.now + SOON for other in step.after):
            return False
        if isinstance(step, Batch) and not self.pending[index][rank]:
            done[index][rank] = self.now
            return True
        if isinstance(step, Kernels) and self.issued[index] > self.now + SOON:
            return False
        self.started.add((index, rank))
        if isinstance(step, Kernels):
            self.ends[index, rank] = self.now + float(step.seconds[rank])
        elif isinstance(step, Collective):
            if all((index, other) in self.started for other in range(self.size)):
                self.ends |= {(index, other): self.now + step.seconds for other in range(self.size)}
        else:
            self._post(index, step, rank)
        return True

    def _post(self, index: int, step: Batch, rank: int) -> None:
        gpus, topology = self.topology.gpus_per_node, self.topology
        peers = np.maximum(*(np.bincount(ends, minlength=self.size) for ends in (step.source, step.target)))
        for source, target, size in zip(step.source.tolist(), step.target.tolist(), step.size.tolist(), strict=True):
            if rank not in (source, target) or not {(index, source), (index, target)} <= self.started:
                continue
            crosses = source // gpus != target // gpus
            kind = "NIC" if crosses else "inside"
            links: list[tuple] = [("out", source, kind), ("in", target, kind)]
            if crosses and topology.oversubscription > 1:
                links += [("out", source // gpus, "up"), ("in", target // gpus, "up")]
            latency = topology.inter_latency_us if crosses else topology.intra_latency_us
            wait = 1e-6 * (latency + topology.message_us * max(peers[source], peers[target]))
            self.messages.append(Message(index, source, target, tuple(links), self.now + wait, size))

    def _rates(self, running: list[Message]) -> dict[Message, float]:
        """Max-min fair shares."""
        topology = self.topology
        up = topology.gpus_per_node * topology.nic_gb_per_s / topology.oversubscription
        capacity = {"NIC": topology.nic_gb_per_s, "inside": topology.intra_gb_per_s, "up": up}
        room = {link: capacity[link[2]] * 1e9 for message in running for link in message.links}
        rates: dict[Message, float] = {}
        while len(rates) < len(running):
            users: dict[tuple, list[Message]] = {}
            for message in running:
                if message not in rates:
                    for link in message.links:
                        users.setdefault(link, []).append(message)
            tightest = min(users, key=lambda link: room[link] / len(users[link]))
            rate = room[tightest] / len(users[tightest])
            for message in users[tightest]:
                rates[message] = rate
                for link in message.links:
                    room[link] -= rate
        return rates
