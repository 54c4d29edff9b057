"""The largest score of each query over all ranks' keys, against the dense scores in fp64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest
from torch.utils.checkpoint import checkpoint

import cpflex
from cases import FACTORS, Problem, pairwise
from cpflex.testing import ThreadLinks, run_ranks
from processes import RankProcesses

SAMPLE = [
    Problem(**row)
    for row in pairwise(
        {name: FACTORS[name] for name in ("score", "layout", "schedule", "heads", "dtype")}
        | {
            "mask": ["full", "doc_sliding_causal", "eviction", "padding", "window_per_head", "nothing"],
            "seq_len": [1, 130, 300],
            "world_size": [1, 2, 3],
        }
    )
]
BOTH = AuxRequest(lse=True, max_scores=True)


def dense(problem: Problem) -> Tensor:
    """[B, Hq, S] fp64; -inf for a query that sees nothing."""
    q, k = problem.tensors["q"].double(), problem.tensors["k"].double()
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT / math.sqrt(q.shape[-1])
    position = torch.arange(problem.seq_len)
    score_mod = problem.score_mod([x.detach().double() for x in problem.captured()])
    for b, h in itertools.product(range(q.shape[0]), range(q.shape[1])):
        at = (torch.tensor(b), torch.tensor(h), position[:, None], position)
        modified = scores[b, h] if score_mod is None else score_mod(scores[b, h], *at)
        scores[b, h] = modified.masked_fill(~problem.mask_mod(*at), -torch.inf)
    return scores.amax(dim=-1)


def attend(group: Any, problem: Problem, backend: str = "reference") -> tuple[Tensor, Tensor, Tensor]:
    plan = problem.plan(group)
    q, k, v = (plan.shard(problem.tensors[name], dim=2, pad_value=torch.nan) for name in "qkv")
    out, aux = cpflex.flex_attention(
        *(q, k, v, problem.score_mod(problem.captured()), plan),
        enable_gqa=True,
        return_aux=BOTH,
        kernel_options={"backend": backend},
    )
    assert aux.max_scores.dtype == torch.float32
    return tuple(plan.unshard(x.detach(), dim=2) for x in (out, aux.lse, aux.max_scores))  # type: ignore[return-value]


def assert_right(found: Tensor, problem: Problem) -> None:
    expected = dense(problem)
    # the products of 16-bit tensors are exact in fp32: its sums and the score_mod round
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("problem", SAMPLE, ids=str)
def test_the_largest_scores_are_those_of_all_ranks_keys(problem: Problem):
    for _, lse, found in run_ranks(lambda group: attend(group, problem), problem.world_size, timeout=60):
        assert_right(found, problem)
        assert (found <= lse + 1e-5).logical_or(lse == -torch.inf).all(), (
            "a sum of exponentials is more than the largest"
        )


@pytest.mark.parametrize("processes", [2, 4], indirect=True)
def test_real_processes_find_them_too(processes: RankProcesses):
    problem = Problem("doc_sliding_causal", "alibi", 300, "gqa", schedule="direct", world_size=processes.world_size)
    for _, _, found in processes.run(attend, problem):
        assert_right(found, problem)


def test_they_change_nothing_else_and_have_no_gradient():
    plan = cpflex.make_plan(cpflex.causal(), 208)
    q, k, v = torch.randn(3, 1, 2, 208, 16, requires_grad=True)
    out, aux = cpflex.flex_attention(q, k, v, block_mask=plan, return_aux=BOTH)
    expected, lse = cpflex.flex_attention(q, k, v, block_mask=plan, return_lse=True)
    assert torch.equal(out, expected)
    assert torch.equal(aux.lse, lse)
    assert not aux.max_scores.requires_grad
    only = cpflex.flex_attention(q, k, v, block_mask=plan, return_aux=AuxRequest(max_scores=True))[1]
    assert only.lse is None
    assert torch.equal(only.max_scores, aux.max_scores)


@pytest.mark.parametrize("world_size", [1, 2])
def test_under_the_compiler_and_checkpointing(world_size: int):
    def clipped(x: Tensor, plan: cpflex.Plan) -> Tensor:
        out, aux = cpflex.flex_attention(x, x * 0.5, x, block_mask=plan, return_aux=BOTH)
        return out * torch.sigmoid(aux.lse + aux.max_scores.nan_to_num(neginf=0.0)).unsqueeze(-1)

    whole = torch.randn(1, 2, 300, 16)

    def run(group: ThreadLinks) -> list[Tensor]:
        plan = cpflex.make_plan(cpflex.sliding_window(40) & cpflex.causal(), 300, group)
        compiled = torch.compile(clipped, fullgraph=True, backend="aot_eager")
        calls = [clipped, lambda *args: checkpoint(clipped, *args, use_reentrant=False)]
        results = []
        for call in [*calls, compiled] if world_size == 1 else calls:
            x = plan.shard(whole, dim=2, pad_value=0.0).requires_grad_()
            y = call(x, plan)
            results.append(torch.cat([y.detach(), *torch.autograd.grad(y.square().sum(), x)]))
        return results

    for first, *others in run_ranks(run, world_size, timeout=60):
        for other in others:
            torch.testing.assert_close(other, first, rtol=1e-6, atol=1e-6)
