"""One problem on all ranks of a group, threads or processes alike, put together again on global tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import cpflex
from cases import Problem
from oracle import Attention

NAN = float("nan")
TOKEN_TENSORS = ("out", "lse", "dq", "dk", "dv")


def attend_on_rank(
    group: Any, problem: Problem, tensors: dict[str, Tensor] | None = None, **options: Any
) -> dict[str, Any]:
    """Local results and their positions. Pads of every input hold NaN."""
    plan = problem.plan(group, **options)
    local = {
        name: plan.shard(x, dim=2, pad_value=NAN).requires_grad_(name in "qkv")
        for name, x in (tensors or problem.tensors).items()
    }
    captured = problem.captured()
    out, lse = cpflex.flex_attention(
        *(local[name] for name in "qkv"),
        score_mod=problem.score_mod(captured),
        block_mask=plan,
        enable_gqa=True,
        return_lse=True,
    )
    wanted = [x for x in captured if x.requires_grad]
    inputs = [local["q"], local["k"], local["v"], *wanted]
    dq, dk, dv, *d_captured = torch.autograd.grad((out, lse), inputs, (local["grad_out"], local["grad_lse"]))
    results = dict(zip(TOKEN_TENSORS, (x.detach() for x in (out, lse, dq, dk, dv)), strict=True))
    return results | {"d_captured": d_captured, "positions": plan.positions, "seq_len": plan.seq_len}


def assemble(results: Sequence[dict[str, Any]]) -> Attention:
    """Global results; gradients of captured tensors are summed over the ranks. Nothing may have come out at pads."""
    positions = torch.cat([r["positions"] for r in results])
    order = positions.argsort()
    assert positions[order].tolist() == list(range(len(positions))), "every position is held exactly once"
    seq_len = results[0]["seq_len"]
    whole = {name: torch.cat([r[name] for r in results], dim=2)[:, :, order] for name in TOKEN_TENSORS}
    for name, tensor in whole.items():
        at_pads = tensor[:, :, seq_len:]
        torch.testing.assert_close(at_pads, torch.full_like(at_pads, -torch.inf if name == "lse" else 0.0))
    summed = [torch.stack(parts).sum(dim=0) for parts in zip(*(r["d_captured"] for r in results), strict=True)]
    return Attention(**{name: tensor[:, :, :seq_len] for name, tensor in whole.items()}, d_captured=summed)
