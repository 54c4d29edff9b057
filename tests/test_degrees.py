"""Mask kinds of one plan whose heads are exchanged among different numbers of ranks, given or predicted."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import cpflex
from cases import LAYOUTS, Problem
from cpflex.planning.plan_bytes import WrongPlan
from cpflex.testing import run_ranks
from oracle import assert_within_budget
from runs import assemble, attend_on_rank

TOPOLOGY = cpflex.Topology.named("h100-ib")
LONG = cpflex.causal() & cpflex.document(cu_seqlens=[0, 90_000, 100_000, 1 << 17])
HYBRID = {"full": LONG, "sliding": LONG & cpflex.sliding_window(512)}


class OfKind:
    """A problem whose mask is two kinds of one plan, one of which is attended to."""

    def __init__(self, problem: Problem, kind: str, sizes: dict[str, int]) -> None:
        self.problem, self.kind, self.sizes = problem, kind, sizes

    def plan(self, group: Any, **options: Any) -> cpflex.Plan:
        kinds = dict.fromkeys(self.sizes, self.problem.mask_mod)
        plan = cpflex.make_plan(
            kinds, self.problem.seq_len, group, batch_size=self.problem.batch_size,
            num_heads=self.problem.num_heads, layout=LAYOUTS[self.problem.layout], ulysses_size=self.sizes,
        )  # fmt: skip
        assert {name: plan[name].ulysses_size for name in kinds} == self.sizes
        assert plan[self.kind].layout == plan.layout
        return cpflex.Plan.from_bytes(plan.to_bytes()).bind(group)[self.kind]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.problem, name)


@pytest.mark.parametrize(("mask", "score"), [("doc_causal", "relative_bias"), ("window_per_head", "none")])
def test_every_kind_computes_what_one_dense_attention_does(mask: str, score: str):
    problem = Problem(mask, score, 321, "gqa", layout="balanced", world_size=4)
    for kind in ("none", "some", "all"):
        one = OfKind(problem, kind, {"none": 1, "some": 2, "all": 2})
        results = run_ranks(partial(attend_on_rank, problem=one), 4)
        assert_within_budget(assemble(results), problem.dense(torch.float32), problem.dense())


def test_kinds_that_are_not_named_exchange_no_heads():
    plan = cpflex.make_plan(HYBRID, 1 << 17, rank=5, world_size=8, ulysses_size={"full": 4})
    assert (plan.ulysses_size, plan["full"].ulysses_size, plan["sliding"].ulysses_size) == (4, 4, 1)
    assert len(plan.stats["full"]["work"]) == 2
    assert len(plan.stats["sliding"]["work"]) == 8
    assert plan["full"].layout.key == plan["sliding"].layout.key == plan.layout.key
    plan.check()
    said = plan.explain()
    for words in ("keys travel between shards", "shard 1 (this one)", "rank 5 (this one)"):
        assert words in " ".join(said.split())


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"fall": 2}, r"ulysses_size must name mask kinds of \['full', 'sliding'\]"),
        ({"full": 4, "sliding": 3}, "ulysses_size must divide the ranks"),
        ({"full": 6, "sliding": 4}, "the largest ulysses_size must be a multiple of the others"),
        ({"full": 0}, "ulysses_size must be an integer of at least 1"),
    ],
)
def test_degrees_that_do_not_fit_are_refused_by_name(sizes: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        cpflex.make_plan(HYBRID, 1 << 17, rank=0, world_size=12 if 6 in sizes.values() else 8, ulysses_size=sizes)


def test_a_degree_changed_on_its_way_is_found():
    plan = cpflex.make_plan(HYBRID, 1 << 17, rank=0, world_size=8, ulysses_size={"full": 4})
    plan.kinds["sliding"].facts["ranks that exchange heads"] = 3
    with pytest.raises(WrongPlan, match="heads are exchanged among 4 ranks"):
        plan.check()


def plan_of(rank: int, **options: Any) -> cpflex.Plan:
    return cpflex.make_plan(HYBRID, 1 << 17, rank=rank, world_size=16, topology=TOPOLOGY, **options)


def test_long_documents_share_heads_and_windows_do_not_where_that_is_predicted():
    made = [plan_of(rank, heads=cpflex.Heads(), weights={"full": 1, "sliding": 5}) for rank in (0, 13)]
    for plan in made:
        assert (plan["full"].ulysses_size, plan["sliding"].ulysses_size) == (8, 1)
        plan.check()
    assert made[0].fingerprint == made[1].fingerprint


def test_without_heads_or_with_another_schedule_none_are_exchanged():
    for options in ({}, {"heads": cpflex.Heads(), "schedule": cpflex.ring}, {"heads": cpflex.Heads(7, 7)}):
        assert plan_of(0, **options).ulysses_size == 1
