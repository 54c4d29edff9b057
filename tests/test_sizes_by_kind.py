"""Mask kinds that exchange heads among different numbers of ranks, on one layout of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch

import cpflex
from cases import LAYOUTS, MASKS, Problem, options_of
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
        again = cpflex.Plan.from_bytes(whole.to_bytes()).bind(group)
        assert again.stats == whole.stats
        return again[self.kind]


ROWS = [
    {"mask": "doc_causal", "score": "relative_bias", "seq_len": 321, "heads": "gqa", "layout": "balanced"},
    {"mask": "window_per_head", "score": "alibi", "seq_len": 300, "heads": "mqa4", "layout": "zigzag"},
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


MASKS_OF_TWO = {"full": cpflex.causal(), "sliding": cpflex.causal() & cpflex.sliding_window(100)}


def plan_of_two(**options: Any) -> cpflex.Plan:
    return cpflex.make_plan(MASKS_OF_TWO, 4096, rank=5, world_size=8, **options)


def test_a_window_that_exchanges_no_heads_is_planned_over_single_ranks():
    plan = plan_of_two(ulysses_size={"full": 4})
    assert plan.ulysses_size == plan["full"].ulysses_size == 4
    assert (plan["full"].outer.world_size, plan["full"].outer_rank) == (2, 1)
    assert (plan["sliding"].outer.world_size, plan["sliding"].outer_rank) == (8, 5)
    assert torch.equal(plan["sliding"].positions, plan.positions)
    assert torch.equal(plan["full"].positions, plan.positions)
    assert [len(plan.stats[kind]["work"]) for kind in ("full", "sliding")] == [2, 8]
    said = plan.explain()
    assert said.count("grid") == 1
    assert said.index("full: ") < said.index("grid") < said.index("sliding: ")


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ({"fall": 4}, "must name mask kinds of ['full', 'sliding']"),
        ({"full": 4, "sliding": 0}, "ulysses_size must be an integer of at least 1; got 0"),
        ({"full": 3, "sliding": 1}, "must divide the ranks of the group; got 3 for 8 ranks"),
        ({"full": 16, "sliding": 1}, "must divide the ranks of the group; got 16 for 8 ranks"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(size: dict[str, int], said: str):
    with pytest.raises(ValueError) as refused:
        plan_of_two(ulysses_size=size)
    assert said in str(refused.value)


def test_sizes_must_divide_the_largest():
    with pytest.raises(ValueError, match="the largest ulysses_size must be a multiple of the others"):
        cpflex.make_plan(MASKS_OF_TWO, 600, rank=0, world_size=6, ulysses_size={"full": 3, "sliding": 2})
