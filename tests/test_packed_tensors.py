"""[T, H, D]: packed tensors without a batch give what they give with one, bit for bit, and are not copied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask
from torch.utils.checkpoint import checkpoint

import cpflex
import cpflex.attention
from cpflex.testing import ThreadLinks, run_ranks

T, HEADS, KV_HEADS, DIM, V_DIM = 211, 4, 2, 16, 24
CU_SEQLENS = [0, 3, 90, 91, T]
BOTH = AuxRequest(lse=True, max_scores=True)
bias = torch.nn.Parameter(torch.randn(HEADS, generator=torch.Generator().manual_seed(0)))
SCORES = {"plain": None, "by head": cpflex.score_mod(lambda s, b, h, q, k: s + bias[h] * (q - k) + b)}
MASKS = {
    "documents": cpflex.causal() & cpflex.document(cu_seqlens=CU_SEQLENS),
    "by batch": lambda b, h, q, k: (k <= q) & ((k + h) % 3 != b),
}


def packed(plan: cpflex.Plan) -> list[Tensor]:
    """This rank's q, k, v [T_local, H, D]."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(T, HEADS, DIM), (T, KV_HEADS, DIM), (T, KV_HEADS, V_DIM)]
    return [plan.shard(torch.randn(shape, generator=generator), dim=0, pad_value=torch.nan) for shape in shapes]


def attend(plan: cpflex.Plan, tensors: list[Tensor], score: str) -> list[Tensor]:
    """[out, lse, max_scores, *gradients of q, k, v and the bias]."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, aux = cpflex.flex_attention(*leaves, SCORES[score], plan, enable_gqa=True, return_aux=BOTH)  # pyright: ignore
    wanted = [*leaves, *([bias] if SCORES[score] else [])]
    total = out.square().sum() + torch.where(aux.lse.isfinite(), aux.lse, 0.0).sum()
    return [out.detach(), aux.lse.detach(), aux.max_scores, *torch.autograd.grad(total, wanted)]


@pytest.mark.parametrize("ulysses_size", [1, 2])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("mask", MASKS)
def test_packed_tensors_give_what_a_batch_of_one_gives_bit_for_bit(mask: str, score: str, ulysses_size: int) -> None:
    def on_rank(group: ThreadLinks) -> None:
        sizes = {"batch_size": 1, "num_heads": HEADS, "ulysses_size": ulysses_size}
        plan = cpflex.make_plan(MASKS[mask], T, group, **sizes)
        tensors = packed(plan)
        with torch.autograd.set_multithreading_enabled(False):
            found = attend(plan, tensors, score)
            expected = attend(plan, [x.transpose(0, 1).unsqueeze(0) for x in tensors], score)
        shapes = [(plan.local_len, HEADS, V_DIM), (plan.local_len, HEADS), (plan.local_len, HEADS)]
        assert [x.shape for x in found[:3]] == shapes
        for ours, theirs in zip(found, expected, strict=True):
            theirs = theirs[0].transpose(0, 1) if theirs.ndim > 1 else theirs
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
        whole = plan.unshard(found[0], dim=0)
        assert whole.shape == (T, HEADS, V_DIM)
        assert whole.isfinite().all()

    run_ranks(on_rank, world_size=2)


def test_packed_tensors_are_not_copied_in_or_out(monkeypatch: pytest.MonkeyPatch) -> None:
    operator, seen = cpflex.attention.attention, {}

    def looked_at(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
        found = operator(q, k, v, *rest)
        seen["in"], seen["out"] = [x.data_ptr() for x in (q, k, v)], found[0].data_ptr()
        return found

    monkeypatch.setattr(cpflex.attention, "attention", looked_at)
    plan = cpflex.make_plan(MASKS["documents"], T)
    qkv = torch.randn(plan.local_len, 3, HEADS, DIM)
    q, k, v = qkv.unbind(dim=1)
    out = cpflex.flex_attention(q, k, v, block_mask=plan)
    assert isinstance(out, Tensor)
    assert seen == {"in": [x.data_ptr() for x in (q, k, v)], "out": out.data_ptr()}


def test_packed_tensors_are_checkpointed_and_compiled() -> None:
    plan = cpflex.make_plan(MASKS["documents"], T)
    q, k, v = (torch.randn(plan.local_len, HEADS, DIM, requires_grad=True) for _ in range(3))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = cpflex.flex_attention(q, k, v, block_mask=plan)
        assert isinstance(out, Tensor)
        return out

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(call(q, k, v).square().sum(), (q, k, v))
    for other in (lambda *x: checkpoint(call, *x, use_reentrant=False), compiled):
        out = other(q, k, v)
        assert isinstance(out, Tensor)
        assert out.shape == (plan.local_len, HEADS, DIM)
        torch.testing.assert_close(torch.autograd.grad(out.square().sum(), (q, k, v)), expected)


def test_a_torch_block_mask_takes_packed_tensors() -> None:
    block_mask = create_block_mask(cpflex.causal(), None, None, T, T, device="cpu")
    q, k, v = (torch.randn(T, HEADS, DIM) for _ in range(3))
    found = cpflex.flex_attention(q, k, v, block_mask=block_mask)
    expected = cpflex.flex_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), block_mask=block_mask)
    assert isinstance(found, Tensor)
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(found, expected[0].transpose(0, 1), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_packed_tensors_beside_others_are_refused_by_name_on_every_rank(name: str) -> None:
    def on_rank(group: ThreadLinks) -> str:
        plan = cpflex.make_plan(cpflex.causal(), T, group)
        tensors = {one: torch.randn(1, HEADS, plan.local_len, DIM) for one in ("query", "key", "value")}
        tensors[name] = tensors[name][0].transpose(0, 1)
        with pytest.raises(ValueError, match=rf"{name} must be \[B, H, S_local, D\], or \[T_local, H, D\] as") as error:
            cpflex.flex_attention(**tensors, block_mask=plan)
        return str(error.value)

    assert len(set(run_ranks(on_rank, world_size=2))) == 1


def test_packed_tensors_are_a_batch_of_one_to_a_plan() -> None:
    plan = cpflex.make_plan(MASKS["by batch"], T, batch_size=2, num_heads=HEADS)
    q, k, v = (torch.randn(plan.local_len, HEADS, DIM) for _ in range(3))
    with pytest.raises(ValueError, match="the plan was made for batch_size=2; query has batch size 1"):
        cpflex.flex_attention(q, k, v, block_mask=plan)
