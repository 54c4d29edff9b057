"""Idle tokens: those that a mask leaves out on one axis are found, all of them, and what they hold reaches nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cpflex
from cases import MASKS, Problem
from cpflex.planning import idle
from cpflex.testing import ThreadLinks, run_ranks
from runs import assemble, attend_on_rank

NAN, INF = float("nan"), float("inf")
SEQ_LEN = 300


def sees(problem: Problem) -> Tensor:
    """bool [B, Hq, S, S], of the positions that exist."""
    b, h, position = (torch.arange(n) for n in (problem.batch_size, problem.num_heads, problem.seq_len))
    heads = [[problem.mask_mod(one, head, position[:, None], position) for head in h] for one in b]
    shape = (problem.seq_len, problem.seq_len)
    return torch.stack([torch.stack([seen.expand(shape) for seen in row]) for row in heads])


def of_all_tokens(table: Tensor, plan: cpflex.Plan, problem: Problem) -> Tensor:
    """bool [B, Hq, S_local]"""
    shape = (problem.batch_size, problem.num_heads, plan.local_len)
    return table.expand(shape) if table.numel() else torch.zeros(shape, dtype=torch.bool)


def assert_found(problem: Problem) -> None:
    seen = sees(problem)
    for rank in range(problem.world_size):
        plan = problem.plan(None, rank=rank, world_size=problem.world_size)
        is_pad = plan.positions >= problem.seq_len
        at = plan.positions.clamp(max=problem.seq_len - 1)
        found = plan.kinds["mask"].idle
        for table, is_used in ((found.keys, seen.any(dim=2)), (found.queries, seen.any(dim=3))):
            expected = ~is_used[:, :, at] | is_pad
            assert torch.equal(of_all_tokens(table, plan, problem), expected), f"rank {rank}"
            assert (table.numel() > 0) == expected.any(), "no table where there is nothing to clear"


@pytest.mark.parametrize("mask", MASKS)
def test_idle_tokens_are_those_that_nobody_sees_and_that_see_nobody(mask: str):
    assert_found(Problem(mask, seq_len=SEQ_LEN, heads="gqa", world_size=3))
    assert_found(Problem(mask, seq_len=128, heads="gqa", world_size=1))


ODD: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "seven before": lambda b, h, q, k: q - k == 7,
    "strictly before": lambda b, h, q, k: k < q,
    "every third key, of even queries": lambda b, h, q, k: (k % 3 == 0) & (q % 2 == 0),
    "kept keys of another half": lambda b, h, q, k: (KEPT[k] > 0) & ((q < 150) != (k < 150)),
    "some keys, of some heads": lambda b, h, q, k: (k <= q) & ((k % 5 != 0) | (h == 0)) & (k % 7 != 0),
    "by a root": lambda b, h, q, k: (q * 1.0).sqrt() == k * 1.0,
    "by a root, several keys of one query": lambda b, h, q, k: ((q - k) * 1.0).sqrt() >= 1.0,
}
KEPT = torch.rand(SEQ_LEN, generator=torch.Generator().manual_seed(0)) - 0.4


class Odd(Problem):
    mask_mod = property(lambda self: ODD[self.mask])


@pytest.mark.parametrize("name", ODD)
def test_tokens_that_do_not_see_themselves_are_searched_for(name: str):
    assert_found(Odd(name, seq_len=SEQ_LEN, world_size=2))


def test_a_search_that_would_take_too_long_clears_nothing_that_may_be_seen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(idle, "MOST_INTERVALS", 200)
    problem = Odd("seven before", seq_len=SEQ_LEN, world_size=2)
    plan = problem.plan(None, rank=0, world_size=2)
    at = plan.positions[plan.positions < SEQ_LEN]
    for table, is_used in zip(
        plan.kinds["mask"].idle, (sees(problem).any(dim=2), sees(problem).any(dim=3)), strict=True
    ):
        cleared = of_all_tokens(table, plan, problem)[:, :, : len(at)]
        assert not (cleared & is_used[:, :, at]).any()


PROBLEMS = [
    Problem("padding", "softcap", SEQ_LEN, "gqa", world_size=2),
    Problem("eviction", "none", SEQ_LEN, "gqa", world_size=3, schedule="direct"),
    Problem("eviction", "key_bias", SEQ_LEN, "mha", dtype="bf16", world_size=2, schedule="ring"),
    Odd("some keys, of some heads", "alibi", SEQ_LEN, "gqa", world_size=1),
    Odd("every third key, of even queries", "none", SEQ_LEN, "gqa", world_size=3, layout="striped"),
    Odd("kept keys of another half", "temperature", SEQ_LEN, "gqa", world_size=2, schedule="direct"),
]


def with_idle(problem: Problem, value: float) -> dict[str, Tensor]:
    """The inputs with ``value`` in the keys that no query sees, and in queries that see no key, gradients included."""
    seen = sees(problem)
    tensors = {name: x.clone() for name, x in problem.tensors.items()}
    idle_queries = ~seen.any(dim=3)
    idle_keys = (~seen.any(dim=2)).unflatten(1, (tensors["k"].shape[1], -1)).all(dim=2)
    assert idle_keys.any(), "the probe probes something"
    for name, x in tensors.items():
        x[idle_keys if name in "kv" else idle_queries] = value
    return tensors


@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e30], ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_what_idle_tokens_hold_reaches_nothing(problem: Problem, value: float):
    """Also inside tiles where other keys are seen: the same bits as with zeros there."""

    def results(value: float) -> list[dict]:
        run = partial(attend_on_rank, problem=problem, tensors=with_idle(problem, value))
        return run_ranks(run, problem.world_size, timeout=60)

    for with_value, with_zeros in zip(results(value), results(0.0), strict=True):
        for name in ("out", "lse", "dq", "dk", "dv"):
            assert torch.equal(with_value[name], with_zeros[name]), name
        for ours, clean in zip(with_value["d_captured"], with_zeros["d_captured"], strict=True):
            assert torch.equal(ours, clean)


def test_a_key_that_one_head_of_a_group_sees_is_not_cleared():
    problem = Odd("some keys, of some heads", "none", SEQ_LEN, "gqa", world_size=2)
    found = assemble(run_ranks(partial(attend_on_rank, problem=problem), 2, timeout=60))
    q, k, v = (problem.tensors[name].detach() for name in "qkv")
    expected = F.scaled_dot_product_attention(q, k, v, sees(problem), enable_gqa=True)
    torch.testing.assert_close(found.out, expected.nan_to_num(0.0), rtol=1e-5, atol=1e-5)


def test_a_visible_value_that_is_not_finite_stays_visible():
    plan = cpflex.make_plan(cpflex.causal(), 128)
    q, k, v = torch.randn(3, 1, 1, 128, 16)
    v[:, :, 60] = NAN
    out = cpflex.flex_attention(q, k, v, block_mask=plan)
    assert out[:, :, 60:].isnan().all()


@pytest.mark.parametrize("world_size", [1, 2])
def test_padding_of_a_batch_with_nan_trains(world_size: int):
    """The user's case: rows of several lengths, garbage behind their ends."""
    lengths = torch.tensor([300, 171])
    mask = cpflex.causal() & (lambda b, h, q, k: (q < lengths[b]) & (k < lengths[b]))
    qkv = torch.randn(3, 2, 2, 300, 16)
    qkv[:, 1, :, 171:] = NAN

    def train(group: ThreadLinks) -> None:
        plan = cpflex.make_plan(mask, 300, group, batch_size=2)
        local = [plan.shard(x, dim=2, pad_value=0.0).requires_grad_() for x in qkv]
        out = plan.unshard(cpflex.flex_attention(*local, block_mask=plan), dim=2)
        assert (out[1, :, 171:] == 0).all()
        for grad in torch.autograd.grad(out.square().sum(), local):
            assert grad.isfinite().all()

    run_ranks(train, world_size, timeout=60)
