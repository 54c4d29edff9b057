"""Attention of new tokens to keys in pages, split over runs and ranks, is dense attention of each sequence: plain torch."""

from __future__ import annotations

import math

import pytest
import torch
from paged import Paged, assert_near

from cpflex.kernels import attend_pages, combine, empty_partials, partials_of
from cpflex.kernels.pages import Partials

PROBLEMS = [
    Paged(),
    Paged("window", "alibi", world_size=1),
    Paged("by_head", "softcap", dtype="bf16"),
    Paged("by_sequence", "by_sequence", heads="mqa", dtype="fp16"),
    Paged("late", "key_bias", pages_per_split=1),
    Paged("nothing", world_size=3),
    Paged("tree", lens=(70, 35, 35), new=(1, 5, 5)),
    Paged("sinks", "nan_where_hidden", heads="wide", lens=(70, 35), new=(1, 3)),
    Paged("future", scale=-0.3, dims=(24, 16), page_size=64, lens=(200, 65, 64), new=(12, 8, 1), world_size=3),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_partials_of_splits_and_ranks_combine_to_dense_attention(problem: Paged):
    assert_near(problem.run("reference"), problem)


def test_partials_that_no_item_names_are_left_as_they_are():
    problem = Paged(lens=(40,), new=(2,), world_size=1)
    q, k, v = (problem.tensors[name] for name in "qkv")
    work, _ = problem.work(0)
    into = empty_partials(work.num_partials + 3, q.shape[1], v.shape[3], q.device)
    for x in into:
        x.fill_(7.0)
    attend_pages(q, k, v, work, problem.call("reference"), into)
    for x in into:
        assert (x[-3:] == 7.0).all() and (x[:-3] != 7.0).all()


def drawn_partials(rows: int, heads: int = 3, dim: int = 8) -> Partials:
    """Some saw no key: nobody has written their out."""
    partials = empty_partials(rows, heads, dim, torch.device("cpu"))
    partials.out.normal_()
    partials.lse.normal_().mul_(30.0)
    unseen = torch.rand(rows, heads) < 0.3
    partials.lse[unseen], partials.out[unseen] = -math.inf, math.nan
    return partials


def test_combining_is_a_softmax_over_the_parts():
    partials = drawn_partials(60)
    parts = torch.tensor([[0, 1, 60], [5, 7, 4], [3, 0, 1], [9, 9, 0], [59, -2, 20]], dtype=torch.int32)
    found = combine(partials, parts)
    for row, (first, stride, count) in enumerate(parts.tolist()):
        at = [first + stride * i for i in range(count)]
        lse, out = partials.lse[at].double(), partials.out[at].double().nan_to_num(0.0)
        total = lse.logsumexp(0) if count else torch.full((3,), -math.inf, dtype=torch.float64)
        exact = torch.einsum("ph,phd->hd", (lse - total).exp().nan_to_num(0.0), out)
        torch.testing.assert_close(found.lse[row].double(), total, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.out[row].double(), exact, rtol=1e-6, atol=1e-6)


def test_what_is_not_a_number_is_not_hidden():
    partials = drawn_partials(4)
    partials.lse[1, 0] = math.nan
    found = combine(partials, torch.tensor([[0, 1, 4], [2, 1, 2]], dtype=torch.int32))
    assert found.out[0, 0].isnan().all() and found.lse[0, 0].isnan()
    assert not found.out[:, 1:].isnan().any() and not found.out[1].isnan().any()


def test_a_message_holds_partials():
    memory = torch.randn(4, 3 * (8 + 1))
    out, lse = partials_of(memory, 3)
    torch.testing.assert_close(torch.cat([out.flatten(1), lse], 1), memory, rtol=0, atol=0)
    combine(drawn_partials(4), torch.tensor([[0, 1, 2]] * 4, dtype=torch.int32), into=partials_of(memory, 3))
    assert torch.equal(memory[:1].expand(4, -1), memory)
