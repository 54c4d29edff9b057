"""Plans: what they say, how they travel, and what they refuse."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import cpflex
from cases import LAYOUTS, MASKS, SCHEDULES, Problem
from cpflex.ring import handles
from cpflex.testing import ThreadLinks, run_ranks
from patience import patience
from processes import RankProcesses
from runs import assemble, attend_on_rank

CAUSAL = cpflex.causal()


# -- planning without a group


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_plan_made_without_a_group_is_the_one_made_with_it(layout: str, schedule: str):
    problem = Problem("doc_sliding_causal", seq_len=321, layout=layout, schedule=schedule)

    def fingerprint(group: ThreadLinks) -> tuple[str, list[int], dict]:
        plan = problem.plan(group)
        return plan.fingerprint, plan.positions.tolist(), plan.stats

    with_group = run_ranks(fingerprint, 3)
    for rank, (name, positions, stats) in enumerate(with_group):
        plan = problem.plan(None, rank=rank, world_size=3)
        assert (plan.fingerprint, plan.positions.tolist(), plan.stats) == (name, positions, stats)
        assert (plan.rank, plan.world_size, plan.seq_len) == (rank, 3, 321)
    assert len({name for name, _, _ in with_group}) == 1


def test_planning_never_communicates():
    def plan(group: ThreadLinks) -> tuple[int, int]:
        made = cpflex.make_plan({"full": CAUSAL, "sliding": CAUSAL & cpflex.sliding_window(7)}, 300, group)
        made["full"].stats, made.positions, made.shard(torch.zeros(300), 0, pad_value=0)
        return group.num_exchanges, group.num_gathered

    assert run_ranks(plan, 2) == [(0, 0)] * 2


def test_a_plan_for_inspection_is_not_called_until_it_is_bound():
    q = torch.randn(1, 1, 32, 16)

    def attend(group: ThreadLinks) -> Tensor:
        plan = cpflex.make_plan(CAUSAL, 64, rank=group.rank, world_size=2, layout=cpflex.contiguous)
        with pytest.raises(ValueError, match=r"without a group; call plan = plan\.bind\(group\) first"):
            cpflex.flex_attention(q, q, q, block_mask=plan)
        return cpflex.flex_attention(q, q, q, block_mask=plan.bind(group))

    assert all(out.isfinite().all() for out in run_ranks(attend, 2))


def test_a_plan_of_one_rank_needs_no_group():
    q = torch.randn(1, 1, 64, 16)
    cpflex.flex_attention(q, q, q, block_mask=cpflex.make_plan(CAUSAL, 64))
    cpflex.flex_attention(q, q, q, block_mask=cpflex.make_plan(CAUSAL, 64, rank=0, world_size=1))


def test_binding_to_another_group_than_planned_for_is_refused():
    def bind(group: ThreadLinks) -> None:
        other = cpflex.make_plan(CAUSAL, 64, rank=1 - group.rank, world_size=2)
        with pytest.raises(ValueError, match=f"made for rank {1 - group.rank} of 2; the group makes this process rank"):
            other.bind(group)
        with pytest.raises(ValueError, match="made for rank 0 of 3"):
            cpflex.make_plan(CAUSAL, 64, rank=0, world_size=3).bind(group)

    run_ranks(bind, 2)
    with pytest.raises(ValueError, match="made for rank 1 of 2; the group makes this process rank 0 of 1"):
        cpflex.make_plan(CAUSAL, 64, rank=1, world_size=2).bind(None)


def bind_to_many(group: dist.ProcessGroup) -> list[str]:
    said = []
    plan = cpflex.make_plan(CAUSAL, 64, rank=group.rank(), world_size=4)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    for other in (mesh, mesh["cp"], "cp", object()):
        try:
            plan.bind(other)
        except (ValueError, TypeError) as error:
            said.append(str(error))
    one = dist.new_group([0])
    try:
        cpflex.make_plan(CAUSAL, 64, one)
        said.append("")
    except (ValueError, TypeError) as error:
        said.append(str(error))
    assert plan.bind(group).world_size == 4
    return said


def test_what_is_no_group_of_this_process_is_refused(four_processes: RankProcesses):
    for rank, (mesh, part, text, thing, outside) in enumerate(four_processes.run(bind_to_many)):
        assert "made without an exchange of heads; the group exchanges them among 2 ranks" in mesh
        assert "the group makes this process rank" in part
        assert "(of heads, of the sequence) or None; got str" in text
        assert "got object" in thing
        assert bool(outside) == (rank > 0)


# -- pickling


def pickled(plan: cpflex.Plan) -> cpflex.Plan:
    return pickle.loads(pickle.dumps(plan))


@pytest.mark.parametrize("mask", MASKS)
def test_a_plan_pickles_and_is_the_same_plan(mask: str):
    problem = Problem(mask, seq_len=2500, heads="gqa")
    plan = problem.plan(None, rank=1, world_size=3)
    again = pickled(plan)
    assert (again.fingerprint, again.stats, repr(again)) == (plan.fingerprint, plan.stats, repr(plan))
    assert torch.equal(again.positions, plan.positions)
    for ours, theirs in zip(again.steps, plan.steps, strict=True):
        assert ours.exchange == theirs.exchange
        for name in ("q_positions", "kv_positions", "q_starts", "kv_starts"):
            assert torch.equal(getattr(ours.tile_mask, name), getattr(theirs.tile_mask, name))


def test_a_plan_that_travelled_computes_the_same():
    problem = Problem("doc_causal", "none", 1500)

    def attend(group: ThreadLinks) -> bool:
        plan = problem.plan(group)
        q = plan.shard(problem.tensors["q"], 2, pad_value=0.0)
        travelled = pickled(plan).bind(group)
        return torch.equal(
            cpflex.flex_attention(q, q, q, block_mask=plan), cpflex.flex_attention(q, q, q, block_mask=travelled)
        )

    assert all(run_ranks(attend, 2))


def test_a_plan_leaves_its_group_behind_when_it_travels():
    def travel(group: ThreadLinks) -> None:
        plan = pickled(cpflex.make_plan(CAUSAL, 64, group, layout=cpflex.contiguous))
        with pytest.raises(ValueError, match=r"plan\.bind\(group\)"):
            q = torch.randn(1, 1, 32, 16)
            cpflex.flex_attention(q, q, q, block_mask=plan)

    run_ranks(travel, 2)


def test_a_plan_of_several_kinds_pickles():
    plan = pickled(cpflex.make_plan({"full": CAUSAL, "sliding": CAUSAL & cpflex.sliding_window(7)}, 300))
    assert sorted(plan.kinds) == ["full", "sliding"]
    q = torch.randn(1, 1, plan.local_len, 16)
    assert not torch.equal(
        cpflex.flex_attention(q, q, q, block_mask=plan["full"]),
        cpflex.flex_attention(q, q, q, block_mask=plan["sliding"]),
    )


# -- fingerprints

FINGERPRINT = """
import torch, cpflex
ids = torch.arange(500) // 37
mine = lambda b, h, q, k: q % 7 == k % 7
mask = {"full": cpflex.causal() & cpflex.document(ids), "sliding": cpflex.sliding_window(50, 3), "mine": mine}
plan = cpflex.make_plan(mask, 500, rank=1, world_size=4, weights={"full": 1, "sliding": 3, "mine": 2})
print(plan.fingerprint, plan.layout.key)
"""


def test_a_fingerprint_is_the_same_in_every_process():
    said = {
        subprocess.run(
            [sys.executable, "-c", FINGERPRINT],
            env=os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
            timeout=patience(120),
        ).stdout
        for seed, threads in (("0", "1"), ("12345", "2"))
    }
    assert len(said) == 1


def test_a_fingerprint_is_the_same_in_every_thread():
    found: list[str] = []

    def plan() -> None:
        found.append(Problem("shared_question", seq_len=700).plan(None, rank=2, world_size=3).fingerprint)

    threads = [threading.Thread(target=plan) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert len(set(found)) == 1


def ids_with(change: int) -> Tensor:
    ids = torch.arange(300) // 40
    ids[299] += change
    return ids


DIFFERENT = {
    "plain": lambda: cpflex.make_plan(cpflex.document(ids_with(0)), 300, rank=0, world_size=2, layout=cpflex.zigzag),
    "content": lambda: cpflex.make_plan(cpflex.document(ids_with(9)), 300, rank=0, world_size=2, layout=cpflex.zigzag),
    "length": lambda: cpflex.make_plan(CAUSAL, 299, rank=0, world_size=2, layout=cpflex.zigzag),
    "mask": lambda: cpflex.make_plan(CAUSAL, 300, rank=0, world_size=2, layout=cpflex.zigzag),
    "window": lambda: cpflex.make_plan(cpflex.sliding_window(3), 300, rank=0, world_size=2, layout=cpflex.zigzag),
    "other window": lambda: cpflex.make_plan(cpflex.sliding_window(4), 300, rank=0, world_size=2, layout=cpflex.zigzag),
    "layout": lambda: cpflex.make_plan(CAUSAL, 300, rank=0, world_size=2, layout=cpflex.contiguous),
    "world": lambda: cpflex.make_plan(CAUSAL, 300, rank=0, world_size=3, layout=cpflex.zigzag),
    "schedule": lambda: cpflex.make_plan(
        CAUSAL, 300, rank=0, world_size=2, layout=cpflex.zigzag, schedule=cpflex.direct
    ),
    "kind": lambda: cpflex.make_plan({"mine": CAUSAL}, 300, rank=0, world_size=2, layout=cpflex.zigzag),
}


def test_whatever_ranks_must_agree_on_changes_the_fingerprint():
    assert len({make().fingerprint for make in DIFFERENT.values()}) == len(DIFFERENT)


def test_the_numbers_of_documents_do_not_change_the_fingerprint():
    one, other = (cpflex.make_plan(cpflex.document(ids), 300) for ids in (ids_with(0), 7 - ids_with(0)))
    assert one.fingerprint == other.fingerprint


# -- several kinds


def kinds() -> dict[str, Any]:
    return {"full": CAUSAL, "sliding": CAUSAL & cpflex.sliding_window(40)}


def test_a_plan_of_several_kinds_is_indexed_before_it_is_used():
    plan = cpflex.make_plan(kinds(), 320)
    q = torch.randn(1, 1, plan.local_len, 16)
    with pytest.raises(
        ValueError, match=r"mask kinds \['full', 'sliding'\]; index it first, for instance plan\['full'\]"
    ):
        cpflex.flex_attention(q, q, q, block_mask=plan)
    with pytest.raises(TypeError, match="index it first"):
        _ = plan.steps
    with pytest.raises(KeyError, match=r"no mask kind 'slidin'.*\['full', 'sliding'\]"):
        plan["slidin"]
    assert set(plan.stats) == {"full", "sliding"}
    for name, mask in kinds().items():
        alone = cpflex.make_plan({name: mask}, 320, layout=lambda *_: plan.layout)
        assert plan[name].fingerprint == alone.fingerprint
        expected = cpflex.flex_attention(q, q, q, block_mask=alone)
        torch.testing.assert_close(cpflex.flex_attention(q, q, q, block_mask=plan[name]), expected, rtol=0, atol=0)


def test_a_plan_of_one_kind_is_used_as_it_is():
    for mask in (CAUSAL, {"only": CAUSAL}):
        plan = cpflex.make_plan(mask, 64)
        q = torch.randn(1, 1, 64, 16)
        cpflex.flex_attention(q, q, q, block_mask=plan)
        assert plan[next(iter(plan.kinds))] is plan


def test_all_kinds_of_a_plan_share_one_layout():
    plan = cpflex.make_plan(kinds(), 3000, rank=1, world_size=4)
    assert plan["full"].layout is plan["sliding"].layout is plan.layout


def test_each_kind_keeps_its_own_captured_values():
    """Also tensors that live only while the mask is traced, whose memory the next mask's may take."""

    def masked(size: int):
        def mask(b, h, q, k):
            seen = q >= k
            for place in range(50):
                seen = seen & (q - k < torch.tensor(1000 * size + place))
            return seen

        return mask

    plan = cpflex.make_plan({f"kind{size}": masked(size) for size in range(1, 9)}, 64)
    for size in range(1, 9):
        held = [int(x) for x in plan.kinds[f"kind{size}"].mask.captured]
        assert held == [*(1000 * size + place for place in range(50)), 64]


def test_a_weight_is_how_much_a_kind_counts():
    def imbalances(full: float, late: float) -> tuple[float, float]:
        masks = {"full": CAUSAL, "late": lambda b, h, q, k: (q >= 3500) & (k >= 3500)}
        stats = cpflex.make_plan(masks, 4096, rank=0, world_size=4, weights={"full": full, "late": late}).stats
        return stats["full"]["imbalance"], stats["late"]["imbalance"]

    assert imbalances(100, 1)[0] <= imbalances(1, 100)[0] + 1e-9
    assert imbalances(1, 100)[1] <= imbalances(100, 1)[1] + 1e-9


# -- stats


def test_stats_of_a_causal_zigzag_plan_are_known():
    stats = cpflex.make_plan(CAUSAL, 2048, rank=0, world_size=2, layout=cpflex.zigzag, schedule=cpflex.ring).stats
    assert stats["imbalance"] == 1.0
    assert stats["work"] == [sum(range(1, 17)) * 128 * 128 // 2] * 2
    assert stats["recv_tokens"] == [1024, 1024]
    assert stats["sent_tokens"] == stats["all_gather_tokens"] == 1024
    assert stats["needed_tokens"] == [1024, 512]
    assert (stats["full_tiles"], stats["partial_tiles"], stats["unproven_tiles"]) == (60, 8, 0)
    assert stats["schedule"] == "ring"


@pytest.mark.parametrize("mask", MASKS)
def test_stats_add_up(mask: str):
    problem = Problem(mask, seq_len=1000, heads="gqa")
    plans = [problem.plan(None, rank=rank, world_size=4) for rank in range(4)]
    stats = [plan.stats for plan in plans]
    assert sum(s["recv_tokens"][rank] for rank, s in enumerate(stats)) == sum(s["sent_tokens"] for s in stats)
    assert all(s["recv_tokens"] == stats[0]["recv_tokens"] for s in stats)  # blocks are tiles in short sequences
    for rank, s in enumerate(stats):
        assert s["all_gather_tokens"] == 3 * plans[0].local_len
        assert 0 <= s["recv_tokens"][rank] <= s["all_gather_tokens"]
        assert s["needed_tokens"][rank] <= s["all_gather_tokens"]
        assert s["imbalance"] >= 1.0
        assert s["unproven_tiles"] <= s["partial_tiles"]


def test_a_plan_says_what_it_is():
    plan = cpflex.make_plan(kinds(), 300, rank=1, world_size=4, layout=cpflex.zigzag)
    assert repr(plan) == f"Plan(full, sliding; seq_len=300, zigzag on rank 1 of 4, local_len={plan.local_len})"


# -- sizes


@pytest.mark.parametrize("world_size", [1, 2, 8])
@pytest.mark.parametrize("seq_len", [1, 2, 5])
def test_sequences_shorter_than_the_group_are_legal(seq_len: int, world_size: int):
    problem = Problem("causal", "alibi", seq_len, world_size=world_size)
    found = assemble(run_ranks(lambda group: attend_on_rank(group, problem), world_size))
    torch.testing.assert_close(found.out[:, :, 0], problem.tensors["v"][:, :, 0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_of_pads_alone_is_legal(layout: str):
    plans = [cpflex.make_plan(CAUSAL, 3, rank=rank, world_size=4, layout=LAYOUTS[layout]) for rank in range(4)]
    assert any((plan.positions >= 3).all() for plan in plans)
    for plan in plans:
        assert all(step.tile_mask.num_tiles == 0 for step in plan.steps) or (plan.positions < 3).any()


# -- refusals

TABLE = torch.zeros(100, dtype=torch.int64)
META = torch.zeros(64, device="meta")


def raises(b, h, q, k):
    raise KeyError("my own mistake")


REFUSED = {
    "no sequence": (lambda: cpflex.make_plan(CAUSAL, 0), ValueError, "seq_len must be an integer from 1 to"),
    "a negative sequence": (lambda: cpflex.make_plan(CAUSAL, -4), ValueError, "seq_len must be an integer"),
    "half a token": (lambda: cpflex.make_plan(CAUSAL, 4.5), ValueError, "seq_len must be an integer"),
    "a bool of tokens": (lambda: cpflex.make_plan(CAUSAL, True), ValueError, "seq_len must be an integer"),
    "too long": (lambda: cpflex.make_plan(CAUSAL, 2**31), ValueError, r"2\*\*31 - 1; got 2147483648"),
    "no mask": (lambda: cpflex.make_plan({}, 64), ValueError, "at least one mask kind, by strings; got an empty dict"),
    "a mask that is no function": (
        lambda: cpflex.make_plan(torch.ones(4, 4), 64),
        TypeError,
        "mask must be a mask_mod",
    ),
    "half a rank": (lambda: cpflex.make_plan(CAUSAL, 64, rank=0), ValueError, "rank and world_size go together"),
    "a world without a rank": (lambda: cpflex.make_plan(CAUSAL, 64, world_size=2), ValueError, "go together"),
    "a rank beyond the world": (
        lambda: cpflex.make_plan(CAUSAL, 64, rank=2, world_size=2),
        ValueError,
        "rank must be from 0 to world_size - 1; got rank=2",
    ),
    "a group of text": (lambda: cpflex.make_plan(CAUSAL, 64, "cp"), TypeError, "group must be a ProcessGroup"),
    "a weight missing": (
        lambda: cpflex.make_plan(kinds(), 64, weights={"full": 1}),
        ValueError,
        "weights must give each mask kind",
    ),
    "a weight of nothing": (
        lambda: cpflex.make_plan(kinds(), 64, weights={"full": 1, "sliding": 0}),
        ValueError,
        "a positive number",
    ),
    "a mask of the batch": (
        lambda: cpflex.make_plan(cpflex.document(torch.zeros(2, 64).long()), 64),
        ValueError,
        r"depends on b; pass batch_size= to make_plan",
    ),
    "a mask of the heads": (
        lambda: cpflex.make_plan(lambda b, h, q, k: q - k < h, 64, batch_size=2),
        ValueError,
        "depends on h; pass num_heads= to make_plan",
    ),
    "a batch larger than its table": (
        lambda: cpflex.make_plan(cpflex.document(torch.zeros(2, 64).long()), 64, batch_size=3),
        ValueError,
        "captured tensor of 2 elements with b; batch_size=3",
    ),
    "a table shorter than the sequence, by query": (
        lambda: cpflex.make_plan(lambda b, h, q, k: TABLE[q] == 0, 101),
        ValueError,
        "captured tensor of 100 elements with q_idx; seq_len=101",
    ),
    "a table shorter than the sequence, by key": (
        lambda: cpflex.make_plan(lambda b, h, q, k: TABLE[k] == 0, 101),
        ValueError,
        "with kv_idx; seq_len=101",
    ),
    "documents of another length": (
        lambda: cpflex.make_plan(cpflex.document(TABLE), 99),
        ValueError,
        r"made for \[100\] tokens; seq_len=99",
    ),
    "a layout by name": (
        lambda: cpflex.make_plan(CAUSAL, 64, layout="zigzag"),
        TypeError,
        r"function such as cpflex\.zigzag",
    ),
    "a schedule by name": (lambda: cpflex.make_plan(CAUSAL, 64, schedule="ring"), TypeError, r"such as cpflex\.ring"),
    "a layout of nothing": (
        lambda: cpflex.make_plan(CAUSAL, 64, layout=lambda *_: None),
        ValueError,
        "layout must return a Layout of seq_len=64 for 1 ranks; got None",
    ),
    "a kind that is a number": (
        lambda: cpflex.make_plan({1: CAUSAL}, 64),
        ValueError,
        "at least one mask kind, by strings",
    ),
    "a weight that is no number": (
        lambda: cpflex.make_plan(kinds(), 64, weights={"full": 1, "sliding": "many"}),
        ValueError,
        "a positive number",
    ),
    "a weight of nan": (
        lambda: cpflex.make_plan(kinds(), 64, weights={"full": 1, "sliding": float("nan")}),
        ValueError,
        "a positive number",
    ),
    "an empty batch": (
        lambda: cpflex.make_plan(CAUSAL, 64, batch_size=0),
        ValueError,
        "batch_size must be an integer of at",
    ),
    "heads below zero": (
        lambda: cpflex.make_plan(CAUSAL, 64, num_heads=-1),
        ValueError,
        "num_heads must be an integer of at",
    ),
    "a batch in words": (lambda: cpflex.make_plan(CAUSAL, 64, batch_size="2"), ValueError, "got '2'"),
    "a rank in words": (lambda: cpflex.make_plan(CAUSAL, 64, rank="0", world_size=2), ValueError, "got rank='0'"),
    "a rank that is a bool": (
        lambda: cpflex.make_plan(CAUSAL, 64, rank=True, world_size=2),
        ValueError,
        "got rank=True",
    ),
    "a world of nobody": (
        lambda: cpflex.make_plan(CAUSAL, 64, rank=0, world_size=0),
        ValueError,
        "got rank=0, world_size=0",
    ),
    "a mask that raises": (lambda: cpflex.make_plan(raises, 64), KeyError, "my own mistake"),
    "a mask of too few arguments": (
        lambda: cpflex.make_plan(lambda q, k: q >= k, 64),
        TypeError,
        "positional arguments",
    ),
    "a mask of integers": (
        lambda: cpflex.make_plan(lambda b, h, q, k: q - k, 64),
        cpflex.UnsupportedMod,
        r"must return bool; got torch\.int64 - compare it",
    ),
    "a mask with Python if": (
        lambda: cpflex.make_plan(lambda b, h, q, k: q > 3 if q > k else k > 3, 64),
        cpflex.UnsupportedMod,
        r"torch\.where",
    ),
    "a mask of a table without data": (
        lambda: cpflex.make_plan(lambda b, h, q, k: META[q] > 0, 64),
        cpflex.UnsupportedMod,
        "without data",
    ),
    "a mask of numpy": (
        lambda: cpflex.make_plan(lambda b, h, q, k: np.zeros(64)[q] > 0, 64),
        cpflex.UnsupportedMod,
        r"uses numpy; torch\.from_numpy",
    ),
    "a mask of a list": (
        lambda: cpflex.make_plan(lambda b, h, q, k: k > [1, 2][q], 64),
        cpflex.UnsupportedMod,
        "Python number",
    ),
    "a window beyond all numbers": (lambda: cpflex.sliding_window(2**63), ValueError, r"below 2\*\*62"),
    "a dim that is not there": (
        lambda: cpflex.make_plan(CAUSAL, 64).shard(torch.zeros(3, 64), 7),
        ValueError,
        "dim 7 must be",
    ),
    "a list of tokens": (
        lambda: cpflex.make_plan(CAUSAL, 64).shard([1, 2], 0),
        TypeError,
        "must be a Tensor; got list",
    ),
    "tokens of another length": (
        lambda: cpflex.make_plan(CAUSAL, 64).shard(torch.zeros(63), 0),
        ValueError,
        "seq_len=64 tokens",
    ),
    "no value for pads": (
        lambda: cpflex.make_plan(CAUSAL, 61).shard(torch.zeros(61), 0),
        ValueError,
        r"pass pad_value=\.\.\.",
    ),
    "results of another length": (
        lambda: cpflex.make_plan(CAUSAL, 64).unshard(torch.zeros(63), 0),
        ValueError,
        "local_len=64",
    ),
    "a kind that is not there": (lambda: cpflex.make_plan(kinds(), 64)["none"], KeyError, "it has .'full', 'sliding'."),
    "a mask that is not pointwise": (
        lambda: cpflex.make_plan(lambda b, h, q, k: TABLE.sum() > q, 64),
        cpflex.UnsupportedMod,
        "reduction",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_planned_is_refused_by_name(name: str):
    make, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        make()


def test_a_group_and_a_rank_together_are_refused():
    def plan(group: ThreadLinks) -> None:
        with pytest.raises(ValueError, match="either a group, or rank and world_size"):
            cpflex.make_plan(CAUSAL, 64, group, rank=0, world_size=2)

    run_ranks(plan, 2)


def test_captured_tensors_of_a_mask_are_copied():
    ids = torch.arange(128) // 50
    plan = cpflex.make_plan(lambda b, h, q, k: ids[q] == ids[k], 128)
    q = torch.randn(1, 1, 128, 16)
    before = cpflex.flex_attention(q, q, q, block_mask=plan)
    ids.fill_(0)
    torch.testing.assert_close(cpflex.flex_attention(q, q, q, block_mask=plan), before, rtol=0, atol=0)


def test_a_plan_is_copied_to_a_device_once():
    plan = cpflex.make_plan(CAUSAL, 64)
    assert plan.to("cpu") is plan


def test_a_plan_that_is_gone_is_named():
    handle = cpflex.make_plan(CAUSAL, 64).handle.clone()  # as a graph that outlived the plan would hold it
    with pytest.raises(RuntimeError, match="the plan of this attention call no longer exists; keep the plan until"):
        handles.resolve(handle)


def test_a_plan_for_a_device_that_is_not_there_is_refused():
    with pytest.raises((RuntimeError, AssertionError)):
        cpflex.make_plan(CAUSAL, 64).to("cuda:99")
