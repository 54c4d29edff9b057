"""Groups of NCCL, by links that behave like them: refusals, disagreement and ranks without messages."""

from __future__ import annotations

import gc
import logging
import time
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist

import cpflex
from cpflex.links import ledger as ledgers
from cpflex.links.ledger import Ledger
from cpflex.ring.handles import resolve
from nccl_like import CPU, nccl_like
from patience import patience
from processes import Outcome, RankProcesses

SEQ_LEN = 256


def plan_on(links: Any, cut: int = 100) -> cpflex.Plan:
    return cpflex.make_plan(cpflex.causal() & cpflex.document(cu_seqlens=[0, cut, SEQ_LEN]), SEQ_LEN, links)


def attend(plan: cpflex.Plan, dim: int = 16) -> torch.Tensor:
    q, k, v = (torch.randn(1, 1, plan.local_len, dim, requires_grad=True) for _ in "qkv")
    out = cpflex.flex_attention(q, k, v, block_mask=plan)
    assert isinstance(out, torch.Tensor)
    return out


def refuse_a_call(plan: cpflex.Plan) -> None:
    q = torch.randn(1, 1, plan.local_len, 16)
    cpflex.flex_attention(q, q[..., :8], q, block_mask=plan)


def errors_of(outcomes: list[Outcome], within: float = 10.0) -> list[str]:
    for outcome in outcomes:
        assert not isinstance(outcome.error, TimeoutError), "a rank waited"
        assert outcome.seconds < patience(within), outcome.traceback
    return [f"{type(outcome.error).__name__}: {outcome.error}" for outcome in outcomes]


TOLD = "RankMismatch: nothing was exchanged: group rank 1 raised ValueError: query and key must have one head dim"


KINDS_OF_GROUPS = pytest.mark.parametrize("alone", [False, True], ids=["beside gloo", "alone"])


def refuse_after(group: dist.ProcessGroup, num_calls: int, alone: bool) -> None:
    plan = plan_on(nccl_like([0, 1], alone))
    for _ in range(num_calls):
        attend(plan)
    if group.rank() == 1:
        refuse_a_call(plan)
    attend(plan)


@KINDS_OF_GROUPS
@pytest.mark.parametrize("num_calls", [0, 1, 3], ids=["in the first call", "in the second", "later"])
def test_the_reason_of_a_refusal_reaches_the_others_in_groups_of_nccl(
    num_calls: int, alone: bool, two_processes: RankProcesses
):
    other, own = errors_of(two_processes.outcomes(refuse_after, num_calls, alone, timeout=60))
    assert own.startswith("ValueError: query and key must have one head dim")
    assert other.startswith(TOLD)


def hold_another_batch(group: dist.ProcessGroup, alone: bool) -> None:
    plan = plan_on(nccl_like([0, 1], alone=alone))
    for step in range(4):
        attend(plan)
        plan.require_same(ids=torch.arange(SEQ_LEN) + step * group.rank() // 3)


@KINDS_OF_GROUPS
def test_ranks_that_hold_other_tokens_are_found_out_in_groups_of_nccl(alone: bool, two_processes: RankProcesses):
    for error in errors_of(two_processes.outcomes(hold_another_batch, alone, timeout=60)):
        assert error.startswith("RankMismatch: the ranks disagree about ids: group rank 0: (256,) int64 "), error


def do_nothing_more(group: dist.ProcessGroup) -> list[str]:
    """Rank 0 does not come back to cpflex after it agreed to what rank 1 refuses."""
    said: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logging.getLogger("cpflex").addHandler(kept := Kept())
    plan = plan_on(nccl_like([0, 1], alone=True))
    bound, facts = resolve(plan.handle), {"direction": "forward"}
    bound.agree(facts, CPU)
    if group.rank() == 1:
        plan.refuse(ValueError("too hot"))
    else:
        bound.agree(facts, CPU)
        deadline = time.monotonic() + patience(10)
        while not any("the device was stopped" in line for line in said) and time.monotonic() < deadline:
            time.sleep(0.01)
    logging.getLogger("cpflex").removeHandler(kept)
    return said


def test_a_device_that_stops_is_explained_in_the_log_as_its_error_may_come_anywhere(two_processes: RankProcesses):
    said, _ = two_processes.run(do_nothing_more)
    assert (
        "group rank 0: the device was stopped: nothing was exchanged: group rank 1 raised ValueError: too hot" in said
    )


def disagree(group: dist.ProcessGroup, how: str, alone: bool) -> None:
    links = nccl_like([0, 1], alone)
    masks = {"full": cpflex.full(), "sliding": cpflex.sliding_window(9)}
    plan = cpflex.make_plan(masks, SEQ_LEN, links, schedule=cpflex.ring)
    if how != "in the first call":
        for kind in masks:
            attend(plan[kind])
    strange = group.rank() == 1
    plan.wait_for_agreement(how == "later, one waits" and strange)
    if how == "a new kind of call":
        attend(plan["full"], dim=8 if strange else 16)
    else:
        attend(plan["sliding" if strange else "full"])
    attend(plan["full"])


@KINDS_OF_GROUPS
@pytest.mark.parametrize("how", ["in the first call", "later", "later, one waits", "a new kind of call"])
def test_ranks_that_disagree_are_told_in_words_in_groups_of_nccl(how: str, alone: bool, two_processes: RankProcesses):
    first, second = errors_of(two_processes.outcomes(disagree, how, alone, timeout=60))
    assert first == second
    if how == "a new kind of call":
        assert first.startswith("RankMismatch: the ranks disagree about query: group rank 0: ('torch.float32', (1, 1,")
    else:
        assert first == "RankMismatch: the ranks disagree about mask kind: group rank 0: full; group rank 1: sliding"


def count_waits(group: dist.ProcessGroup, alone: bool) -> list[int]:
    links = nccl_like([0, 1], alone)
    waits = []
    for cut in (100, 100, 100, 70, 70):
        plan = plan_on(links, cut)
        for _ in range(3):
            attend(plan).sum().backward()
        waits.append(links.comparisons.num_host_waits)
    links.ledger.synchronize()
    assert links.ledger.num_entered == 26, "the device compares the rest"
    return waits


@KINDS_OF_GROUPS
def test_the_host_waits_only_for_a_kind_of_call_that_is_new_in_groups_of_nccl(
    alone: bool, two_processes: RankProcesses
):
    """One forward and one backward; another plan of the same documents is nothing new."""
    assert two_processes.run(count_waits, alone) == [[2, 2, 2, 4, 4]] * 2


def compare_by_turns(group: dist.ProcessGroup) -> tuple[int, int]:
    """On hosts, on devices whatever comes once they are connected, on hosts in a group that has no devices."""
    links = nccl_like([0, 1], alone=False)
    facts = {"direction": "forward"}
    plan = plan_on(links)
    plan.require_same(ids=torch.arange(3))
    on_hosts = links.comparisons.num_on_devices
    plan.agree(facts, CPU)
    plan.require_same(ids=torch.arange(4))
    plan.agree(facts, CPU)
    return on_hosts, links.comparisons.num_on_devices


def test_hosts_meet_until_devices_are_connected_in_a_group_of_gloo_and_nccl(two_processes: RankProcesses):
    """One operation connects them; the two comparisons that follow are theirs."""
    assert two_processes.run(compare_by_turns) == [(0, 3)] * 2


def rank_without_messages(group: dist.ProcessGroup, alone: bool) -> list[bool]:
    links = nccl_like([0, 1, 2, 3], alone)
    mask = cpflex.document(cu_seqlens=[0, 64, 192, 256]) & cpflex.causal()
    plan = cpflex.make_plan(mask, SEQ_LEN, links, layout=cpflex.contiguous)
    attend(plan).sum().backward()
    return [bool(s.exchange.sends or s.exchange.receives) for s in plan.steps[1:]]


@pytest.mark.parametrize("alone", [False, True], ids=["gloo and nccl", "nccl alone"])
def test_a_rank_without_messages_takes_part_in_making_the_communicator(alone: bool, four_processes: RankProcesses):
    exchanges = four_processes.run(rank_without_messages, alone)
    assert [any(found) for found in exchanges] == [False, True, True, False], "ranks 0 and 3 have no messages"


def use_a_plan_of_another_group(group: dist.ProcessGroup) -> None:
    pairs = {(0, 1): nccl_like([0, 1], alone=True), (0, 2): nccl_like([0, 2], alone=True)}
    if group.rank() < 2:
        attend(plan_on(pairs[0, 2] if group.rank() == 0 else pairs[0, 1]))


def test_a_plan_of_another_group_is_found_before_nccl_waits_for_all_ranks(four_processes: RankProcesses):
    errors = errors_of(four_processes.outcomes(use_a_plan_of_another_group, timeout=60), within=15)
    assert all(" waits in another group, of ranks [0, " in error for error in errors[:2]), errors
    assert errors[2:] == ["NoneType: None"] * 2


def come_late(group: dist.ProcessGroup) -> None:
    links = nccl_like([0, 1], alone=True)
    if group.rank() == 1:
        time.sleep(4.0)
    attend(plan_on(links))


def test_a_rank_that_is_late_is_waited_for_in_a_group_of_nccl_alone(two_processes: RankProcesses):
    two_processes.run(come_late)


# -- the ledger


def extremes_of(*numbers: int) -> torch.Tensor:
    return torch.tensor([max(numbers), -min(numbers)])


def compare_equal(ledger: Ledger, number: int) -> None:
    ledger.compare(extremes_of(number, number), number, lambda: [number, 0], lambda numbers: None)


@pytest.mark.parametrize("other", [-7, 4, 6, 2**63 - 1, 1 - 2**63])
def test_numbers_that_differ_are_told_and_stop_the_device(other: int):
    told: list[list[int]] = []
    ledger = Ledger(CPU)
    compare_equal(ledger, 5)
    assert ledger.look() is None
    with pytest.raises(RuntimeError, match="the ranks disagree about this attention call"):
        ledger.compare(extremes_of(5, other), 5, lambda: [5, other], told.append)
    assert ledger.look() == [5, other] == ledger.apart
    assert told == [[5, other]]


def test_extremes_of_the_largest_and_the_least_number_do_not_cancel():
    ledger = Ledger(CPU)
    with pytest.raises(RuntimeError, match="the ranks disagree"):
        ledger.compare(extremes_of(2**63 - 1, 1 - 2**63), 2**63 - 1, lambda: [0, 0], lambda numbers: None)


def test_a_ledger_holds_more_calls_than_it_has_lines_one_after_the_other():
    ledger = Ledger(CPU)
    for number in range(1, 3 * ledgers.LINES):
        compare_equal(ledger, number)
    assert ledger.look() is None


def test_a_ledger_made_in_inference_mode_can_be_written_to_outside():
    with torch.inference_mode():
        ledger = Ledger(CPU)
        compare_equal(ledger, 5)
    compare_equal(ledger, 5)
    assert ledger.look() is None


def test_a_ledger_is_not_kept_alive_by_its_thread():
    gone = weakref.ref(Ledger(CPU))
    deadline = time.monotonic() + patience(5)
    while gone() is not None and time.monotonic() < deadline:
        gc.collect()
        time.sleep(ledgers.POLL)
    assert gone() is None
