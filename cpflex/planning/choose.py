"""auto: the schedule that suits a mask, a layout and a machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from cpflex.planning.needs import Needs
from cpflex.planning.predict import Prediction, outer_machine, predict
from cpflex.planning.timing import BACKWARD_FLOPS
from cpflex.planning.traffic import Traffic
from cpflex.ring import schedule as schedules
from cpflex.ring.named import named_schedule
from cpflex.ring.schedule import Schedule, direct, hops_needed, name_of, ring
from cpflex.sharding.layout import Layout
from cpflex.topology import Machine

RING_EXCESS = 4
"""Rings are not considered where they would move more than so many times what ranks need."""

MAX_PARTS = 64
"""Stages into which needs are cut, where memory asks for more."""

MANY = 4
"""Times more equal parts than that are considered too."""

MAX_HALVINGS = 3
"""Stages after these, each half of the one before."""

ENOUGH = 1.01
"""Cuts of needs are not considered where a ring is predicted to take at most so many times what its kernels must."""


def auto(layout: Layout, rank: int, needs: schedules.Needs) -> Schedule:
    """With a topology, the schedule whose forward and backward are predicted to take least time within the device's
    buffers. Without one, `direct` where the mean needed K/V is under half of what the ring would move, else `ring`.
    """
    if hops_needed(needs.tokens) == 0:
        return replace(ring(layout, rank, needs), reason="no rank needs another's keys")
    # of keys that are another sequence nothing is predicted yet
    if needs.machine is None or not isinstance(needs, Needs) or needs.keys is not needs.layout:
        return _by_rows(layout, rank, needs)
    best, *others = ranked(needs.traffic, needs.machine, enough=ENOUGH)
    schedule = named_schedule(best.name)
    assert schedule is not None, f"{best.name} is considered, and no schedule"
    return replace(schedule(layout, rank, needs), reason=reason(best, others))


def _by_rows(layout: Layout, rank: int, needs: schedules.Needs) -> Schedule:
    foreign = needs.tokens.sum() - np.trace(needs.tokens)
    mean, moved = foreign / layout.world_size, hops_needed(needs.tokens) * layout.local_len
    chosen = direct if mean < moved / 2 else ring
    share = f"ranks need {mean:,.0f} K/V rows on average, the ring would move {moved:,}"
    return replace(chosen(layout, rank, needs), reason=f"{share}: {'under' if chosen is direct else 'not under'} half")


def ranked(traffic: Traffic, machine: Machine, degree: int = 1, *, enough: float = 0.0) -> list[Prediction]:
    """Predictions of the schedules that are considered, the best first: those that keep within the device's buffers, by
    time; then the others, by memory. Needs are cut in one way on every level, in all ways on the level that is best.

    Args:
        traffic, machine, degree: as `predict` takes them.
        enough: needs are not cut if a schedule without cuts takes at most so many times the busiest rank's kernels.
    """
    outer, limit = outer_machine(machine, degree), machine.device.buffer_gb * 1e9

    def cost(found: Prediction) -> tuple[int, int]:
        return found.buffer_bytes if found.buffer_bytes > limit else 0, found.total_us

    def on(level: str, parts: tuple[int, ...]) -> Prediction:
        name = "gather" if (level, parts) == ("even", (1,)) else f"{level}:{name_of(parts)}"
        return predict(name, traffic, machine, degree)

    found = [predict(name, traffic, machine, degree) for name in _plain(traffic)]
    flops = int(traffic.pairs.sum(axis=1).max()) * outer.heads.flops_per_pair * (1 + BACKWARD_FLOPS)
    if min(map(cost, found)) <= (0, enough * flops / (outer.device.tflops * 1e6)):
        return sorted(found, key=cost)
    typical, *others = _parts(traffic, outer)
    by_level = {level: on(level, typical) for level in _levels(traffic, outer)}
    best = min(by_level, key=lambda level: cost(by_level[level]))
    return sorted([*found, *by_level.values(), *(on(best, parts) for parts in others)], key=cost)


def _plain(traffic: Traffic) -> list[str]:
    """Names of schedules that take no parts."""
    moved = hops_needed(traffic.rows) * traffic.local_len * traffic.world_size
    rings = ["ring", "ring:both"] if traffic.rows.sum() * RING_EXCESS > moved else []
    return [*rings, "direct"]


def _levels(traffic: Traffic, machine: Machine) -> list[str]:
    """Names of schedules that take parts."""
    two = 1 < machine.topology.gpus_per_node < traffic.world_size
    return ["even", "relay", "striped"] if two else ["even"]


def degrees(world_size: int, machine: Machine, num_heads: int | None = None) -> list[int]:
    """Numbers of ranks of a node that may share a piece of the sequence by heads, 1 first. ``num_heads``: of the mask,
    if it depends on them.
    """
    heads, gpus = machine.heads, min(machine.topology.gpus_per_node, world_size)
    return [
        degree
        for degree in range(1, gpus + 1)
        if not any(size % degree for size in (gpus, world_size, heads.query, heads.kv, num_heads or degree))
    ]


def _parts(traffic: Traffic, machine: Machine) -> Iterator[tuple[int, ...]]:
    """As many equal parts as buffers ask for, with ever smaller ones after them: the own shard hides how long the first
    takes to arrive, and backward waits for the dK/dV of the last. A typical cut first.
    """
    heads = machine.heads
    # K/V of two stages and dK/dV of one, twice
    most = int(traffic.rows.sum(axis=1).max()) * 2 * (heads.row_bytes + heads.grad_row_bytes)
    large = min(int(most // (machine.device.buffer_gb * 1e9)) + 1, MAX_PARTS)
    for halvings in (1, 0, *range(2, MAX_HALVINGS + 1)):
        yield (2**halvings,) * large + tuple(2**h for h in reversed(range(halvings)))
    yield (1,) * min(MANY * large, MAX_PARTS)


def reason(best: Prediction, others: list[Prediction]) -> str:
    """What was predicted, the runner-up, and what sets it apart."""
    said = f"predicted {_ms(best.total_us)} forward and backward a layer"
    limit = best.machine.device.buffer_gb * 1e9
    if best.buffer_bytes > limit:
        said += f", the least memory: {best.buffer_bytes / 1e9:.1f} GB of buffers, over the {limit / 1e9:g} GB allowed"
    if not others:
        return said
    other = others[0]
    said += f"; next {other.name}, {_ms(other.total_us)}: "
    more = other.total_us - best.total_us
    if other.buffer_bytes > limit:
        return said + f"needs {other.buffer_bytes / 1e9:.1f} GB of buffers"
    waits = other.exposed_us - best.exposed_us
    if waits >= more - waits:
        return said + f"waits {_ms(waits)} longer for messages and the host"
    return said + f"its kernels take {_ms(more - waits)} longer"


def _ms(microseconds: int) -> str:
    return f"{microseconds / 1000:.2f} ms"
