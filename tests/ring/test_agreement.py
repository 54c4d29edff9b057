"""Agreement: ranks that are about to compute different things all find out, and from the same words."""

from __future__ import annotations

import pytest

import cpflex
from cpflex.ring.agreement import agree, refuse
from cpflex.testing import ThreadLinks, run_ranks


def said_by(fn, world_size: int) -> list[str]:
    """What each rank raised; "" for none."""

    def guarded(group: ThreadLinks) -> str:
        try:
            fn(group)
        except cpflex.RankMismatch as error:
            return str(error)
        return ""

    return run_ranks(guarded, world_size, timeout=10)


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_ranks_that_agree_go_on(world_size: int):
    assert said_by(lambda group: agree(group, {"plan": "a", "scale": 0.5}), world_size) == [""] * world_size


def test_a_disagreement_is_raised_on_every_rank_and_names_the_ranks():
    said = said_by(lambda group: agree(group, {"plan": "a", "scale": 1.0 if group.rank == 2 else 0.5}), 4)
    assert said == ["the ranks disagree about scale: group ranks 0, 1, 3: 0.5; group rank 2: 1.0"] * 4


def test_the_first_fact_that_differs_is_named():
    said = said_by(lambda group: agree(group, {"plan": group.rank // 2, "scale": group.rank}), 4)
    assert said == ["the ranks disagree about plan: group ranks 0, 1: 0; group ranks 2, 3: 1"] * 4


def test_a_refusal_is_told_to_the_ranks_that_wait():
    def call(group: ThreadLinks) -> None:
        if group.rank == 1:
            refuse(group, ValueError("query has 7 tokens"))
        else:
            agree(group, {"plan": "a"})

    said = said_by(call, 3)
    told = "nothing was exchanged: group rank 1 raised ValueError: query has 7 tokens"
    assert said == [told, "", told]


def test_every_refusal_is_told():
    def call(group: ThreadLinks) -> None:
        if group.rank:
            refuse(group, ValueError(f"mistake {group.rank}"))
        else:
            agree(group, {"plan": "a"})

    assert said_by(call, 3)[0].endswith(
        "group rank 1 raised ValueError: mistake 1; group rank 2 raised ValueError: mistake 2"
    )


def test_ranks_agree_once_per_kind_of_call():
    import torch

    def call(group: ThreadLinks) -> list[int]:
        plan = cpflex.make_plan(cpflex.causal(), 64, group)
        gathered = []
        for dim in (16, 16, 8, 16):
            q = torch.randn(1, 1, plan.local_len, dim)
            cpflex.flex_attention(q, q, q, block_mask=plan)
            gathered.append(group._gathered)
        return gathered

    assert run_ranks(call, 2) == [[1, 1, 2, 2]] * 2


def test_one_rank_compares_with_nobody():
    import torch

    plan = cpflex.make_plan(cpflex.causal(), 64)
    q = torch.randn(1, 1, 64, 16)
    cpflex.flex_attention(q, q, q, block_mask=plan)
