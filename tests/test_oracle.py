"""The oracle itself: against textbook attention through torch's autograd."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cases import Problem, pairwise
from oracle import assert_within_budget

PROBLEMS = [
    Problem(mask="doc_causal", score="none", seq_len=30, heads="gqa", dims="d16dv24"),
    Problem(mask="eviction", score="relative_bias", seq_len=41),
    Problem(mask="padding", score="temperature", seq_len=17, heads="mqa"),
    Problem(mask="causal", score="alibi", seq_len=9),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_the_oracle_is_what_autograd_makes_of_dense_attention(problem: Problem):
    q, k, v, grad_out, grad_lse = (x.double() for x in problem.tensors.values())
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    captured = [x.detach().double().requires_grad_() for x in problem.captured()]
    score_mod = problem.score_mod(captured)
    groups = q.shape[1] // k.shape[1]
    at = [
        torch.arange(n).view([-1] + [1] * right)
        for n, right in zip((*q.shape[:3], q.shape[2]), (3, 2, 1, 0), strict=True)
    ]
    scores = q @ k.repeat_interleave(groups, dim=1).mT / q.shape[-1] ** 0.5
    scores = scores if score_mod is None else score_mod(scores, *at)
    seen = problem.mask_mod(*at).expand_as(scores)
    finite = scores.masked_fill(~seen, -1e30)
    p = finite.softmax(dim=-1) * seen
    out = p @ v.repeat_interleave(groups, dim=1)
    lse = finite.logsumexp(dim=-1)
    rows = seen.any(dim=-1)
    grads = torch.autograd.grad((out, lse), (q, k, v, *captured), (grad_out, grad_lse * rows))

    exact = problem.dense()
    torch.testing.assert_close(exact.out, out.detach())
    torch.testing.assert_close(exact.lse, lse.detach().masked_fill(~rows, -torch.inf))
    for ours, theirs in zip((exact.dq, exact.dk, exact.dv, *exact.d_captured), grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_budget_notices_an_error_of_twice_the_references():
    problem = Problem(seq_len=65, dims="d24")
    exact, reference = problem.dense(), problem.dense(torch.float32)
    assert_within_budget(reference, reference, exact)
    wrong = dataclasses.replace(reference, dv=reference.dv + 1e-5 * exact.dv.abs().max().float())
    with pytest.raises(AssertionError, match="dv: error"):
        assert_within_budget(wrong, reference, exact)
    wrong = dataclasses.replace(reference, lse=reference.lse.masked_fill(reference.lse < 0, -torch.inf))
    with pytest.raises(AssertionError, match="lse: finite"):
        assert_within_budget(wrong, reference, exact)


def test_pairs_of_values_all_meet():
    factors = {"a": range(5), "b": range(3), "c": range(4)}
    rows = pairwise(factors)
    assert {(row["a"], row["c"]) for row in rows} == {(a, c) for a in range(5) for c in range(4)}
    assert {(row["b"], row["c"]) for row in rows} == {(b, c) for b in range(3) for c in range(4)}
    assert len(rows) < 30
