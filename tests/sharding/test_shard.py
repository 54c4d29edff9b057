"""shard and unshard: inverse to each other, adjoint to each other."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor

import cpflex
from cases import LAYOUTS
from cpflex.testing import ThreadLinks, run_ranks
from processes import RankProcesses

LENGTHS = (1, 5, 127, 128, 300, 321)
SHAPES = {0: (), 1: (3,), -1: (2, 3), -2: (2,), 2: (2, 2)}
"""The dims before the sequence dim, by how it is counted."""


def whole(seq_len: int, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    before, after = (SHAPES[dim], ()) if dim == -1 else (SHAPES[dim], (4,))
    x = torch.randn(*before, seq_len, *after, generator=torch.Generator().manual_seed(seq_len)) * 100
    assert x.shape[dim] == seq_len
    return x.to(dtype)


def plan_of(group, seq_len: int, layout: str) -> cpflex.Plan:
    return cpflex.make_plan(cpflex.causal(), seq_len, group, layout=LAYOUTS[layout])


def round_trip(group, seq_len: int, layout: str, dim: int, dtype: torch.dtype) -> bool:
    plan = plan_of(group, seq_len, layout)
    x = whole(seq_len, dim, dtype)
    local = plan.shard(x, dim, pad_value=1)
    assert local.shape[dim] == plan.local_len
    return torch.equal(plan.unshard(local, dim), x)


@pytest.mark.by_day(3)
@pytest.mark.parametrize("dim", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_unshard_undoes_shard(layout: str, dim: int):
    for seq_len, world_size in itertools.product(LENGTHS, (1, 2, 3, 5)):
        dtype = (torch.float32, torch.int64, torch.bfloat16, torch.bool)[(seq_len + world_size) % 4]
        assert all(run_ranks(partial(round_trip, seq_len=seq_len, layout=layout, dim=dim, dtype=dtype), world_size))


@pytest.mark.parametrize("processes", [2, 4], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool], ids=str)
def test_unshard_undoes_shard_on_processes(dtype: torch.dtype, processes: RankProcesses):
    assert all(processes.run(round_trip, 300, "zigzag", -2, dtype))


def test_a_shard_holds_the_tokens_at_the_plans_positions():
    plan = cpflex.make_plan(cpflex.causal(), 300, rank=1, world_size=3, layout=cpflex.zigzag)
    local = plan.shard(torch.arange(300), 0, pad_value=-1)
    expected = torch.where(plan.positions < 300, plan.positions, -1)
    torch.testing.assert_close(local, expected)
    assert plan.positions.dtype == torch.int64


@pytest.mark.parametrize(("seq_len", "world_size"), [(300, 3), (5, 4), (1, 2)])
def test_pads_are_numbered_from_the_sequence_length_on(seq_len: int, world_size: int):
    plans = [cpflex.make_plan(cpflex.full(), seq_len, rank=rank, world_size=world_size) for rank in range(world_size)]
    positions = torch.cat([plan.positions for plan in plans])
    assert sorted(positions.tolist()) == list(range(world_size * plans[0].local_len))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_shards_need_a_pad_value_only_where_there_are_pads(world_size: int):
    even = cpflex.make_plan(cpflex.full(), 32 * world_size, rank=0, world_size=world_size, layout=cpflex.contiguous)
    even.shard(torch.zeros(32 * world_size), 0)
    for rank in range(world_size):  # also on a rank that holds no pad
        odd = cpflex.make_plan(cpflex.full(), 30, rank=rank, world_size=world_size, layout=cpflex.contiguous)
        with pytest.raises(ValueError, match="pass pad_value="):
            odd.shard(torch.zeros(30), 0)


def adjoint(group: ThreadLinks, seq_len: int, layout: str, dim: int) -> tuple[Tensor, Tensor]:
    """(gradient of sum over ranks of <shard x, y>, this rank's part; scattered y)."""
    plan = plan_of(group, seq_len, layout)
    x = whole(seq_len, dim).requires_grad_()
    local = plan.shard(x, dim, pad_value=0.0)
    y = torch.randn(local.shape, generator=torch.Generator().manual_seed(group.rank))
    (gradient,) = torch.autograd.grad(local, x, y)
    padded = torch.zeros(*x.shape[: dim % x.ndim], plan.local_len * plan.world_size, *x.shape[dim % x.ndim + 1 :])
    scattered = padded.index_copy(dim % x.ndim, plan.positions, y).narrow(dim % x.ndim, 0, seq_len)
    return gradient, scattered


@pytest.mark.parametrize("dim", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_adjoint_of_shard_scatters(layout: str, dim: int):
    """<shard x, y> = <x, scatter y>, for every rank's y."""
    for gradient, scattered in run_ranks(partial(adjoint, seq_len=127, layout=layout, dim=dim), 3):
        torch.testing.assert_close(gradient, scattered, rtol=0, atol=0)


def unshard_gradient(group: ThreadLinks, seq_len: int, layout: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradient of the ranks' losses sum(w_r * unshard(x)) with respect to this rank's x; and the summed w, sharded."""
    plan = plan_of(group, seq_len, layout)
    local = plan.shard(whole(seq_len, 1, dtype), 1, pad_value=0.0).requires_grad_()
    weights = [upstream(rank, seq_len, dtype) for rank in range(plan.world_size)]
    (gradient,) = torch.autograd.grad(plan.unshard(local, 1), local, weights[plan.rank])
    wide = [w.to(torch.promote_types(dtype, torch.float32)) for w in weights]
    total = sum(wide[1:], wide[0]).to(dtype)
    return gradient, plan.shard(total, 1, pad_value=0.0)


def upstream(rank: int, seq_len: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(3, seq_len, 4, generator=torch.Generator().manual_seed(rank), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_of_unshard_is_the_ranks_sum_taken_in_fp32_or_wider_in_rank_order(layout: str, dtype: torch.dtype):
    for gradient, expected in run_ranks(partial(unshard_gradient, seq_len=127, layout=layout, dtype=dtype), 5):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=0)


def test_a_bf16_sum_would_have_been_noticed():
    weights = [upstream(rank, 127, torch.bfloat16) for rank in range(5)]
    in_bf16 = sum(weights[1:], weights[0])
    in_fp32 = torch.stack([w.float() for w in weights]).sum(dim=0).bfloat16()
    assert not torch.equal(in_bf16, in_fp32)


def test_labels_shifted_before_sharding_are_the_next_tokens():
    tokens = torch.arange(300)
    labels = torch.cat([tokens[1:], torch.tensor([-100])])
    for rank in range(4):
        plan = cpflex.make_plan(cpflex.causal(), 300, rank=rank, world_size=4)
        local, local_labels = plan.shard(tokens, 0, pad_value=0), plan.shard(labels, 0, pad_value=-100)
        real = plan.positions < 299
        torch.testing.assert_close(local_labels[real], local[real] + 1)
        assert (local_labels[~real] == -100).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda plan: plan.shard(torch.zeros(2, 65), 1), "dim 1 must have the plan's seq_len=64 tokens"),
        (lambda plan: plan.shard(torch.zeros(64, 2), -1), "dim -1 must have the plan's seq_len=64 tokens"),
        (lambda plan: plan.unshard(torch.zeros(63), 0), "local_len=64 tokens"),
    ],
    ids=["too long", "other dim", "too short"],
)
def test_a_tensor_of_another_length_is_refused(call, message: str):
    with pytest.raises(ValueError, match=message):
        call(cpflex.make_plan(cpflex.causal(), 64))


def test_unshard_without_a_group_is_refused():
    plan = cpflex.make_plan(cpflex.causal(), 64, rank=0, world_size=2)
    with pytest.raises(RuntimeError, match=r"no group to gather from; call plan = plan\.bind\(group\)"):
        plan.unshard(torch.zeros(32), 0)


def test_a_shard_of_one_rank_and_back_costs_nothing_in_numbers():
    plan = cpflex.make_plan(cpflex.causal(), 64)
    x = torch.randn(64, requires_grad=True)
    y = plan.unshard(plan.shard(x, 0), 0)
    (gradient,) = torch.autograd.grad(y, x, torch.arange(64.0))
    torch.testing.assert_close(y, x)
    torch.testing.assert_close(gradient, torch.arange(64.0))
