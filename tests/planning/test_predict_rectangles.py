"""Predictions for keys that are another sequence, or those of earlier chunks: their tables are counted tile by tile, and
their messages are those of the real plans.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_predict import flows, messages, on

import cpflex
from cpflex.planning.bounds import least_us
from cpflex.planning.choose import choose, family_of, ranked
from cpflex.planning.needs import classifier, tiles_of, traffic_by_block
from cpflex.planning.predict import predict, stages_of
from cpflex.planning.traffic import Traffic, traffic_of
from cpflex.ring.named import named_schedule

Q_LEN, KV_LEN = 3000, 6144
MASKS: dict[str, Any] = {
    "full": cpflex.full(),
    "near": lambda b, h, q, k: (k - 2 * q).abs() < 600,
    "some documents": lambda b, h, q, k: (q // 250 == k // 500) & (q // 250 % 3 != 0),
}
CHUNKED: dict[str, Any] = {
    "causal": cpflex.causal(),
    "window and sinks": cpflex.causal() & (cpflex.sliding_window(900) | (lambda b, h, q, k: k < 4)),
}
KINDS = {f"cross: {name}": mask for name, mask in MASKS.items()} | {f"chunk: {name}": m for name, m in CHUNKED.items()}
WORLDS = {"6 as 4 + 2": (6, 4), "4 on one node": (4, 8)}


def plan_of(kind: str, rank: int, world_size: int, **options: Any) -> cpflex.Plan:
    where: dict[str, Any] = {"rank": rank, "world_size": world_size}
    mask = KINDS[kind]
    if kind.startswith("cross"):
        keys = cpflex.make_plan(cpflex.full(), KV_LEN, layout=cpflex.striped, **where)
        return cpflex.make_plan(cpflex.cross(mask, keys), Q_LEN, **where, **options)
    first = cpflex.make_plan(mask, KV_LEN - Q_LEN, layout=cpflex.zigzag, **where)
    return cpflex.make_plan(cpflex.cached(mask, [first]), Q_LEN, layout=cpflex.zigzag, **where, **options)


def tables(plan: cpflex.Plan) -> Traffic:
    """Of all tiles: as many as the planner's blocks, at this length."""
    (kind,) = plan.kinds.values()
    return traffic_by_block(classifier(kind.mask, 1, 1), plan.layout, kind.keys)


@pytest.mark.parametrize("kind", KINDS)
def test_tables_equal_what_counting_every_tile_gives(kind: str):
    plan = plan_of(kind, 0, 6)
    (planned,), layout = plan.kinds.values(), plan.layout
    keys = planned.keys
    assert keys is not None
    tiles, key_tiles = tiles_of(layout), tiles_of(keys)
    found = traffic_of(classifier(planned.mask, 1, 1), layout, tiles, keys, key_tiles)
    assert (found.local_len, found.shard_len) == (layout.local_len, keys.local_len)
    seen = classifier(planned.mask, 1, 1)(tiles.lo[:, None], tiles.hi[:, None], key_tiles.lo, key_tiles.hi) != 0
    holds, owner = layout.owner[tiles.chunk], keys.owner[key_tiles.chunk]
    for rank in range(6):
        for other in range(6):
            part = seen[np.ix_(holds == rank, owner == other)]
            q_len, kv_len = tiles.length[holds == rank], key_tiles.length[owner == other]
            assert found.pairs[rank, other] == (part * np.outer(q_len, kv_len)).sum()
            assert found.touched[rank, other] == q_len[part.any(axis=1)].sum()
            assert found.rows[rank, other] == (rank != other) * kv_len[part.any(axis=0)].sum()


@pytest.mark.by_day(14)
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", ["ring", "ring:both", "direct", "gather", "even:3", "relay:2/1", "striped:2"])
def test_every_message_of_a_program_is_one_of_the_plans(schedule: str, kind: str, world: str):
    size, gpus = WORLDS[world]
    options: dict[str, Any] = {"schedule": named_schedule(schedule), "topology": on(gpus).topology}
    made = [plan_of(kind, rank, size, **options) for rank in range(size)]
    stages = stages_of(schedule, tables(made[0]), on(gpus).topology)
    steps = [[*(step.exchange for step in plan.steps), *plan.steps[-1].exchange.after] for plan in made]
    is_cut = schedule.partition(":")[0] in ("even", "relay", "striped")
    if kind.startswith("chunk") and is_cut:  # cut by rows here, and by tiles there, which are of several lengths
        rows = sum(int(stage.arrives.rows.sum()) for stage in stages)
        moved = sum(sum(messages([e.sends for e in here]).values()) for here in zip(*steps, strict=True))
        assert rows == pytest.approx(moved, rel=0.05)
        return
    assert {len(one) for one in steps} == {len(stages)}
    for stage, *here in zip(stages, *steps, strict=True):
        assert flows(stage.arrives) == messages([exchange.sends for exchange in here])
        assert flows(stage.returns) == messages([exchange.grad_sends for exchange in here])


@pytest.mark.by_day(4)
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", KINDS)
def test_auto_takes_the_least_predicted_time_alike_on_every_rank(kind: str, world: str):
    size, gpus = WORLDS[world]
    made = [plan_of(kind, rank, size, topology=on(gpus).topology) for rank in (0, size - 1)]
    traffic = tables(made[0])
    best, others, least = choose(traffic, on(gpus))
    for name in ("direct", "gather", "even:2/1"):
        assert best.total_us <= 1.01 * predict(name, traffic, on(gpus)).total_us
    assert others or least is not None
    for plan in made:
        assert plan.stats["schedule"] == best.name
        assert f"predicted {best.total_us / 1000:.2f} ms" in plan.stats["reason"]
        assert f"predicted  forward {1e3 * best.forward.makespan:.2f} ms" in plan.explain()
        plan.check()
    assert made[0].fingerprint == made[1].fingerprint
    for one in ranked(traffic, on(gpus)):
        assert least_us(family_of(one.name), traffic, on(gpus)) <= one.total_us


def test_keys_on_every_rank_are_not_exchanged():
    mask = cpflex.cross(cpflex.full(), 500)
    plan = cpflex.make_plan({"cross": mask}, Q_LEN, rank=1, world_size=4, topology=on(4).topology)
    assert plan.stats["reason"] == "no rank needs another's keys"
    assert not any(plan.stats["recv_tokens"])


def test_a_rectangle_of_one_sequence_is_its_square():
    plan = cpflex.make_plan(MASKS["near"], KV_LEN, rank=0, world_size=6, layout=cpflex.striped)
    classify = classifier(plan.kinds["mask"].mask, 1, 1)
    one, other = traffic_by_block(classify, plan.layout), traffic_by_block(classify, plan.layout, replace(plan.layout))
    for name, found in vars(one).items():
        np.testing.assert_array_equal(found, vars(other)[name])
