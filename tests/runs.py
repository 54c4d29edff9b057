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
    """Local results and their positions, of a plan made with ``options``. Pads of every input hold NaN."""
    plan = problem.plan(group, **options)
    return attend(plan, plan, problem, tensors)


def attend(
    plan: cpflex.Plan,
    keys: cpflex.Plan | None,
    problem: Any,
    tensors: dict[str, Tensor] | None = None,
    packed: bool = False,
) -> dict[str, Any]:
    """As `attend_on_rank`, with the plan that shards the keys, or None if this rank holds them all.

    Args:
        problem: has tensors, captured and score_mod.
        packed: give q, k and v as [T, H, D].
    """
    local = {
        name: (x.clone() if of is None else of.shard(x, dim=2, pad_value=NAN)).requires_grad_(name in "qkv")
        for name, x in (tensors or problem.tensors).items()
        for of in [keys if name in "kv" else plan]
    }
    captured = problem.captured()
    qkv = [local[name] for name in "qkv"]
    out, lse = cpflex.flex_attention(
        *([x.squeeze(0).transpose(0, 1) for x in qkv] if packed else qkv),
        score_mod=problem.score_mod(captured),
        block_mask=plan,
        enable_gqa=True,
        return_lse=True,
    )
    if packed:
        out, lse = (x.transpose(0, 1).unsqueeze(0) for x in (out, lse))
    inputs = [*qkv, *(x for x in captured if x.requires_grad)]
    dq, dk, dv, *d_captured = torch.autograd.grad((out, lse), inputs, (local["grad_out"], local["grad_lse"]))
    results = dict(zip(TOKEN_TENSORS, (x.detach() for x in (out, lse, dq, dk, dv)), strict=True))
    results |= {"d_captured": d_captured, "positions": plan.positions, "seq_len": plan.seq_len}
    results |= {"unproven": plan.stats["unproven_tiles"]}
    return results | {"kv_positions": None if keys is None else keys.positions, "kv_seq_len": plan.kv_seq_len}


def assemble(results: Sequence[dict[str, Any]]) -> Attention:
    """Global results; gradients of captured tensors, and of keys that all ranks hold, are summed over the ranks. Nothing
    may have come out at pads.
    """
    whole = {}
    for name in TOKEN_TENSORS:
        parts, axis = [r[name] for r in results], "kv_" if name in ("dk", "dv") else ""
        positions = [r.get(f"{axis}positions", r["positions"]) for r in results]
        length = results[0].get(f"{axis}seq_len", results[0]["seq_len"])
        joined = torch.stack(parts).sum(dim=0) if positions[0] is None else _in_order(parts, positions)
        at_pads = joined[:, :, length:]
        torch.testing.assert_close(at_pads, torch.full_like(at_pads, -torch.inf if name == "lse" else 0.0))
        whole[name] = joined[:, :, :length]
    summed = [torch.stack(parts).sum(dim=0) for parts in zip(*(r["d_captured"] for r in results), strict=True)]
    return Attention(**whole, d_captured=summed)


def _in_order(parts: Sequence[Tensor], positions: Sequence[Tensor]) -> Tensor:
    held = torch.cat(list(positions))
    order = held.argsort()
    assert held[order].tolist() == list(range(len(held))), "every position is held exactly once"
    return torch.cat(list(parts), dim=2)[:, :, order]
