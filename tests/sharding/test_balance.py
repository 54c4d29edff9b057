"""balanced: one layout has to suit every mask kind."""

from __future__ import annotations

import functools

import pytest

import cpflex
from cpflex.sharding.balance import SLACK_PERMILLE


def causal_within(lo: int, hi: int) -> cpflex.MaskMod:
    return cpflex.causal() & (lambda b, h, q, k: (q >= lo) & (q < hi) & (k >= lo))


@pytest.mark.parametrize("world_size", [4, 6, 8])
@pytest.mark.parametrize("cut", [4096, 2731])
def test_kinds_with_work_in_different_places_are_all_balanced(cut: int, world_size: int):
    """One kind works on the first part of the sequence, the other on the rest."""
    masks = {"first": causal_within(0, cut), "second": causal_within(cut, 8192)}
    stats = cpflex.make_plan(masks, 8192, rank=0, world_size=world_size).stats
    assert all(stats[kind]["imbalance"] <= 1 + SLACK_PERMILLE / 1000 for kind in masks)


CU = [0, 3000, 3500, 7000, 20000, 20001, 33000, 40000, 65536]
DOCUMENTS = cpflex.causal() & cpflex.document(cu_seqlens=CU)
MASKS = {
    "causal": {"full": cpflex.causal()},
    "documents": {"full": DOCUMENTS},
    "two_kinds": {"full": DOCUMENTS, "sliding": DOCUMENTS & cpflex.sliding_window(1024)},
}


def planned(mask: str, world_size: int, layout=cpflex.balanced) -> tuple[int, float, cpflex.Plan]:
    """Number of fragments, and the largest imbalance of a kind."""
    plan = cpflex.make_plan(MASKS[mask], CU[-1], rank=0, world_size=world_size, layout=layout)
    return sum(map(len, plan.fragments)), max(plan[kind].stats["imbalance"] for kind in plan.kinds), plan


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("world_size", [3, 4, 16])
def test_where_fragments_cost_there_are_fewer_and_the_work_stays_equal(mask: str, world_size: int):
    plain, plain_imbalance, _ = planned(mask, world_size)
    few, imbalance, _ = planned(mask, world_size, functools.partial(cpflex.balanced, fragment_cost=4096))
    least = 2 * world_size - 1  # zigzag's, the fewest of a layout that is even for a causal mask
    assert few < plain or plain <= least
    # as far as loads count as different: a hundredth of what the slack allows
    assert imbalance <= max(plain_imbalance, 1 + SLACK_PERMILLE / 1000) + 0.0105


@pytest.mark.parametrize("mask", MASKS)
def test_fragments_that_cost_nothing_change_no_plan(mask: str):
    free = functools.partial(cpflex.balanced, fragment_cost=0.0)
    assert planned(mask, 4)[2].fingerprint == planned(mask, 4, free)[2].fingerprint


@pytest.mark.parametrize("cost", [-1.0, float("nan"), float("inf")])
def test_a_cost_that_is_no_number_of_rows_is_refused(cost: float):
    with pytest.raises(ValueError, match="fragment_cost must be a number of K/V rows"):
        planned("causal", 2, functools.partial(cpflex.balanced, fragment_cost=cost))
