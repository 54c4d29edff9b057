"""Under autocast an attention call computes what it computes without: its inputs alone decide the precision."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor

import cpflex
from cpflex.mods.trace import trace_score_mod
from cpflex.testing import ThreadLinks, run_ranks

SEQ_LEN = 144
SLOPES = torch.rand(2, requires_grad=True)


def off() -> AbstractContextManager:
    return contextlib.nullcontext()


def on() -> AbstractContextManager:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def alibi(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score - SLOPES[h] * (q_idx - kv_idx)


def inputs(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, SEQ_LEN, 64, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def outputs_and_gradients(
    dtype: torch.dtype, forward: AbstractContextManager, backward: AbstractContextManager, group: ThreadLinks | None
) -> list[Tensor]:
    plan = cpflex.make_plan(cpflex.causal(), SEQ_LEN, group)
    leaves = inputs(dtype)
    local = [plan.shard(x, 2, pad_value=0.0) for x in leaves]
    with forward:
        out, lse = cpflex.flex_attention(*local, alibi, plan, return_lse=True)
    with backward:
        grads = torch.autograd.grad([out, lse], [*leaves, SLOPES], [torch.ones_like(out), torch.ones_like(lse)])
    return [out.detach(), lse.detach(), *grads]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("forward", "backward"), [(on, off), (off, on), (on, on)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_autocast_changes_no_bit(dtype: torch.dtype, forward, backward, world_size: int):
    def run(forward, backward) -> list[list[Tensor]]:
        # autocast belongs to a thread, and each rank is one
        return run_ranks(lambda group: outputs_and_gradients(dtype, forward(), backward(), group), world_size)

    for found, expected in zip(run(forward, backward), run(off, off), strict=True):
        assert [x.dtype for x in found] == [x.dtype for x in expected]
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_a_mod_is_traced_without_autocast():
    """For a captured number on a GPU it would write a cast into the graph of `torch.exp`, and of forty others."""
    seen = []

    def fn(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return score * 0.5

    with on():
        trace_score_mod(fn)
        assert torch.is_autocast_enabled("cpu")
    assert seen == [False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_step_under_autocast_and_a_grad_scaler_is_the_step_without(dtype: torch.dtype):
    plan = cpflex.make_plan(cpflex.causal(), SEQ_LEN)

    def step(autocast: AbstractContextManager, scaler: torch.amp.GradScaler) -> tuple[list[Tensor], float]:
        leaves = inputs(torch.float32)
        optimizer = torch.optim.SGD(leaves, lr=1.0)
        with autocast:
            loss = cpflex.flex_attention(*leaves, block_mask=plan).square().sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return [x.detach() for x in leaves], scaler.get_scale()

    def scaler(init_scale: float) -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=init_scale)

    expected, _ = step(off(), torch.amp.GradScaler("cpu", enabled=False))
    # a power of two: scaling rounds nothing
    found, scale = step(torch.autocast("cpu", dtype=dtype), scaler(1024.0))
    assert scale == 1024.0
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    # gradients that overflow are seen, and the step is skipped
    found, scale = step(torch.autocast("cpu", dtype=dtype), scaler(2.0**127))
    assert scale == 2.0**126
    assert all(torch.equal(x, y) for x, y in zip(found, inputs(torch.float32), strict=True))
