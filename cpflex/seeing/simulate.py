"""Strategies side by side: what a layer would take on a machine, by cpflex's plans and by other libraries' ways.

A model, not a measurement: `timing` says of what, docs/scale.md how it was checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TextIO

from cpflex.masks import MaskFn
from cpflex.planning.choose import degrees, ranked
from cpflex.planning.make import traced
from cpflex.planning.mask_kind import KindWork
from cpflex.planning.predict import Prediction, outer_machine, predict
from cpflex.planning.timing import BACKWARD_FLOPS, Timeline
from cpflex.planning.traffic import Traffic, traffic_of
from cpflex.ring.schedule import hops_needed
from cpflex.seeing.peers import Passes, Scene, longest_first, peers
from cpflex.sharding.balance import balanced
from cpflex.sharding.layout import Layout, LayoutFn, cut_shards, zigzag
from cpflex.tile_mask import Tiles
from cpflex.topology import Machine

MAX_TILES = 1 << 15
"""More tiles than this of the whole sequence are counted as larger blocks."""


@dataclass(frozen=True, eq=False)
class Strategy:
    """One way to compute a layer of each mask kind, as often as it is weighted."""

    name: str
    passes: Mapping[str, Passes]
    """Of each mask kind."""
    weights: Mapping[str, float]
    ours: Mapping[str, Prediction] | None = None
    """Predictions of cpflex's plan, by mask kind; None for another library."""

    def _sum(self, of: Callable[[Timeline], float], backward: bool | None = None) -> float:
        chosen = slice(None) if backward is None else slice(int(backward), int(backward) + 1)
        return sum(self.weights[kind] * of(one) for kind, passes in self.passes.items() for one in passes[chosen])

    @cached_property
    def forward_us(self) -> float:
        return self._sum(lambda one: one.makespan, backward=False) * 1e6

    @cached_property
    def backward_us(self) -> float:
        return self._sum(lambda one: one.makespan, backward=True) * 1e6

    @property
    def total_us(self) -> float:
        return self.forward_us + self.backward_us

    @cached_property
    def exposed_us(self) -> float:
        """The time for which the mean rank runs no kernels of the attention."""
        return self.total_us - self._sum(lambda one: float(one.busy.mean())) * 1e6

    @cached_property
    def nic_use(self) -> float:
        """Of the NICs' time, in mean over ranks."""
        rate = next(iter(self.passes.values())).forward.topology.nic_gb_per_s * 1e9
        return self._sum(lambda one: float(one.bytes_across.mean()) / rate) * 1e6 / self.total_us

    @property
    def buffer_bytes(self) -> int | None:
        """Of other ranks' rows, at most, at one rank; of cpflex alone."""
        return max(one.buffer_bytes for one in self.ours.values()) if self.ours is not None else None


@dataclass(frozen=True)
class Outcome:
    """All strategies, the best first, and what would be ideal."""

    strategies: Sequence[Strategy]
    ideal_us: float
    """If nothing but the products took time, equally on all ranks: forward and backward."""
    imbalance: Mapping[str, float]
    """Most work over mean work of the layout of all ranks, by mask kind."""

    def best(self, ours: bool) -> Strategy:
        return min((s for s in self.strategies if (s.ours is not None) == ours), key=lambda s: s.total_us)

    def efficiency(self, strategy: Strategy) -> float:
        return self.ideal_us / strategy.total_us


class Workload:
    """Mask kinds on a sequence, with the tables that predictions need, made when they are first asked for.

    Args:
        documents: lengths of the packed documents of a kind, where rings over zigzag layouts can compute it; an empty
            list for one dense sequence; kinds that are not named are beyond them.
    """

    def __init__(
        self,
        masks: Mapping[str, MaskFn],
        seq_len: int,
        weights: Mapping[str, float] | None = None,
        documents: Mapping[str, Sequence[int]] | None = None,
        batch_size: int | None = None,
        num_heads: int | None = None,
    ) -> None:
        self.seq_len = seq_len
        self.weights = dict(weights or dict.fromkeys(masks, 1.0))
        self.documents = dict(documents or {})
        copies: dict = {}
        self._sizes = batch_size or 1, num_heads or 1
        self._mods = {kind: traced(mask, seq_len, batch_size, num_heads, copies) for kind, mask in masks.items()}
        self._traffic: dict[tuple[str, str], Traffic] = {}
        self._work: dict[Machine | None, KindWork] = {}

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self._mods)

    def layout(self, layout: LayoutFn, world_size: int, machine: Machine | None) -> Layout:
        return layout(self.seq_len, world_size, self._work_on(machine))

    def _work_on(self, machine: Machine | None) -> KindWork:
        if machine not in self._work:
            self._work[machine] = KindWork(self._mods, self.weights, *self._sizes, machine)
        return self._work[machine]

    def traffic(self, kind: str, layout: Layout) -> Traffic:
        if (kind, layout.key) not in self._traffic:
            tiles = Tiles(layout.chunk_len, layout.num_chunks)
            while tiles.num_tiles > MAX_TILES and tiles.tile_len < layout.chunk_len:
                tiles = replace(tiles, tile_len=tiles.tile_len * 2)
            found = traffic_of(self._work_on(None).classifiers[kind], layout, tiles)
            self._traffic[kind, layout.key] = found
        return self._traffic[kind, layout.key]


def simulate(
    workload: Workload,
    world_size: int,
    machine: Machine,
    layout: LayoutFn = balanced,
    say: Callable[[str], None] = lambda what: None,
) -> Outcome:
    """Every strategy on every mask kind. ``say`` is told what is being worked on."""
    say(f"layout over {world_size} ranks")
    flat = workload.layout(layout, world_size, machine)
    tables = {kind: workload.traffic(kind, flat) for kind in workload.kinds}
    pairs = sum(workload.weights[kind] * float(tables[kind].pairs.sum()) for kind in tables)
    flops = pairs / world_size * machine.heads.flops_per_pair * (1 + BACKWARD_FLOPS)
    strategies = [
        *_ours(workload, world_size, machine, layout, say),
        *_theirs(workload, world_size, machine, say),
    ]
    say("")
    imbalance = {kind: table.imbalance for kind, table in tables.items()}
    order = sorted(strategies, key=lambda strategy: strategy.total_us)
    return Outcome(order, flops / (machine.device.tflops * 1e6), imbalance)


def _ours(
    workload: Workload, world_size: int, machine: Machine, layout: LayoutFn, say: Callable[[str], None]
) -> Iterator[Strategy]:
    """By degree, then by schedule; with several mask kinds, the best schedule of each."""
    say("cpflex without a machine")
    plain = workload.layout(layout, world_size, None)
    tables = {kind: workload.traffic(kind, plain) for kind in workload.kinds}
    found = {kind: predict(_rule(table), table, machine) for kind, table in tables.items()}
    yield _strategy("cpflex, topology not given", found, workload)
    for degree in degrees(world_size, machine):
        say(f"cpflex, heads over {degree}")
        outer = workload.layout(layout, world_size // degree, outer_machine(machine, degree))
        orders = {kind: ranked(workload.traffic(kind, outer), machine, degree) for kind in workload.kinds}
        if len(orders) > 1 and degree > 1 and outer.local_len % degree == 0:
            flat = cut_shards(outer, degree)
            alone = {kind: ranked(workload.traffic(kind, flat), machine) for kind in workload.kinds}
            best = {kind: min(orders[kind][0], alone[kind][0], key=lambda one: one.total_us) for kind in orders}
            if len({one.degree for one in best.values()}) > 1:
                yield _strategy(f"cpflex, heads over {degree} for some", best, workload)
        label = "cpflex" if degree == 1 else f"cpflex, heads over {degree}"
        shown = max(map(len, orders.values())) if len(orders) == 1 else 1
        for place in range(shown):
            yield _strategy(label, {kind: order[place] for kind, order in orders.items()}, workload)


def _rule(traffic: Traffic) -> str:
    """What `auto` takes without a machine."""
    hops = hops_needed(traffic.rows)
    return "direct" if traffic.rows.sum() / traffic.world_size < hops * traffic.shard_len / 2 else "ring"


def _strategy(label: str, found: Mapping[str, Prediction], workload: Workload) -> Strategy:
    mixed = len({one.degree for one in found.values()}) > 1
    names = [one.name + (f" over {one.degree}" if mixed and one.degree > 1 else "") for one in found.values()]
    name = f"{label}: {' + '.join(names)}"
    passes = {kind: Passes(one.forward, one.backward) for kind, one in found.items()}
    return Strategy(name, passes, workload.weights, found)


def _theirs(workload: Workload, world_size: int, machine: Machine, say: Callable[[str], None]) -> Iterator[Strategy]:
    found: dict[str, dict[str, Passes]] = {}
    for kind in workload.kinds:
        say(f"other libraries, {kind}")
        dealt = workload.traffic(kind, workload.layout(longest_first, world_size, None))
        pairs = float(dealt.pairs.sum())

        def on_zigzag(size: int, kind: str = kind) -> Traffic:
            return workload.traffic(kind, zigzag(workload.seq_len, size))

        rings = on_zigzag if kind in workload.documents else None
        scene = Scene(workload.seq_len, machine, world_size, pairs, dealt, rings, workload.documents.get(kind) or None)
        for name, passes in peers(scene):
            found.setdefault(name, {})[kind] = passes
    for name, passes in found.items():
        if len(passes) == len(workload.kinds):
            yield Strategy(name, passes, workload.weights)


# -- in words

SHOWN = 8
"""Of cpflex's strategies, unless all are asked for."""


def table(workload: Workload, world_size: int, machine: Machine, outcome: Outcome, *, everything: bool = False) -> str:
    """What was simulated, and a line for each strategy, the best first; an arrow marks cpflex's."""
    topology, heads = machine.topology, machine.heads
    nodes = topology.num_nodes(world_size)
    layers = ", ".join(f"{workload.weights[kind]:g} x {kind}" for kind in workload.kinds)
    uneven = ", ".join(f"{value:.3f}" for value in outcome.imbalance.values())
    lines = [
        f"{workload.seq_len:,} tokens on {world_size} ranks, {nodes} nodes of {topology.gpus_per_node}: "
        f"{topology.intra_gb_per_s:g} GB/s inside, {topology.nic_gb_per_s:g} GB/s a GPU across; "
        f"{machine.device.tflops:g} TFLOP/s, {heads.query}/{heads.kv} heads of {heads.dim}",
        f"a model, not a measurement; layers: {layers}; most work / mean work: {uneven}",
        f"if nothing but the kernels took time: {_ms(outcome.ideal_us)}, forward and backward",
        "",
    ]
    ours = [strategy for strategy in outcome.strategies if strategy.ours is not None]
    best, kept = ours[0], set(ours if everything else ours[:SHOWN])
    kept |= {s for s in outcome.strategies if s.ours is None or "topology not given" in s.name}
    rows = [["", "", "forward", "backward", "of ideal", "waiting", "NICs", "buffers"]]
    for strategy in outcome.strategies:
        if strategy in kept:
            buffers = "" if strategy.buffer_bytes is None else f"{strategy.buffer_bytes / 1e9:.2f} GB"
            times = (_ms(x) for x in (strategy.forward_us, strategy.backward_us))
            share, waiting = f"{outcome.efficiency(strategy):.2f}", _ms(strategy.exposed_us)
            mark = "->" if strategy is best else ""
            rows.append([mark, strategy.name, *times, share, waiting, f"{100 * strategy.nic_use:.0f}%", buffers])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for mark, name, *cells in rows:
        right = "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths[2:], strict=True))
        lines.append(f"{mark:2} {name:<{widths[1]}}{right}".rstrip())
    return "\n".join(lines)


def say_on(stream: TextIO) -> Callable[[str], None]:
    """What is being worked on, in one line of a terminal; nothing elsewhere."""

    def say(what: str) -> None:
        if stream.isatty():
            stream.write(f"\r\x1b[K{what} ..." if what else "\r\x1b[K")
            stream.flush()

    return say


def _ms(microseconds: float) -> str:
    return f"{microseconds / 1000:.2f} ms"
