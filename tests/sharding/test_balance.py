"""balanced: one layout has to suit every mask kind."""

from __future__ import annotations

import functools

import numpy as np
import pytest

import cpflex
from cpflex.sharding.layout import ChunkNeeds, aligned_chunk_len
from cpflex.sharding.search import SLACK_PERMILLE, Problem, contiguous_deal, longest_first, refine


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


def causal_needs(seq_len: int, num_chunks: int) -> ChunkNeeds:
    """Of a dense causal mask, in pairs: chunk c computes half of its own square and all of c others."""
    ids, chunk_len = np.arange(num_chunks), aligned_chunk_len(seq_len, num_chunks)
    work = (2 * ids + 1) * (chunk_len**2 // 2)
    return ChunkNeeds(work, ids <= ids[:, None], ids, np.full(num_chunks, chunk_len))


@pytest.mark.parametrize("seq_len", [1 << 20, 1 << 24, 2**31 - 1])
@pytest.mark.parametrize("deal", ["longest first", "refined"])
def test_a_long_sequence_is_dealt_as_a_short_one_of_the_same_shape(seq_len: int, deal: str):
    def dealt(seq_len: int) -> np.ndarray:
        problem = Problem.of({"mask": causal_needs(seq_len, 64)}, {"mask": 1.0}, 8, 0.0)
        start = longest_first(problem)
        return start if deal == "longest first" else refine(problem, start[:, ::-1].reshape(-1, 8).T.copy())

    short = dealt(1 << 12)
    np.testing.assert_array_equal(dealt(seq_len), short)
    load = causal_needs(seq_len, 64).work[dealt(seq_len)].sum(axis=1)
    assert load.max() <= load.mean() * (1 + SLACK_PERMILLE / 1000)


def test_work_in_few_chunks_is_cut_finer():
    """6 of 64 chunks hold nearly all of it, as do 12 of 128; 24 of 256 are enough for 8 ranks."""
    heavy = cpflex.causal() & (lambda b, h, q, k: (q >= 59_392) | (q - k < 64))
    plan = cpflex.make_plan(heavy, 1 << 16, rank=0, world_size=8)
    assert len(plan.layout.chunks[0]) == 32
    assert plan.stats["imbalance"] <= 1 + SLACK_PERMILLE / 1000


def test_swaps_that_relieve_overload_do_not_use_up_the_looks_for_traffic():
    """Chunks from light to heavy, dealt in their order: the last of 128 ranks computes twice the mean."""
    ids = np.arange(1024)
    needs = ChunkNeeds(1000 * ids, np.eye(1024, dtype=bool), ids, np.full(1024, 16))
    problem = Problem.of({"mask": needs}, {"mask": 1.0}, 128, 0.0)
    start = contiguous_deal(problem)
    before, after = (needs.work[deal].sum(axis=1).max() for deal in (start, refine(problem, start, most_looks=1)))
    assert before > 1.9 * needs.work.sum() / 128
    assert after <= problem.limit[0]
