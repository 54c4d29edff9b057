"""Real processes that disagree, that are in the wrong group, or that do not come: all are told soon, and by name."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import cpflex
from cpflex.ring import forward
from patience import patience
from processes import RankProcesses


def attend(plan: cpflex.Plan, dim: int = 16) -> torch.Tensor:
    q = torch.randn(1, 2, plan.local_len, dim)
    out = cpflex.flex_attention(q, q, q, block_mask=plan)
    assert isinstance(out, torch.Tensor)
    return out


def use_a_plan_of_another_group(group: dist.ProcessGroup, first_agree: bool) -> None:
    """Rank 0 takes the plan on the other dim of the mesh."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    plans = {dim: cpflex.make_plan(cpflex.causal(), 300, mesh[dim]) for dim in ("dp", "cp")}
    if first_agree:
        for plan in plans.values():
            attend(plan)
    attend(plans["dp" if group.rank() == 0 else "cp"])


@pytest.mark.parametrize("first_agree", [False, True], ids=["in the first call", "later"])
def test_a_plan_of_another_group_is_found_within_ten_seconds(first_agree: bool, four_processes: RankProcesses):
    """Ranks 2 and 3 have what they need; ranks 0 and 1 wait for each other in vain."""
    outcomes = four_processes.outcomes(use_a_plan_of_another_group, first_agree, timeout=30)
    for outcome in outcomes[:2]:
        assert isinstance(outcome.error, cpflex.RankMismatch), outcome.traceback
        assert "(rank 0 of the job) waits in another group, of ranks [0, 2], while ranks [0, 1] wait" in str(
            outcome.error
        ) or (
            "(rank 1 of the job) waits in another group, of ranks [0, 1], while ranks [0, 2] wait" in str(outcome.error)
        )
        assert outcome.seconds < patience(10)
    assert [outcome.error for outcome in outcomes[2:]] == [None, None]


def come_late(group: dist.ProcessGroup) -> bool:
    plan = cpflex.make_plan(cpflex.causal(), 300, group)
    if group.rank() == 1:
        time.sleep(4.5)
    return bool(attend(plan).isfinite().all())


def test_a_rank_that_is_late_is_waited_for(two_processes: RankProcesses):
    assert two_processes.run(come_late) == [True, True]


def stay_away(group: dist.ProcessGroup) -> None:
    ranks = dist.new_group([0, 1, 2, 3], timeout=timedelta(seconds=6))
    plan = cpflex.make_plan(cpflex.causal(), 300, ranks)
    if group.rank() != 2:
        attend(plan)
    else:
        time.sleep(8)


def test_a_rank_that_does_not_come_is_named_at_the_timeout(four_processes: RankProcesses):
    outcomes = four_processes.outcomes(stay_away, timeout=30)
    waiting = [outcome for rank, outcome in enumerate(outcomes) if rank != 2]
    for outcome in waiting:
        assert isinstance(outcome.error, ConnectionError), outcome.traceback
        assert "before forward, mask kind 'mask'" in str(outcome.error)
        assert outcome.seconds < patience(12)
    assert all("group ranks [2] are gone or elsewhere" in str(outcome.error) for outcome in waiting)


def disagree_later(group: dist.ProcessGroup) -> None:
    masks = {"full": cpflex.full(), "sliding": cpflex.sliding_window(9)}
    plan = cpflex.make_plan(masks, 300, group, schedule=cpflex.ring)
    for kinds in (("full", "sliding"), ("sliding", "full") if group.rank() == 3 else ("full", "sliding")):
        for kind in kinds:
            attend(plan[kind])


def test_layers_in_another_order_are_found_at_once(four_processes: RankProcesses):
    for outcome in four_processes.outcomes(disagree_later, timeout=30):
        assert isinstance(outcome.error, cpflex.RankMismatch), outcome.traceback
        assert str(outcome.error).startswith(
            "the ranks disagree about mask kind: group ranks 0, 1, 2: full; group rank 3: sliding"
        )
        assert outcome.seconds < patience(10)


def attend_in_dims(group: dist.ProcessGroup, dims: list[list[int]], has_idle_ranks: bool) -> list[str]:
    """Calls of kinds that all ranks know, of which each rank has its own: what each raised; "" for none."""
    mask, schedule = cpflex.causal(), cpflex.ring
    if has_idle_ranks:
        mask, schedule = mask & cpflex.document(cu_seqlens=[0, 256, 768, 1024]), cpflex.direct
    plan = cpflex.make_plan(mask, 1024, group, layout=cpflex.contiguous, schedule=schedule)
    messages = [t for step in plan.steps for t in (*step.exchange.sends, *step.exchange.receives)]
    assert bool(messages) != (has_idle_ranks and group.rank() in (0, 3))
    said = []
    for dim in (16, 8, *dims[group.rank()]):
        try:
            assert attend(plan, dim).isfinite().all()
            said.append("")
        except cpflex.RankMismatch as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize("has_idle_ranks", [False, True])
def test_known_calls_with_messages_of_other_sizes_are_found_out_and_the_group_goes_on(
    has_idle_ranks: bool, four_processes: RankProcesses
):
    """gloo ends a process that gets a message longer than it asked for."""
    dims = [[16, 16, 16, 8], [16, 16, 8, 8], [8, 16, 8, 8], [16, 16, 8, 8]]
    found = four_processes.run(attend_in_dims, dims, has_idle_ranks, timeout=40)
    told = "the ranks disagree about query: group rank"
    for said in found:
        assert [text[: len(told)] for text in said] == ["", "", told, "", told, ""], said
        assert said == found[0]


def compute_while_another_is_late(group: dist.ProcessGroup, waits: bool) -> list[bool]:
    """Of a first call and of a second of the same kind: the own keys were attended to before rank 1 had come."""
    mask = cpflex.causal() & cpflex.sliding_window(200 + waits)  # of which this group has had no call
    plan = cpflex.make_plan(mask, 300, group, schedule=cpflex.ring)
    plan.wait_for_agreement(waits)
    done: list[float] = []

    def attend_and_note(*arguments) -> None:
        compute(*arguments)
        done.append(time.monotonic())

    compute, forward.attend = forward.attend, attend_and_note
    early = []
    try:
        for _ in range(2):
            dist.barrier(group=group)
            began = time.monotonic()
            if group.rank() == 1:
                time.sleep(1.0)
            attend(plan)
            early.append(done[0] - began < 1.0)
            done.clear()
    finally:
        forward.attend = compute
        plan.wait_for_agreement(False)
    return early


@pytest.mark.parametrize("waits", [False, True], ids=["by default", "if told to wait"])
def test_a_host_waits_for_a_late_rank_only_in_the_first_call_of_a_kind(waits: bool, two_processes: RankProcesses):
    prompt, _ = two_processes.run(compute_while_another_is_late, waits)
    assert prompt == [False, not waits]
