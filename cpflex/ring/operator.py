"""The one operator of torch: ``cpflex::attention`` and its backward, opaque to autograd, checkpointing and the
compiler.

The plan crosses as a handle, the score_mod as the key of its graph and its captured tensors: twenty plans compile to
one graph.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from cpflex.kernels import Call
from cpflex.mods.graph import Mod
from cpflex.ring.backward import backward
from cpflex.ring.bound import Bound
from cpflex.ring.forward import forward
from cpflex.ring.handles import resolve
from cpflex.ring.schedule import Step
from cpflex.ring.transport import Pair, Transport
from cpflex.tile_mask import Idle

_score_mods: weakref.WeakValueDictionary[str, Mod] = weakref.WeakValueDictionary()


def intern_score_mod(mod: Mod) -> Mod:
    """Make a score_mod known to the operator by its key, for as long as the mod that this returns lives."""
    return _score_mods.setdefault(mod.key, mod)


def _without_autocast(compute: Callable[..., Any]) -> Callable[..., Any]:
    """The precision of each operation inside is chosen there; autocast would round what is kept in fp32."""

    @functools.wraps(compute)
    def run(first: Tensor, *rest: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return compute(first, *rest)

    return run


@torch.library.custom_op("cpflex::attention", mutates_args=())
@_without_autocast
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor],
    plan: Tensor,
    score_key: str,
    scale: float,
    backend: str,
    needs_grad: bool,
    wants_max: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, Hq, S_local, Dv] in q's dtype, lse and max_scores [B, Hq, S_local] fp32, the last only if ``wants_max``,
    else [0]. Exchanges K/V with the ranks of the plan's group.
    """
    bound: Bound = resolve(plan)
    bound.agree(_facts("forward", q, k, v, captured, score_key, scale, backend, needs_grad), q.device)
    call, steps, idle = _call(bound, captured, score_key, scale, backend, (), q.device, wants_max)
    k, v = (_without(x, idle.keys) for x in (k, v))
    with bound.in_words():
        return forward(q, v.shape[-1], call, Transport(bound.links, steps, Pair(k, v)))


@attention.register_fake
def _(q, k, v, captured, plan, score_key, scale, backend, needs_grad, wants_max):
    rows = q.shape[:-1]
    lse, max_scores = (q.new_empty(shape, dtype=torch.float32) for shape in (rows, rows if wants_max else (0,)))
    return q.new_empty(*rows, v.shape[-1]), lse, max_scores


@torch.library.custom_op("cpflex::attention_backward", mutates_args=())
@_without_autocast
def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    captured: Sequence[Tensor],
    plan: Tensor,
    score_key: str,
    scale: float,
    backend: str,
    wanted: Sequence[int],
) -> list[Tensor]:
    """[dq, dk, dv, *gradients of the captured tensors in the slots ``wanted``], each in the dtype of its tensor."""
    bound: Bound = resolve(plan)
    bound.agree(_facts("backward", q, k, v, captured, score_key, scale, backend, True), q.device)
    call, steps, idle = _call(bound, captured, score_key, scale, backend, tuple(wanted), q.device)
    k, v = (_without(x, idle.keys) for x in (k, v))
    q, grad_out, grad_lse = (_without(x, idle.queries) for x in (q, grad_out, grad_lse.unsqueeze(-1)))
    grad_lse = grad_lse.squeeze(-1)
    transport = Transport(bound.links, steps, Pair(k, v))
    with bound.in_words():
        dq, (dk, dv), d_captured = backward(grad_out, grad_lse, q, out, lse, call, transport)
    likes = [q, k, v, *(captured[slot] for slot in wanted)]
    return [grad.to(like.dtype) for grad, like in zip([dq, dk, dv, *d_captured], likes, strict=True)]


@attention_backward.register_fake
def _(grad_out, grad_lse, q, k, v, out, lse, captured, plan, score_key, scale, backend, wanted):
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, *(captured[i] for i in wanted))
    ]


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, captured, plan, score_key, scale, backend, *_ = inputs
    out, lse, max_scores = output
    ctx.mark_non_differentiable(max_scores)
    ctx.save_for_backward(q, k, v, out, lse, plan, *captured)
    ctx.score_key, ctx.scale, ctx.backend = score_key, scale, backend
    ctx.score_mod = _score_mods.get(score_key)  # alive until backward
    ctx.wanted = [slot for slot, tensor in enumerate(captured) if tensor.requires_grad]
    ctx.set_materialize_grads(True)


def _backward(ctx, grad_out: Tensor, grad_lse: Tensor, _: Tensor):
    q, k, v, out, lse, plan, *captured = ctx.saved_tensors
    dq, dk, dv, *d_captured = attention_backward(
        grad_out, grad_lse, q, k, v, out, lse, captured, plan, ctx.score_key, ctx.scale, ctx.backend, ctx.wanted
    )
    by_slot: list[Tensor | None] = [None] * len(captured)
    for slot, grad in zip(ctx.wanted, d_captured, strict=True):
        by_slot[slot] = grad
    return dq, dk, dv, by_slot, None, None, None, None, None, None


def _refuse_double_backward(ctx, *grads: Tensor):
    raise NotImplementedError("cpflex attention has no second derivative; do not use create_graph=True through it")


attention.register_autograd(_backward, setup_context=_setup_context)
attention_backward.register_autograd(_refuse_double_backward)


def _facts(
    direction: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor],
    score_key: str,
    scale: float,
    backend: str,
    needs_grad: bool,
) -> dict[str, Any]:
    """What all ranks must do alike in a call."""
    return {
        "direction": direction,
        "query": _signature(q),
        "key": _signature(k),
        "value": _signature(v),
        "score_mod": (score_key, *map(_signature, captured)),
        "scale": scale,
        "backend": backend,
        "whether gradients are needed": needs_grad,
        "device": q.device.type,
    }


def _call(
    bound: Bound,
    captured: Sequence[Tensor],
    score_key: str,
    scale: float,
    backend: str,
    wanted: tuple[int, ...],
    device: torch.device,
    wants_max: bool = False,
) -> tuple[Call, Sequence[Step], Idle]:
    mask, steps, idle = bound.on(device)
    score_graph = _score_mods[score_key].graph if score_key else None
    return Call(mask, scale, score_graph, tuple(captured), wanted, backend or None, wants_max), steps, idle


def _without(
    x: Tensor,  # [B, H or Hq, S_local, D]
    idle: Tensor,  # bool [1 or B, 1 or Hq, S_local], or [0]
) -> Tensor:
    """``x`` with zeros at idle tokens: what they hold, NaN included, reaches nothing."""
    if not idle.numel():
        return x
    if idle.shape[1] > x.shape[1]:  # a key is idle if it is so for all heads of its group
        idle = rearrange(idle, "b (h g) s -> b h g s", h=x.shape[1]).all(dim=2)
    return x.masked_fill(idle.unsqueeze(-1), 0.0)


def _signature(x: Tensor) -> tuple[str, tuple[int, ...]]:
    return str(x.dtype), tuple(x.shape)
