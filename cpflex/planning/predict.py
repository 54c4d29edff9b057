"""Predictions: how long a schedule takes on a machine, forward and backward, from the plan's own tables.

A model, not a measurement. Times are whole microseconds, so that every rank on every host ranks the schedules alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from cpflex.planning import stages as one_level
from cpflex.planning.relays import relay
from cpflex.planning.stages import NOTHING, Stage, program
from cpflex.planning.timing import Batch, Collective, Kernels, Messages, Program, Timeline, message_costs, run
from cpflex.planning.traffic import Traffic
from cpflex.topology import Heads, Machine, Topology


def stages_of(name: str, traffic: Traffic, topology: Topology) -> list[Stage]:
    """The stages of a schedule by its name, such as "ring", "ring:both", "direct", "gather", "even:1/4/4", "relay:2",
    "striped:2".

    Raises:
        ValueError: there is none of this name.
    """
    kind, _, numbers = name.partition(":")
    plain = {"ring": one_level.ring, "ring:both": one_level.ring_both, "direct": one_level.direct}
    if name in plain:
        return plain[name](traffic)
    if name == "gather":
        return one_level.even(traffic, [1])
    if not re.fullmatch(r"(even|relay|striped):\d+(/\d+)*", name):
        raise ValueError(f"there is no schedule {name!r} to predict")
    parts = [int(number) for number in numbers.split("/")]
    parts = [1] * parts[0] if len(parts) == 1 else parts
    if kind == "even" or topology.num_nodes(traffic.world_size) == 1:
        return one_level.even(traffic, parts)
    return relay(traffic, topology.gpus_per_node, parts, stripe=kind == "striped")


@dataclass(frozen=True)
class Prediction:
    """What a schedule is predicted to take on a machine, for one layer."""

    name: str
    timed: Callable[[], tuple[Timeline, Timeline]] = field(repr=False)
    """Runs forward and backward."""
    stages: Sequence[Stage]
    machine: Machine
    degree: int = 1
    """Ranks that share a piece of the sequence by heads; stages, timelines and machine are those of one of them."""

    @cached_property
    def _passes(self) -> tuple[Timeline, Timeline]:
        return self.timed()

    @property
    def forward(self) -> Timeline:
        return self._passes[0]

    @property
    def backward(self) -> Timeline:
        return self._passes[1]

    @cached_property
    def total_us(self) -> int:
        """Forward and backward of one layer."""
        return round((self.forward.makespan + self.backward.makespan) * 1e6)

    @cached_property
    def exposed_us(self) -> int:
        """The time for which the mean rank runs no kernels of the attention."""
        return self.total_us - round(float(np.mean(self.forward.busy + self.backward.busy)) * 1e6)

    @cached_property
    def buffer_bytes(self) -> int:
        """Of other ranks' K/V and of dK/dV on their way, at most, at one rank."""
        return buffer_bytes(self.stages, self.machine.heads)

    @cached_property
    def nic_use(self) -> float:
        """Of the NICs' time, in mean over ranks."""
        moved = float(np.mean(self.forward.bytes_across + self.backward.bytes_across))
        return moved / (self.machine.topology.nic_gb_per_s * 1e3 * max(self.total_us, 1))


def predict(name: str, traffic: Traffic, machine: Machine, degree: int = 1) -> Prediction:
    """Forward and backward of one attention layer of one sequence.

    Args:
        traffic: of the ranks, or of the outer ones when ``degree`` ranks share a piece of the sequence by heads.
        machine: of all ranks.

    >>> predict("even:2", traffic, machine).total_us
    """
    outer = outer_machine(machine, degree)
    stages = stages_of(name, traffic, outer.topology)
    tokens, world_size, lead = traffic.local_len // degree, traffic.world_size, machine.device.lead_us * 1e-6

    def timed() -> tuple[Timeline, Timeline]:
        sizes: dict[tuple[int, int], np.ndarray] = {}  # what both passes send alike
        messages: dict[tuple[int, int, int], Messages] = {}
        passes = []
        for backward in (False, True):
            inner = program(stages, outer, backward, sizes=sizes)
            steps = between_exchanges(inner, tokens, degree, machine, backward)
            passes.append(run(steps, world_size, outer.topology, lead, messages))
        return passes[0], passes[1]

    return Prediction(name, timed, stages, outer, degree)


def buffer_bytes(stages: Sequence[Stage], heads: Heads) -> int:
    """At most at one rank: K/V of a step and of the next one; in backward, also dK/dV of the step, their packed copies
    and those that arrive.
    """
    size, most = len(stages[0].pairs), 0.0
    later = [*(stage.arrives for stage in stages[1:]), NOTHING]
    steps = [(stage.arrives, after, stage.returns) for stage, after in zip(stages, later, strict=True)]
    for now, after, returns in {tuple(map(id, flows)): flows for flows in steps}.values():  # rings repeat theirs
        held = (now.received(size) + after.received(size)) * heads.row_bytes
        back = (returns.sent(size) * 2 + returns.received(size)) * heads.grad_row_bytes
        most = max(most, float((held + back).max()))
    return int(most)


# -- heads by all-to-all


def outer_machine(machine: Machine, degree: int) -> Machine:
    """What one of ``degree`` ranks that share a piece of the sequence by heads sees of the machine: they are one, on a
    share of the heads, with the network of one.
    """
    if degree == 1:
        return machine
    topology, heads = machine.topology, machine.heads
    links = replace(
        topology,
        gpus_per_node=1 if topology.gpus_per_node % degree else topology.gpus_per_node // degree,
        inter_gb_per_s=topology.nic_gb_per_s,
        nics_per_node=None,
    )
    shared = replace(heads, query=heads.query // degree, kv=max(1, heads.kv // degree))
    return Machine(links, machine.device, shared)


def between_exchanges(steps: Program, tokens: int, degree: int, machine: Machine, backward: bool) -> Program:
    """A program between all-to-alls of heads among ``degree`` ranks, each with so many tokens: q, k and v in, out and
    lse back, and their gradients the other way. Keys' heads are repeated where there are fewer than ranks.
    """
    if degree == 1:
        return steps
    heads = machine.heads
    value_dim = heads.value_dim or heads.dim
    into = (heads.query * heads.dim + max(heads.kv, degree) * (heads.dim + value_dim)) * heads.element_bytes
    back = heads.query * (value_dim * heads.element_bytes + 4)
    first, last = (_all_to_all(tokens * row, degree, machine) for row in ((back, into) if backward else (into, back)))
    moved: list[Batch | Collective | Kernels] = [first]
    moved += [replace(step, after=tuple(other + 1 for other in step.after) or (0,)) for step in steps]
    return [*moved, replace(last, after=tuple(range(len(moved))))]


def heads_us(tokens: int, degree: int, machine: Machine) -> int:
    """Of the all-to-alls before and after, forward and backward, of ranks with so many tokens each."""
    found = [between_exchanges([], tokens, degree, machine, backward) for backward in (False, True)]
    return round(1e6 * sum(step.seconds for steps in found for step in steps if isinstance(step, Collective)))


def _all_to_all(size: int, degree: int, machine: Machine) -> Collective:
    """Of so many bytes at each rank, packed, sent and unpacked."""
    source, target = np.nonzero(~np.eye(degree, dtype=bool))
    batch = Batch(source, target, np.full(len(source), size / degree))
    sent, crosses = message_costs(batch, degree, machine.topology)
    copied = 4 * size / (machine.device.memory_gb_per_s * 1e9)
    return Collective(float(sent.max()) + copied, float(crosses.sum()) * size / degree**2, lane="heads")
