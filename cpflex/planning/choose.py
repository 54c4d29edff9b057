"""auto: the schedule that suits a mask, a layout and a machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np

from cpflex.planning.bounds import least_us
from cpflex.planning.needs import Needs
from cpflex.planning.predict import Prediction, outer_machine, predict
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

ENOUGH = 1.03
"""Schedules are not predicted that take, by their bound, no less than the best one over this. What is chosen is
nearer to the best than that, as bounds are less than what is predicted.
"""


SPARE = 0.03
"""Of all rows: if nodes need all others' but so many, they need all."""


CLOSE = 1.01
"""Levels are, that take so many times what the best does."""


class Choice(NamedTuple):
    """The best schedule and those it was compared with."""

    best: Prediction
    others: list[Prediction]
    """The best first."""
    least_us: int | None
    """What the others that are considered take at least; None if all were predicted."""


def auto(layout: Layout, rank: int, needs: schedules.Needs) -> Schedule:
    """With a topology, the schedule whose forward and backward are predicted to take least time within the device's
    buffers. Without one, `direct` where the mean needed K/V is under half of what the ring would move, else `ring`.
    """
    if hops_needed(needs.tokens) == 0:
        return replace(ring(layout, rank, needs), reason="no rank needs another's keys")
    if needs.machine is None or not isinstance(needs, Needs):
        return _by_rows(layout, rank, needs)
    choice = choice_of(needs)
    schedule = named_schedule(choice.best.name)
    assert schedule is not None, f"{choice.best.name} is considered, and no schedule"
    return replace(schedule(layout, rank, needs), reason=reason(choice))


def choice_of(needs: Needs) -> Choice:
    """What `choose` says of them, found once."""
    assert needs.machine is not None, "predictions are made of a machine"
    if needs.choice is None:
        needs.choice = choose(needs.traffic, needs.machine)
    return needs.choice


def _by_rows(layout: Layout, rank: int, needs: schedules.Needs) -> Schedule:
    foreign = needs.tokens.sum() - np.trace(needs.tokens)
    mean, moved = foreign / layout.world_size, hops_needed(needs.tokens) * layout.local_len
    chosen = direct if mean < moved / 2 else ring
    share = f"ranks need {mean:,.0f} K/V rows on average, the ring would move {moved:,}"
    return replace(chosen(layout, rank, needs), reason=f"{share}: {'under' if chosen is direct else 'not under'} half")


def ranked(traffic: Traffic, machine: Machine, degree: int = 1) -> list[Prediction]:
    """Predictions of all schedules that are considered, the best first; otherwise as `choose`."""
    choice = choose(traffic, machine, degree, enough=0.0)
    return [choice.best, *choice.others]


def choose(traffic: Traffic, machine: Machine, degree: int = 1, *, enough: float = ENOUGH) -> Choice:
    """The best of the schedules that are considered: of those that keep within the device's buffers by time; if none
    does, by memory. Needs are cut in one way on every level, in other ways on levels that are best or close to it.

    Args:
        traffic, machine, degree: as `predict` takes them.
        enough: what cannot take less than the best so far over this is not predicted; 0 to predict everything.
    """
    search = _Search(traffic, machine, degree, enough)
    outer = outer_machine(machine, degree)
    cuts, many = _cuts(traffic, outer)
    levels = {level: _name(level, cuts[1]) for level in _levels(traffic, outer)}
    names = {ring: ring for ring in _rings(traffic)} | levels | {"direct": "direct"}
    looks = {family: search.look(family, names[family]) for family in search.ordered(names)}
    by_level = {level: found for level in levels if (found := looks[level]) is not None}
    best_cost = min(map(search.cost, by_level.values()), default=(0, 0))
    for level, typical in by_level.items():
        if search.cost(typical) <= (best_cost[0], int(best_cost[1] * CLOSE)):
            _cut_otherwise(search, level, typical, cuts, many, everything=not enough)
    best, *others = search.in_order
    traffic.ways.clear()
    return Choice(best, others, min(search.skipped, default=None))


def _cut_otherwise(
    search: _Search,
    level: str,
    typical: Prediction,
    cuts: list[tuple[int, ...]],
    many: tuple[int, ...],
    *,
    everything: bool,
) -> None:
    """Predict other cuts of a level: finer ones while they are better, else a coarser one, and many parts."""
    is_finer, fits = False, search.fits(typical) or everything
    if fits:
        finer = search.look(level, _name(level, cuts[2]))
        is_finer = finer is not None and search.cost(finer) < search.cost(typical)
    if is_finer or everything:
        search.look(level, _name(level, cuts[3]))
    if (fits and not is_finer) or everything:
        search.look(level, _name(level, cuts[0]))
    search.look(level, _name(level, many))


class _Search:
    """Predictions so far, and the bounds of what need not be predicted."""

    def __init__(self, traffic: Traffic, machine: Machine, degree: int, enough: float) -> None:
        self.found: list[Prediction] = []
        self.skipped: list[int] = []
        self._predict: Callable[[str], Prediction] = lambda name: predict(name, traffic, machine, degree)
        self._least: Callable[[str], int] = cache(lambda family: least_us(family, traffic, machine, degree))
        self._limit, self._enough = machine.device.buffer_gb * 1e9, enough

    def fits(self, found: Prediction) -> bool:
        return found.buffer_bytes <= self._limit

    def cost(self, found: Prediction) -> tuple[int, int]:
        """By time, or by memory where there is too little: then time, which takes long to find, is not asked for."""
        return (0, found.total_us) if self.fits(found) else (found.buffer_bytes, 0)

    @property
    def in_order(self) -> list[Prediction]:
        """The best first; if none fits into memory, the faster first of those that take the same."""
        if any(map(self.fits, self.found)):
            return sorted(self.found, key=self.cost)
        return sorted(self.found, key=lambda found: (found.buffer_bytes, found.total_us))

    def ordered(self, families: Iterable[str]) -> list[str]:
        """In their order those that may be best by their bounds, then the others by these."""
        least = {family: self._bound(family) for family in families}
        near = self._enough * min(least.values())
        return sorted(least, key=lambda family: 0 if least[family] <= near else least[family])

    def look(self, family: str, name: str) -> Prediction | None:
        """Predict it, unless that cannot be worth it."""
        best = min((one.total_us for one in self.found if self.fits(one)), default=None) if self._enough else None
        if best is not None and best <= self._enough * self._bound(family):
            self.skipped.append(self._bound(family))
            return None
        self.found.append(self._predict(name))
        return self.found[-1]

    def _bound(self, family: str) -> int:
        return self._least({"striped": "relay", "even": "direct"}.get(family, family))  # one bound for both


def family_of(name: str) -> str:
    """What `bounds` calls the schedules like it."""
    return "even" if name == "gather" else name if name.startswith("ring") else name.partition(":")[0]


def _name(level: str, parts: tuple[int, ...]) -> str:
    return "gather" if (level, parts) == ("even", (1,)) else f"{level}:{name_of(parts)}"


def _rings(traffic: Traffic) -> list[str]:
    """Names of the rings that are considered, the one first that is better most often."""
    moved = hops_needed(traffic.rows) * traffic.shard_len * traffic.world_size
    return ["ring:both", "ring"] if traffic.rows.sum() * RING_EXCESS > moved else []


def _levels(traffic: Traffic, machine: Machine) -> list[str]:
    """Names of schedules that take parts. Where nodes need all rows, rails are even without stripes."""
    gpus = machine.topology.gpus_per_node
    if not 1 < gpus < traffic.world_size:
        return ["even"]
    needed = traffic.seen_by_nodes(gpus)
    missing = traffic.length.sum() * (len(needed) - 1) - (needed @ traffic.length).sum()
    return ["even", "relay", "striped"] if missing > SPARE * traffic.length.sum() else ["even", "relay"]


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


def _cuts(traffic: Traffic, machine: Machine) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
    """As many equal parts as buffers ask for, with so many ever smaller ones after them, by that number: the own shard
    hides how long the first takes to arrive, and backward waits for the dK/dV of the last. And many equal parts.
    """
    heads = machine.heads
    # K/V of two stages and dK/dV of one, twice
    most = int(traffic.rows.sum(axis=1).max()) * 2 * (heads.row_bytes + heads.grad_row_bytes)
    large = min(int(most // (machine.device.buffer_gb * 1e9)) + 1, MAX_PARTS)
    cuts = [(2**n,) * large + tuple(2**h for h in reversed(range(n))) for n in range(MAX_HALVINGS + 1)]
    return cuts, (1,) * min(MANY * large, MAX_PARTS)


def reason(choice: Choice) -> str:
    """What was predicted, the runner-up, and what sets it apart."""
    best, others, least = choice
    said = f"predicted {_ms(best.total_us)} forward and backward a layer"
    limit = best.machine.device.buffer_gb * 1e9
    if best.buffer_bytes > limit:
        said += f", the least memory: {best.buffer_bytes / 1e9:.1f} GB of buffers, over the {limit / 1e9:g} GB allowed"
    if not others:
        return said if least is None else f"{said}; no other takes less than {_ms(least)}"
    other = others[0]
    if other.buffer_bytes > limit:  # how long it takes was never asked
        return f"{said}; next {other.name}: needs {other.buffer_bytes / 1e9:.1f} GB of buffers"
    said += f"; next {other.name}, {_ms(other.total_us)}: "
    more = other.total_us - best.total_us
    waits = other.exposed_us - best.exposed_us
    if waits >= more - waits:
        return said + f"waits {_ms(waits)} longer for messages and the host"
    return said + f"its kernels take {_ms(more - waits)} longer"


def _ms(microseconds: int) -> str:
    return f"{microseconds / 1000:.2f} ms"
