"""Mask kinds of one plan that exchange heads among different numbers of ranks, given or predicted, on one layout of
tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch

import cpflex
from cases import LAYOUTS, MASKS, Problem, options_of
from cpflex.planning import choose
from cpflex.planning.plan_bytes import WrongPlan
from cpflex.sharding.layout import Layout
from cpflex.testing import run_ranks
from oracle import assert_within_budget
from processes import RankProcesses
from runs import assemble, attend_on_rank

SIZES = {"whole": 4, "half": 2, "alone": 1}


@dataclass(frozen=True)
class OneOfThree(Problem):
    """A mask beside two others on one layout."""

    kind: str = "whole"

    def plan(self, group: Any, **options: Any) -> cpflex.Plan:
        masks = {kind: self.mask_mod if kind == self.kind else MASKS["causal"](self) for kind in SIZES}
        whole = cpflex.make_plan(
            masks,
            self.seq_len,
            group,
            batch_size=self.batch_size,
            num_heads=self.num_heads,
            layout=LAYOUTS[self.layout],
            ulysses_size=SIZES,
            **options_of(self.schedule) | options,
        )
        assert {kind: whole[kind].ulysses_size for kind in SIZES} == SIZES
        assert whole[self.kind].layout == whole.layout
        again = cpflex.Plan.from_bytes(whole.to_bytes()).bind(group)
        assert again.stats == whole.stats
        return again[self.kind]


ROWS = [
    {"mask": "doc_causal", "score": "relative_bias", "seq_len": 321, "heads": "gqa", "layout": "balanced"},
    {"mask": "window_per_head", "score": "alibi", "seq_len": 300, "heads": "mqa4", "layout": "zigzag"},
    {"mask": "window_per_head", "score": "none", "seq_len": 321, "heads": "mha4", "layout": "balanced"},
    {"mask": "doc_sliding_causal", "score": "none", "seq_len": 1000, "heads": "mha4", "schedule": "relay:2"},
]
CASES = [
    OneOfThree(**row, world_size=ranks, kind=kind) for row in ROWS for ranks in (4, 8) for kind in SIZES
]  # fmt: skip


@pytest.mark.by_day(6)
@pytest.mark.parametrize("problem", CASES, ids=lambda p: f"{p.kind}-{p}")
def test_every_kind_computes_what_one_dense_attention_does(problem: OneOfThree):
    results = run_ranks(partial(attend_on_rank, problem=problem), problem.world_size, timeout=60)
    assert_within_budget(assemble(results), problem.dense(torch.float32), problem.dense())


def test_processes_do_too(four_processes: RankProcesses):
    for problem in CASES[:3]:
        results = four_processes.run(attend_on_rank, problem)
        assert_within_budget(assemble(results), problem.dense(torch.float32), problem.dense())


TOPOLOGY = cpflex.Topology.named("h100-ib")
LONG = cpflex.causal() & cpflex.document(cu_seqlens=[0, 90_000, 100_000, 1 << 17])
HYBRID = {"full": LONG, "sliding": LONG & cpflex.sliding_window(512)}


def test_a_window_that_exchanges_no_heads_is_planned_over_single_ranks():
    plan = cpflex.make_plan(HYBRID, 1 << 17, rank=5, world_size=8, ulysses_size={"full": 4})
    assert (plan.ulysses_size, plan["full"].ulysses_size, plan["sliding"].ulysses_size) == (4, 4, 1)
    assert (plan["full"].outer.world_size, plan["full"].outer_rank) == (2, 1)
    assert (plan["sliding"].outer.world_size, plan["sliding"].outer_rank) == (8, 5)
    for kind in HYBRID:
        assert torch.equal(plan[kind].positions, plan.positions)
        assert plan[kind].layout.key == plan.layout.key
    assert [len(plan.stats[kind]["work"]) for kind in HYBRID] == [2, 8]
    plan.check()
    said = plan.explain()
    assert said.count("grid") == 1
    assert said.index("full: ") < said.index("grid") < said.index("sliding: ")
    for words in ("keys travel between shards", "shard 1 (this one)", "rank 5 (this one)"):
        assert words in " ".join(said.split())


@pytest.mark.parametrize(
    ("sizes", "world_size", "said"),
    [
        ({"fall": 2}, 8, "ulysses_size must name mask kinds of ['full', 'sliding']"),
        ({"full": 4, "sliding": 0}, 8, "ulysses_size must be an integer of at least 1; got 0"),
        ({"full": 0}, 8, "ulysses_size must be an integer of at least 1; got 0"),
        ({"full": 4, "sliding": 3}, 8, "ulysses_size must divide the ranks"),
        ({"full": 3, "sliding": 1}, 8, "must divide the ranks of the group; got 3 for 8 ranks"),
        ({"full": 16, "sliding": 1}, 8, "must divide the ranks of the group; got 16 for 8 ranks"),
        ({"full": 3, "sliding": 2}, 6, "the largest ulysses_size must be a multiple of the others"),
        ({"full": 6, "sliding": 4}, 12, "the largest ulysses_size must be a multiple of the others"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(sizes: dict[str, int], world_size: int, said: str):
    with pytest.raises(ValueError) as refused:
        cpflex.make_plan(HYBRID, 1 << 17, rank=0, world_size=world_size, ulysses_size=sizes)
    assert said in str(refused.value)


def test_a_size_changed_on_its_way_is_found():
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


def layouts_made(mask: cpflex.masks.MaskFn, **options: Any) -> list[int]:
    """Ranks of the layouts that were made for one plan."""
    made: list[int] = []

    def counted(seq_len: int, world_size: int, work: Any = None) -> Layout:
        made.append(world_size)
        return cpflex.balanced(seq_len, world_size, work)

    cpflex.make_plan(mask, 1 << 17, rank=0, layout=counted, topology=TOPOLOGY, heads=cpflex.Heads(), **options)
    return made


def test_no_second_layout_is_made_where_sharing_heads_costs_little():
    assert layouts_made(cpflex.causal(), world_size=16) == [2]
    assert layouts_made(HYBRID["sliding"], world_size=16) == [2, 16]


def test_no_schedule_is_predicted_twice(monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[int, bytes, str]] = []
    predict = choose.predict

    def counted(name: str, traffic: Any, *options: Any) -> Any:
        asked.append((traffic.world_size, traffic.pairs.tobytes(), name))
        return predict(name, traffic, *options)

    monkeypatch.setattr(choose, "predict", counted)
    for masks in (HYBRID, HYBRID["sliding"], LONG):
        asked.clear()
        cpflex.make_plan(masks, 1 << 17, rank=3, world_size=16, topology=TOPOLOGY, heads=cpflex.Heads())
        assert asked
        assert len(asked) == len(set(asked))
