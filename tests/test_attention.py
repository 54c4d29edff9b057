"""flex_attention: what it returns, what gets a gradient, and what it reads when."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest

import cpflex
from cases import Problem
from cpflex.ring import handles
from cpflex.ring.handles import resolve
from cpflex.testing import ThreadLinks, run_ranks
from patience import patience
from processes import RankProcesses

SEQ_LEN = 48


def qkv(heads: int = 2, requires_grad: bool = False, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(2, heads, SEQ_LEN, 16, dtype=dtype, requires_grad=requires_grad) for _ in "qkv"]


def plan() -> cpflex.Plan:
    return cpflex.make_plan(cpflex.causal(), SEQ_LEN)


# -- what comes back


def test_what_is_returned_is_what_torch_returns():
    q, k, v = qkv()
    made = plan()
    out = cpflex.flex_attention(q, k, v, block_mask=made)
    assert isinstance(out, Tensor)
    with_lse = cpflex.flex_attention(q, k, v, block_mask=made, return_lse=True)
    assert isinstance(with_lse, tuple)
    with_aux = cpflex.flex_attention(q, k, v, block_mask=made, return_aux=AuxRequest(lse=True))
    without = cpflex.flex_attention(q, k, v, block_mask=made, return_aux=AuxRequest())
    for other in (with_lse[0], with_aux[0], without[0]):
        torch.testing.assert_close(other, out, rtol=0, atol=0)
    torch.testing.assert_close(with_aux[1].lse, with_lse[1], rtol=0, atol=0)
    assert with_aux[1].max_scores is None
    for options in ({"backend": "reference"}, {"BACKEND": "REFERENCE"}, {"BACKEND": "AUTO"}, {"backend": "auto"}, {}):
        same = cpflex.flex_attention(q, k, v, block_mask=made, kernel_options=options)
        torch.testing.assert_close(same, out, rtol=0, atol=0)
    assert without[1].lse is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_out_has_the_dtype_of_the_query_and_lse_is_fp32(dtype: torch.dtype):
    out, lse = cpflex.flex_attention(*qkv(dtype=dtype), block_mask=plan(), return_lse=True)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert (out.is_contiguous(), lse.shape) == (True, out.shape[:-1])


def test_lse_is_the_natural_logarithm():
    q, k, v = qkv()
    _, lse = cpflex.flex_attention(q, k, v, block_mask=plan(), return_lse=True)
    scores = (q @ k.mT / 4).masked_fill(~torch.ones(SEQ_LEN, SEQ_LEN, dtype=torch.bool).tril(), -math.inf)
    torch.testing.assert_close(lse, scores.logsumexp(dim=-1))


@pytest.mark.parametrize("scale", [0.0, 0.3, 2, -1.0])
def test_the_scale_is_that_of_the_scores(scale: float):
    q, k, v = qkv()
    found = cpflex.flex_attention(q, k, v, block_mask=plan(), scale=scale)
    torch.testing.assert_close(found, cpflex.flex_attention(q * scale * 4, k, v, block_mask=plan()))


# -- what gets a gradient


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qv", "kv"])
def test_only_what_requires_a_gradient_gets_one(wanted: str):
    tensors = dict(zip("qkv", qkv(), strict=True))
    everything = [x.clone().requires_grad_() for x in tensors.values()]
    expected = dict(zip("qkv", torch.autograd.grad(attend_sum(everything), everything), strict=True))
    some = {name: x.clone().requires_grad_(name in wanted) for name, x in tensors.items()}
    found = torch.autograd.grad(attend_sum(list(some.values())), [some[name] for name in wanted])
    for name, gradient in zip(wanted, found, strict=True):
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=0)


def attend_sum(tensors: Sequence[Tensor]) -> Tensor:
    return cpflex.flex_attention(*tensors, block_mask=plan()).square().sum()


def test_a_loss_of_lse_alone_has_gradients():
    q, k, v = qkv(requires_grad=True)
    _, lse = cpflex.flex_attention(q, k, v, block_mask=plan(), return_lse=True)
    dq, dk, dv = torch.autograd.grad(lse.sum(), (q, k, v))
    hidden = ~torch.ones(SEQ_LEN, SEQ_LEN, dtype=torch.bool).tril()
    dense = (q @ k.mT / 4).masked_fill(hidden, -math.inf).logsumexp(dim=-1)
    expected = torch.autograd.grad(dense.sum(), (q, k))
    torch.testing.assert_close((dq, dk), expected)
    assert (dv == 0).all()


def test_backward_may_run_twice():
    q, k, v = qkv(requires_grad=True)
    loss = cpflex.flex_attention(q, k, v, block_mask=plan()).square().sum()
    first = torch.autograd.grad(loss, (q, k, v), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, (q, k, v)), first, rtol=0, atol=0)


def captured_gradient(captured: Tensor, leaf: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    out = cpflex.flex_attention(*tensors, lambda s, b, h, q, k: s * captured[h] - captured[h] * k, plan())
    return torch.autograd.grad(out.square().sum(), leaf)[0]


def test_gradients_flow_through_what_a_captured_tensor_was_made_from():
    tensors = qkv()
    logs = torch.tensor([-1.0, -2.0], requires_grad=True)
    made = logs.exp()
    direct = made.detach().requires_grad_()
    expected = captured_gradient(direct, direct, tensors) * made.detach()
    torch.testing.assert_close(captured_gradient(made, logs, tensors), expected)


def test_a_captured_tensor_may_be_expanded_or_strided():
    tensors = qkv()
    one = torch.tensor(0.5, requires_grad=True)
    dense = torch.full((2,), 0.5, requires_grad=True)
    expected = captured_gradient(dense, dense, tensors)
    torch.testing.assert_close(captured_gradient(one.expand(2), one, tensors), expected.sum())
    base = torch.full((2, 3), 0.5, requires_grad=True)
    found = captured_gradient(base[:, 1], base, tensors)
    torch.testing.assert_close(found[:, 1], expected)
    assert (found[:, [0, 2]] == 0).all()


def test_two_names_for_one_captured_tensor_share_its_gradient():
    q, k, v = qkv()
    slope = torch.tensor(0.3, requires_grad=True)
    alias = slope

    def twice(s, b, h, q, k):
        return s * slope + s * alias

    found = torch.autograd.grad(cpflex.flex_attention(q, k, v, twice, plan()).square().sum(), slope)[0]
    once = torch.autograd.grad(
        cpflex.flex_attention(q, k, v, lambda s, b, h, q, k: s * 2 * slope, plan()).square().sum(), slope
    )[0]
    torch.testing.assert_close(found, once)


def test_a_captured_bf16_tensor_gets_a_bf16_gradient():
    tensors = qkv()
    slopes = torch.tensor([0.5, 0.25], dtype=torch.bfloat16, requires_grad=True)
    exact = slopes.detach().float().requires_grad_()
    found = captured_gradient(slopes, slopes, tensors)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), captured_gradient(exact, exact, tensors), rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_without_gradients_the_numbers_are_the_same(mode: Any):
    q, k, v = qkv(requires_grad=True)
    softcap = cpflex.score_mod(lambda s, b, h, q, k: 5 * torch.tanh(s / 5))
    expected = cpflex.flex_attention(q, k, v, softcap, plan())
    with mode():
        found = cpflex.flex_attention(q, k, v, softcap, plan())
    assert not found.requires_grad
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=0)


def test_a_score_is_fp32_whatever_the_inputs_are():
    seen = []

    def note(s, b, h, q, k):
        seen.append((s.dtype, q.dtype, k.dtype))
        return s

    cpflex.flex_attention(*qkv(dtype=torch.bfloat16), note, plan())
    assert seen == [(torch.float32, torch.int64, torch.int64)]


# -- what is read when


def test_numbers_of_a_score_mod_are_frozen_when_it_is_traced():
    q, k, v = qkv()
    cap = 5.0

    def softcap(s, b, h, q, k):
        return cap * torch.tanh(s / cap)

    traced = cpflex.score_mod(softcap)
    before = cpflex.flex_attention(q, k, v, traced, plan())
    cap = 1.0
    torch.testing.assert_close(cpflex.flex_attention(q, k, v, traced, plan()), before, rtol=0, atol=0)
    assert not torch.equal(cpflex.flex_attention(q, k, v, softcap, plan()), before), "a plain callable is traced again"


def test_a_traced_score_mod_is_not_traced_again():
    calls = []

    def counted(s, b, h, q, k):
        calls.append(1)
        return s

    traced = cpflex.score_mod(cpflex.score_mod(counted))
    for _ in range(3):
        cpflex.flex_attention(*qkv(), traced, plan())
    assert len(calls) == 1


def test_changing_a_captured_tensor_between_forward_and_backward_is_noticed():
    q, k, v = qkv(requires_grad=True)
    slope = torch.tensor(0.3, requires_grad=True)
    out = cpflex.flex_attention(q, k, v, lambda s, b, h, q, k: s * slope, plan())
    with torch.no_grad():
        slope.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_nothing_outlives_its_plan():
    gc.collect()
    before = len(handles._objects)
    made = [plan() for _ in range(3)]
    q, k, v = qkv(requires_grad=True)
    outs = [cpflex.flex_attention(q, k, v, block_mask=one) for one in made]
    del made
    assert len(handles._objects) == before + 3, "a graph keeps its plan"
    torch.autograd.grad(sum(out.sum() for out in outs), q)
    del outs
    gc.collect()
    assert len(handles._objects) == before


# -- written on top of lse


def with_sinks(group: ThreadLinks, problem: Problem, sinks: Tensor) -> dict[str, Any]:
    """gpt-oss: each head has a sink, a logit without a value that takes part in the softmax."""
    made = problem.plan(group)
    local = {x: made.shard(t, 2, pad_value=0.0).requires_grad_(x in "qkv") for x, t in problem.tensors.items()}
    leaf = sinks.clone().requires_grad_()
    q, k, v = (local[x] for x in "qkv")
    out, lse = cpflex.flex_attention(q, k, v, block_mask=made, enable_gqa=True, return_lse=True)
    out = out * torch.sigmoid(lse - leaf[:, None]).unsqueeze(-1)
    grads = torch.autograd.grad(out, (q, k, v, leaf), local["grad_out"])
    whole = [made.unshard(x.detach(), 2) for x in (out, *grads[:3])]
    return {"whole": whole, "sink": grads[3]}


def test_attention_sinks_are_written_with_lse():
    problem = Problem("padding", seq_len=70, heads="gqa", world_size=3)  # with rows that see nothing
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    results = run_ranks(partial(with_sinks, problem=problem, sinks=sinks), 3)

    q, k, v, grad_out, _ = (x.double() for x in problem.tensors.values())
    leaves = [x.requires_grad_() for x in (q, k, v, sinks.double())]
    b, h = torch.arange(2).view(2, 1, 1, 1), torch.arange(4).view(4, 1, 1)
    seen = problem.mask_mod(b, h, torch.arange(70)[:, None], torch.arange(70))
    scores = (q @ k.repeat_interleave(2, dim=1).mT / 4).masked_fill(~seen, -1e30)
    column = leaves[3][:, None, None].expand(2, 4, 70, 1)
    p = torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1]
    out = p @ v.repeat_interleave(2, dim=1)
    grads = torch.autograd.grad(out, leaves, grad_out)
    for result in results:
        for ours, dense in zip(result["whole"], (out, *grads[:3]), strict=True):
            torch.testing.assert_close(ours.double(), dense.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sum(r["sink"] for r in results).double(), grads[3], rtol=1e-4, atol=1e-5)


# -- a peer that is gone


def fail_in_the_second_exchange(group: dist.ProcessGroup) -> None:
    short = dist.new_group([0, 1], timeout=timedelta(seconds=patience(3)))
    made = cpflex.make_plan(cpflex.full(), SEQ_LEN, short, schedule=cpflex.ring)
    q = torch.randn(1, 1, made.local_len, 16)
    cpflex.flex_attention(q, q, q, block_mask=made)
    if group.rank() == 1:
        resolve(made.handle).links.exchange = out_of_memory
    cpflex.flex_attention(q, q, q, block_mask=made)


def out_of_memory(sends: object, receives: object) -> None:
    raise MemoryError("no memory for a message")


@pytest.mark.by_day(3)
def test_a_peer_that_fails_in_an_exchange_is_named_with_the_step_and_the_direction(two_processes: RankProcesses):
    waiting, failed = two_processes.outcomes(fail_in_the_second_exchange, timeout=30)
    assert isinstance(failed.error, MemoryError)
    assert isinstance(waiting.error, ConnectionError)
    assert "group rank 0: K/V of step 1 from group ranks [1] did not arrive" in str(waiting.error)
    assert "the message to group rank 1 failed" in str(waiting.error)


def leave_after_the_first_call(group: dist.ProcessGroup) -> str:
    short = dist.new_group([0, 1], timeout=timedelta(seconds=patience(4)))
    made = cpflex.make_plan(cpflex.full(), SEQ_LEN, short)
    q = torch.randn(1, 1, made.local_len, 16)
    for _ in range(2 - group.rank()):
        cpflex.flex_attention(q, q, q, block_mask=made)
    return "done"


@pytest.mark.by_day(4)
def test_a_peer_that_does_not_come_is_named(two_processes: RankProcesses):
    waiting, gone = two_processes.outcomes(leave_after_the_first_call, timeout=30)
    assert gone.result == "done"
    assert isinstance(waiting.error, ConnectionError)
    assert "group ranks [1] are gone or elsewhere" in str(waiting.error)
