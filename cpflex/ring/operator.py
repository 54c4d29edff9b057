"""The one operator of torch: ``cpflex::attention`` and its backward, opaque to autograd, checkpointing and the
compiler.

The plan crosses as a handle, the score_mod as the key of its graph and its captured tensors: twenty plans compile to
one graph.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, wraps
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


TAGS = tuple(getattr(torch.Tag, name) for name in ("pt2_compliant_tag", "cudagraph_unsafe") if hasattr(torch.Tag, name))
"""A graph that is replayed would keep the tables of an old plan."""


def intern_score_mod(mod: Mod) -> Mod:
    """Make a score_mod known to the operator by its key, for as long as the mod that this returns lives."""
    return _score_mods.setdefault(mod.key, mod)


def _without_autocast(compute: Callable[..., Any]) -> Callable[..., Any]:
    """The precision of each operation inside is chosen there; autocast would round what is kept in fp32."""

    @wraps(compute)
    def run(first: Tensor, *rest: Any) -> Any:
        if not torch.is_autocast_enabled(first.device.type):
            return compute(first, *rest)
        with torch.autocast(first.device.type, enabled=False):
            return compute(first, *rest)

    return run


_library = torch.library.Library("cpflex", "DEF")

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
"""What the operators of torch run, by name."""


def _operator(compute: Callable[..., Any]) -> torch._ops.OpOverload:
    """``compute`` as an operator of torch, on any device. Its gradient is an autograd function of ours, `_Attention`:
    those that `torch.library.register_autograd` writes cost as much as the rest of a call.
    """
    name = compute.__name__
    IMPLEMENTATIONS[name] = compute
    _library.define(name + torch.library.infer_schema(compute, mutates_args=()), tags=TAGS)
    _library.impl(name, torch._disable_dynamo(compute), "CompositeExplicitAutograd")  # type: ignore[attr-defined]
    return getattr(torch.ops.cpflex, name).default


@_operator
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
    _refuse_capture(q.device)
    bound: Bound = resolve(plan)
    if bound.has_peers:
        bound.agree(_facts("forward", q, k, v, captured, score_key, scale, backend, needs_grad), q.device)
    call, steps, idle = _call(bound, captured, score_key, scale, backend, (), q.device, wants_max)
    after = None
    if needs_grad:
        wanted = tuple(slot for slot, x in enumerate(captured) if x.requires_grad)
        after = replace(call, wanted=wanted) if wanted else call
    k, v = (_without(x, idle.keys) for x in (k, v))
    with bound.in_words():
        transport = Transport(bound.links, steps, Pair(k, v))
        return forward(q, v.shape[-1], call, transport, after, partial(bound.settle, "forward"))


@torch.library.register_fake("cpflex::attention", lib=_library)
def _(q, k, v, captured, plan, score_key, scale, backend, needs_grad, wants_max):
    rows = q.shape[:-1]
    lse, max_scores = (q.new_empty(shape, dtype=torch.float32) for shape in (rows, rows if wants_max else (0,)))
    return q.new_empty(*rows, v.shape[-1]), lse, max_scores


@_operator
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
    _refuse_capture(q.device)
    bound: Bound = resolve(plan)
    if bound.has_peers:
        bound.agree(_facts("backward", q, k, v, captured, score_key, scale, backend, True), q.device)
    call, steps, idle = _call(bound, captured, score_key, scale, backend, tuple(wanted), q.device)
    k, v = (_without(x, idle.keys) for x in (k, v))
    if idle.queries.numel():
        q, grad_out, grad_lse = (_without(x, idle.queries) for x in (q, grad_out, grad_lse.unsqueeze(-1)))
        grad_lse = grad_lse.squeeze(-1)
    transport = Transport(bound.links, steps, Pair(k, v))
    with bound.in_words():
        dq, (dk, dv), d_captured = backward(
            grad_out, grad_lse, q, out, lse, call, transport, partial(bound.settle, "backward")
        )
    likes = [q, k, v, *(captured[slot] for slot in wanted)]
    return [grad.to(like.dtype) for grad, like in zip([dq, dk, dv, *d_captured], likes, strict=True)]


@torch.library.register_fake("cpflex::attention_backward", lib=_library)
def _(grad_out, grad_lse, q, k, v, out, lse, captured, plan, score_key, scale, backend, wanted):
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, *(captured[i] for i in wanted))
    ]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, plan, score_key, scale, backend, needs_grad, wants_max, *captured):
        with torch._C._AutoDispatchBelowAutograd():
            out, lse, max_scores = attention(q, k, v, captured, plan, score_key, scale, backend, needs_grad, wants_max)
        ctx.mark_non_differentiable(max_scores)
        ctx.save_for_backward(q, k, v, out, lse, plan, *captured)
        ctx.score_key, ctx.scale, ctx.backend = score_key, scale, backend
        ctx.score_mod = _score_mods.get(score_key)  # alive until backward
        ctx.wanted = [slot for slot, tensor in enumerate(captured) if tensor.requires_grad]
        ctx.set_materialize_grads(False)  # nothing is made for max_scores
        return out, lse, max_scores

    @staticmethod
    def backward(ctx, grad_out: Tensor | None, grad_lse: Tensor | None, _: None):  # type: ignore[override]
        q, k, v, out, lse, plan, *captured = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
        dq, dk, dv, *d_captured = attention_backward(
            grad_out, grad_lse, q, k, v, out, lse, captured, plan, ctx.score_key, ctx.scale, ctx.backend, ctx.wanted
        )
        by_slot: list[Tensor | None] = [None] * len(captured)
        for slot, grad in zip(ctx.wanted, d_captured, strict=True):
            by_slot[slot] = grad
        return dq, dk, dv, None, None, None, None, None, None, *by_slot


class _Backward(torch.autograd.Function):
    """A backward that is asked to be differentiable itself."""

    @staticmethod
    def forward(ctx, captured, rest, *tensors):
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(attention_backward(*tensors[:-1], captured, tensors[-1], *rest))

    @staticmethod
    def backward(ctx, *grads: Tensor):
        raise NotImplementedError("cpflex attention has no second derivative; do not use create_graph=True through it")


def _with_gradient(q, k, v, captured, *rest):
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *captured)):
        return _Attention.apply(q, k, v, *rest, *captured)
    with torch._C._AutoDispatchBelowAutograd():
        return attention(q, k, v, captured, *rest)


def _backward_with_gradient(*args):
    tensors, captured, plan, rest = args[:7], args[7], args[8], args[9:]
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*tensors, *captured)):
        return list(_Backward.apply(captured, rest, *tensors, plan))  # type: ignore[arg-type]
    with torch._C._AutoDispatchBelowAutograd():
        return attention_backward(*args)


_library.impl("attention", _with_gradient, "Autograd")
_library.impl("attention_backward", _backward_with_gradient, "Autograd")


def _refuse_capture(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "cpflex attention cannot be captured in a CUDA graph: a replay would keep the tables of this plan, and "
            "exchange nothing; capture what lies between the attentions"
        )


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
    steps, tables = bound.tables_on(device)
    kind = (device, score_key, scale, backend, wanted, wants_max)
    if (call := bound.decided.get(kind)) is None:
        score_graph = _score_mods[score_key].graph if score_key else None
        call = Call(
            *(tables.mask, scale, score_graph, _brought(captured, device), wanted, backend or None, wants_max),
            packed_mask=tables.packed_mask,
        )
        if not captured:
            bound.decided[kind] = call
    return call, steps, tables.idle


def _brought(captured: Sequence[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """The captured tensors on the device of q, copied once per call."""
    if any(x.device != device for x in captured):
        warnings.warn(
            f"a score_mod captures tensors on {sorted({str(x.device) for x in captured if x.device != device})}, and "
            f"query is on {device}: they are copied at every call, and the host waits; move them there first",
            stacklevel=2,
        )
    return tuple(x.to(device) for x in captured)


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
