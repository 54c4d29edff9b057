"""Plans of grids: the shards of rows, cut for their ranks; stored, bound, explained, and told of machines."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest

import cpflex
from cases import LAYOUTS, Problem
from cpflex.sharding.layout import cut_shards
from cpflex.testing import run_ranks
from grids import in_two_groups, two_groups

MIXED = {"full": cpflex.causal(), "sliding": cpflex.causal() & cpflex.sliding_window(40)}


def grid_plan(size: int, seq_len: int = 1000, rank: int = 0, world_size: int = 8, **options: Any) -> cpflex.Plan:
    return cpflex.make_plan(MIXED, seq_len, rank=rank, world_size=world_size, ulysses_size=size, **options)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_pieces_of_a_shard_one_after_the_other_are_the_shard(name: str, size: int):
    for seq_len in (1, 127, 1000, 5003):
        outer = LAYOUTS[name](seq_len, 3, None) if name != "balanced" else grid_plan(1, seq_len, 0, 3).layout
        flat = cut_shards(outer, size)
        assert (flat.seq_len, flat.world_size, flat.local_len) == (seq_len, 3 * size, outer.local_len // size)
        for shard in range(3):
            pieces = [flat.positions(rank) for rank in range(shard * size, (shard + 1) * size)]
            np.testing.assert_array_equal(np.concatenate(pieces), outer.positions(shard))


def test_a_shard_that_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match="a shard of 48 tokens cannot be cut into 5 equal pieces"):
        cut_shards(cpflex.contiguous(96, 2), 5)


@pytest.mark.parametrize("size", [3, 5, 6, 7])
@pytest.mark.parametrize("name", LAYOUTS)
def test_shards_are_lengthened_for_any_number_of_ranks(name: str, size: int):
    for seq_len in (5, 300, 5003):
        plan = grid_plan(size, seq_len, world_size=2 * size, layout=LAYOUTS[name])
        assert plan.local_len * size == plan.outer.local_len
        assert plan.outer.num_chunks * plan.outer.chunk_len < seq_len + 2 * 256 * size + 2 * plan.outer.chunk_len
        plan.check()


def test_kinds_are_those_of_a_plan_for_the_rows_alone():
    outer = cpflex.make_plan(MIXED, 1000, rank=2, world_size=4)
    for inner in range(2):
        plan = grid_plan(2, rank=4 + inner)
        for kind in MIXED:
            assert plan[kind].stats == outer[kind].stats
            assert [s.exchange for s in plan[kind].steps] == [s.exchange for s in outer[kind].steps]
        assert plan.fingerprint != outer.fingerprint


@pytest.mark.parametrize("size", [1, 2, 8])
def test_the_same_plan_comes_back_from_bytes(size: int):
    plan = grid_plan(size, rank=5)
    for again in (cpflex.Plan.from_bytes(plan.to_bytes()), pickle.loads(pickle.dumps(plan))):
        assert again.to_bytes() == plan.to_bytes()
        assert (again.fingerprint, again.stats, repr(again)) == (plan.fingerprint, plan.stats, repr(plan))
        again.check()


def test_a_plan_of_another_size_is_not_the_same():
    prints = {grid_plan(size, rank=0).fingerprint for size in (1, 2, 4, 8)}
    assert len(prints) == 4


def bound(group: Any) -> None:
    stored = Problem(world_size=4, ulysses_size=2).plan(None, rank=group.rank, world_size=4).to_bytes()
    plan = cpflex.Plan.from_bytes(stored)
    assert plan.why_not_callable
    for links in (group, in_two_groups(group, 2)):
        assert not plan.bind(links).why_not_callable
    with pytest.raises(ValueError, match="heads exchanged among 2 ranks; the group exchanges them among 4"):
        plan.bind(two_groups(group, 4))
    with pytest.raises(ValueError, match="made without an exchange of heads"):
        cpflex.make_plan(cpflex.causal(), 64, group).bind(in_two_groups(group, 2))


def test_a_plan_is_bound_to_one_group_or_two():
    run_ranks(bound, 4)


def test_a_plan_explains_its_rows():
    said = grid_plan(2, 5000, rank=5).explain()
    assert "grid       4 rows of 2 ranks; ranks 4, 5 exchange heads: each computes 1/2 of them on shard 2" in said
    assert "shard 2 (this one)" in said and "rank 2 (this one)" not in said
    assert "grid" not in grid_plan(1, 5000).explain()


def test_a_plan_of_a_grid_is_drawn(tmp_path: Any):
    pytest.importorskip("matplotlib")
    for size in (2, 8):
        grid_plan(size, 5000).plot(str(tmp_path / f"{size}.png"))


H100 = cpflex.Topology.named("h100-ib")
MACHINES = {  # ranks of a row -> ranks of a node, GB/s of one's share of NICs
    "rows in a node": (2, {}, 4, 47.0),
    "a node is a row": (8, {}, 1, 47.0),
    "rows longer than a node": (16, {}, 1, 47.0),
    "rows across nodes": (3, {}, 1, 47.0),
    "two GPUs a NIC": (2, {"nics_per_node": 4}, 4, 23.5),
    "eight GPUs a NIC": (4, {"nics_per_node": 1}, 2, 47.0 / 8),
}


@pytest.mark.parametrize(("size", "changes", "in_node", "share"), MACHINES.values(), ids=MACHINES)
def test_a_row_is_one_rank_to_the_machine(size: int, changes: dict, in_node: int, share: float):
    from dataclasses import replace

    topology = replace(H100, **changes)
    heads = cpflex.Heads(query=48, kv=8 if size != 3 else 6)
    plan = grid_plan(size, 4000, world_size=2 * size, topology=topology, heads=heads)
    machine = plan.kinds["full"].machine
    assert machine is not None
    assert machine.topology.gpus_per_node == in_node
    assert machine.topology.nic_gb_per_s == pytest.approx(share)
    assert (machine.heads.query, machine.heads.kv) == (48 // size, max(1, heads.kv // size))
