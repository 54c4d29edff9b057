"""Predictions are made of what plans do: every message and every pair of the tables is one of the real plans'."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

import cpflex
from cpflex.masks import MaskFn
from cpflex.planning.bounds import least_us
from cpflex.planning.choose import ENOUGH, choose, degrees, family_of, ranked
from cpflex.planning.make import traced
from cpflex.planning.mask_kind import KindWork
from cpflex.planning.predict import outer_machine, predict, stages_of
from cpflex.planning.stages import Flow
from cpflex.planning.traffic import Traffic, traffic_of
from cpflex.ring.named import named_schedule
from cpflex.ring.schedule import Exchange, Transfer, most_rows
from cpflex.sharding.layout import Layout
from cpflex.tile_mask import Tiles
from cpflex.topology import Device, Heads, Machine, Topology

SEQ_LEN = 6144
CU = [0, 400, 1500, 1600, 3400, 3401, 5600, SEQ_LEN]
MASKS: dict[str, MaskFn] = {
    "causal": cpflex.causal(),
    "documents": cpflex.causal() & cpflex.document(cu_seqlens=CU),
    "window": cpflex.causal() & cpflex.sliding_window(700),
    "full": cpflex.full(),
    "far": lambda b, h, q, k: (q - k) % 2000 < 200,
}
SCHEDULES = ("ring", "ring:both", "direct", "gather", "even:3", "even:4/2/1", "relay:1", "relay:3/2/1", "striped:2")
WORLDS = {"8 as 2 x 4": (8, 4), "6 as 4 + 2": (6, 4), "4 on one node": (4, 8)}


@cache
def scene(mask: str, world_size: int) -> tuple[Layout, Traffic]:
    """Of all tiles: as many as the planner's blocks, at this length."""
    work = KindWork({"mask": traced(MASKS[mask], SEQ_LEN, None, None, {})}, {"mask": 1.0}, 1, 1)
    layout = cpflex.balanced(SEQ_LEN, world_size, work)
    tiles = Tiles(layout.chunk_len, layout.num_chunks)
    return layout, traffic_of(work.classifiers["mask"], layout, tiles)


def on(gpus: int) -> Machine:
    return Machine(Topology(gpus, 370.0, 47.0), Device(), Heads())


def plans(mask: str, schedule: str, world_size: int, gpus: int) -> list[cpflex.Plan]:
    layout, _ = scene(mask, world_size)
    return [
        cpflex.make_plan(
            MASKS[mask], SEQ_LEN, rank=rank, world_size=world_size, layout=lambda *_: layout,
            schedule=named_schedule(schedule), topology=on(gpus).topology,
        )
        for rank in range(world_size)
    ]  # fmt: skip


def messages(sent: list[tuple[Transfer, ...]]) -> Counter[tuple[int, int]]:
    """Rows from each rank to each other."""
    found: Counter[tuple[int, int]] = Counter()
    for rank, transfers in enumerate(sent):
        for transfer in transfers:
            if transfer.peer != rank:
                found[rank, transfer.peer] += transfer.num_rows
    return found


def flows(flow: Flow) -> Counter[tuple[int, int]]:
    found: Counter[tuple[int, int]] = Counter()
    for source, target, rows in zip(*(part.tolist() for part in flow), strict=True):
        found[source, target] += int(rows)
    return found


@pytest.mark.by_day(6)
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_message_and_pair_of_a_program_is_one_of_the_plans(schedule: str, mask: str, world: str):
    size, gpus = WORLDS[world]
    stages = stages_of(schedule, scene(mask, size)[1], on(gpus).topology)
    made = plans(mask, schedule, size, gpus)
    steps = [[*(step.exchange for step in plan.steps), *plan.steps[-1].exchange.after] for plan in made]
    assert {len(one) for one in steps} == {len(stages)}
    for index, (stage, *exchanges) in enumerate(zip(stages, *steps, strict=True)):
        here: list[Exchange] = exchanges
        assert flows(stage.arrives) == messages([exchange.sends for exchange in here])
        assert flows(stage.returns) == messages([exchange.grad_sends for exchange in here])
        if stage.computes:
            tiles = np.array([plan.steps[index].tile_mask.num_tiles for plan in made])
            tile = scene(mask, size)[1].length.max()
            # parts are cut by rows, and what a part of a shard is seen by may be less or more than its share
            if schedule in ("ring", "ring:both", "direct", "gather"):
                assert stage.pairs.tolist() == (tiles * tile**2).tolist()
    total = sum(stage.pairs for stage in stages)
    assert total == pytest.approx(scene(mask, size)[1].pairs.sum(axis=1), abs=len(stages) * size)


@pytest.mark.parametrize("mask", MASKS)
def test_tables_equal_what_counting_every_tile_gives(mask: str):
    layout, found = scene(mask, 6)
    tiles = Tiles(layout.chunk_len, layout.num_chunks)
    mod = traced(MASKS[mask], SEQ_LEN, None, None, {})
    classify = KindWork({"mask": mod}, {"mask": 1.0}, 1, 1).classifiers["mask"]
    seen = classify(tiles.lo[:, None], tiles.hi[:, None], tiles.lo, tiles.hi) != 0
    owner, length = layout.owner[tiles.chunk], tiles.length
    for rank in range(6):
        for other in range(6):
            part = seen[np.ix_(owner == rank, owner == other)]
            assert found.pairs[rank, other] == (part * np.outer(length[owner == rank], length[owner == other])).sum()
            assert found.touched[rank, other] == length[owner == rank][part.any(axis=1)].sum()
            assert found.rows[rank, other] == (rank != other) * length[owner == other][part.any(axis=0)].sum()
    nodes = found.seen_by_nodes(4)
    for node, ranks in enumerate(([0, 1, 2, 3], [4, 5])):
        outside = ~np.isin(owner, ranks)
        wanted = seen[np.isin(owner, ranks)].any(axis=0) & outside
        assert found.by_owner(nodes)[node].tolist() == [int(length[wanted & (owner == o)].sum()) for o in range(6)]


def test_buffers_are_those_that_plans_count():
    _, traffic = scene("documents", 8)
    machine = on(4)
    for schedule in ("direct", "even:4/2/1"):
        made = plans("documents", schedule, 8, 4)
        held = max(most_rows([step.exchange for step in plan.steps]) for plan in made)
        found = predict(schedule, traffic, machine)
        came = [stage.arrives.received(8) for stage in found.stages]
        two = max(int((a + b).max()) for a, b in zip(came, [*came[1:], np.zeros(8)], strict=True))
        # as they arrive, and joined
        assert two <= held <= 2 * two


@pytest.mark.parametrize("degree", [2, 4])
def test_ranks_that_share_heads_see_the_machine_as_make_plan_does(degree: int):
    machine = Machine(replace(Topology.named("h100-ib"), nics_per_node=4), Device(), Heads())
    plan = cpflex.make_plan(
        cpflex.causal(), 4096, rank=0, world_size=16, ulysses_size=degree, topology=machine.topology
    )
    seen, (kind,) = outer_machine(machine, degree), plan.kinds.values()
    assert kind.machine is not None
    assert seen.heads == kind.machine.heads
    for name in ("gpus_per_node", "intra_gb_per_s", "nic_gb_per_s"):
        assert getattr(seen.topology, name) == getattr(kind.machine.topology, name)


def test_heads_are_shared_inside_a_node_as_far_as_they_divide():
    assert degrees(64, on(8)) == [1, 2, 4, 8]
    assert degrees(4, on(8)) == [1, 2, 4]
    assert degrees(12, on(6)) == [1, 2]
    assert degrees(64, Machine(on(8).topology, Device(), Heads(24, 6))) == [1, 2]


def test_an_all_to_all_costs_what_its_bytes_do():
    machine = Machine(Topology(8, 100.0, 10.0, intra_latency_us=0.0, message_us=0.0), Device(), Heads())
    _, traffic = scene("causal", 4)
    alone, shared = (predict("ring", traffic, machine, degree) for degree in (1, 4))
    row = 32 * 128 * 2 + 2 * 8 * 128 * 2 + 32 * (128 * 2 + 4)
    tokens = traffic.local_len // 4
    sent, copied = tokens * row * 3 / 4 / 100e9, 4 * tokens * row / 2.8e12
    inner = predict("ring", traffic, outer_machine(machine, 4))
    assert shared.forward.makespan == pytest.approx(inner.forward.makespan + sent + copied, rel=1e-3)
    assert shared.total_us != alone.total_us


@pytest.mark.by_day(3)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("world", WORLDS)
def test_auto_takes_the_least_predicted_time_alike_on_every_rank(mask: str, world: str):
    size, gpus = WORLDS[world]
    layout, traffic = scene(mask, size)
    best, others, least = choose(traffic, on(gpus))
    made = [
        cpflex.make_plan(
            MASKS[mask], SEQ_LEN, rank=rank, world_size=size, layout=lambda *_: layout, topology=on(gpus).topology
        )
        for rank in (0, size - 1)
    ]
    for name in ("direct", "gather", "even:2/1", "relay:2/1", "striped:2/1"):
        assert best.total_us <= 1.01 * predict(name, traffic, on(gpus)).total_us
    assert others or least is not None
    words = others[0].name if others else f"no other takes less than {(least or 0) / 1000:.2f} ms"
    for plan in made:
        assert plan.stats["schedule"] == best.name
        assert f"predicted {best.total_us / 1000:.2f} ms" in plan.stats["reason"]
        assert words in plan.stats["reason"]
        plan.check()
    assert made[0].fingerprint == made[1].fingerprint


@pytest.mark.by_day(3)
@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("world", WORLDS)
def test_no_schedule_is_predicted_to_take_less_than_its_bound(mask: str, world: str, degree: int):
    size, gpus = WORLDS[world]
    _, traffic = scene(mask, size // degree)
    for inter in (5.0, 47.0):
        machine = on(gpus)._replace(topology=Topology(gpus, 370.0, inter))
        names = [one.name for one in ranked(traffic, machine, degree)] + ["ring", "ring:both", "even:5", "relay:1"]
        for name in names:
            assert (
                least_us(family_of(name), traffic, machine, degree) <= predict(name, traffic, machine, degree).total_us
            )


K = 1 << 10
DOCUMENTS = [0, *np.cumsum([3_000, 9_000, 120_000, 500, 40_000, 77_000]).tolist(), 256 * K]
LONGER = {
    "causal": cpflex.causal(),
    "documents": cpflex.causal() & cpflex.document(cu_seqlens=DOCUMENTS),
    "window": cpflex.causal() & cpflex.document(cu_seqlens=DOCUMENTS) & cpflex.sliding_window(1024),
}


@pytest.mark.by_day(6)
@pytest.mark.parametrize("degree", [1, 8])
@pytest.mark.parametrize("topology", ["h100-ib", "h100-ethernet", "gb200-nvl72"])
@pytest.mark.parametrize("mask", LONGER)
def test_what_is_not_predicted_would_be_better_by_a_hundredth_at_most(mask: str, topology: str, degree: int):
    machine = Machine(Topology.named(topology), Device(), Heads())
    mod = traced(LONGER[mask], 256 * K, None, None, {})
    work = KindWork({"mask": mod}, {"mask": 1.0}, 1, 1, outer_machine(machine, degree))
    layout = cpflex.balanced(256 * K, 64 // degree, work)
    tiles = Tiles(layout.chunk_len, layout.num_chunks)
    traffic = traffic_of(work.classifiers["mask"], layout, tiles)
    choice, everything = choose(traffic, machine, degree), ranked(traffic, machine, degree)
    assert choice.best.total_us <= 1.01 * everything[0].total_us
    assert 1 + len(choice.others) <= len(everything)
    if choice.least_us is not None:
        assert choice.best.total_us <= ENOUGH * choice.least_us


def test_auto_keeps_within_the_buffers_of_the_device():
    _, traffic = scene("full", 8)
    free = ranked(traffic, on(8))
    small = replace(on(8).device, buffer_gb=min(p.buffer_bytes for p in free) / 1e9)
    tight = ranked(traffic, on(8)._replace(device=small))
    assert tight[0].buffer_bytes <= small.buffer_gb * 1e9 < free[0].buffer_bytes
    hopeless = ranked(traffic, on(8)._replace(device=replace(small, buffer_gb=1e-6)))
    assert hopeless[0].buffer_bytes == min(p.buffer_bytes for p in hopeless)


def test_faster_links_leave_less_to_wait_for_and_slower_kernels_hide_more():
    _, traffic = scene("documents", 8)
    slow, fast = (on(4)._replace(topology=Topology(4, 370.0, rate)) for rate in (5.0, 500.0))
    for schedule in SCHEDULES:
        assert predict(schedule, traffic, fast).total_us < predict(schedule, traffic, slow).total_us
    lazy = on(4)._replace(device=Device(tflops=20.0))
    assert predict("gather", traffic, lazy).exposed_us < predict("gather", traffic, on(4)).exposed_us


def test_a_schedule_that_is_not_known_is_refused():
    _, traffic = scene("causal", 4)
    for name in ("relays:2", "even", "even:", "ring:2", "even:1/x"):
        with pytest.raises(ValueError, match="there is no schedule"):
            stages_of(name, traffic, on(4).topology)
