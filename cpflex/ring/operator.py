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
from cpflex.ring.heads import summed
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
    deterministic: bool,
    needs_grad: bool,
    wants_max: bool,
    ulysses_size: int,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """out [B, Hq, S_local, Dv] in q's dtype, lse and max_scores [B, Hq, S_local] fp32, the last only if ``wants_max``,
    else [0]. Exchanges K/V with the ranks of the plan's group.

    The list is what backward takes instead of q, k, v, out and lse where heads were exchanged, if it is to follow: some
    heads of more tokens.
    """
    _refuse_capture(q.device)
    bound: Bound = resolve(plan)
    if bound.has_peers:
        bound.agree(
            _facts("forward", q, k, v, captured, score_key, scale, backend, deterministic, needs_grad), q.device
        )
    kv_heads = k.shape[1]
    if ulysses_size > 1:
        with bound.in_words():
            q, k, v = bound.heads.to_heads(q, k, v)
    call, steps, idle = _call(bound, captured, score_key, scale, backend, deterministic, (), q, wants_max)
    after = None
    if needs_grad:
        wanted = tuple(slot for slot, x in enumerate(captured) if x.requires_grad)
        after = replace(call, wanted=wanted) if wanted else call
    k, v = (_without(x, idle.keys) for x in (k, v))
    with bound.in_words():
        transport = Transport(bound.outer, steps, Pair(k, v), is_part=ulysses_size > kv_heads)
        settle = partial(bound.settle, "forward")
        out, lse, max_scores = forward(q, v.shape[-1], call, transport, after, settle)
        if ulysses_size == 1:
            return out, lse, max_scores, []
        kept = [q, k, v, out, lse] if needs_grad else []
        out, lse, *largest = bound.heads.to_tokens(*(out, lse, max_scores)[: 2 + wants_max])
        return out, lse, *(largest or [max_scores]), kept  # type: ignore[return-value]


@torch.library.register_fake("cpflex::attention", lib=_library)
def _(q, k, v, captured, plan, score_key, scale, backend, deterministic, needs_grad, wants_max, ulysses_size):
    def lse_and_out(rows: Sequence[int]) -> list[Tensor]:
        return [q.new_empty(*rows, v.shape[-1]), q.new_empty(rows, dtype=torch.float32)]

    rows = q.shape[:-1]
    max_scores = q.new_empty(rows if wants_max else (0,), dtype=torch.float32)
    kept = []
    if needs_grad and ulysses_size > 1:
        sizes = [(x.shape[0], max(1, x.shape[1] // ulysses_size), x.shape[2] * ulysses_size) for x in (q, k, v)]
        exchanged = [x.new_empty(*size, x.shape[3]) for x, size in zip((q, k, v), sizes, strict=True)]
        kept = exchanged + lse_and_out(sizes[0])
    return *lse_and_out(rows), max_scores, kept


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
    deterministic: bool,
    wanted: Sequence[int],
    ulysses_size: int,
    kv_heads: int,
) -> list[Tensor]:
    """[dq, dk, dv, *gradients of the captured tensors in the slots ``wanted``], each in the dtype of its tensor.

    Args:
        q, k, v, out, lse: as `attention` took and gave them, or as it kept them.
        kv_heads: those of k before heads were exchanged.
    """
    _refuse_capture(q.device)
    bound: Bound = resolve(plan)
    if bound.has_peers:
        bound.agree(_facts("backward", q, k, v, captured, score_key, scale, backend, deterministic, True), q.device)
    if ulysses_size > 1:
        with bound.in_words():
            grad_out, grad_lse = bound.heads.to_heads(grad_out, grad_lse)
    call, steps, idle = _call(bound, captured, score_key, scale, backend, deterministic, tuple(wanted), q)
    k, v = (_without(x, idle.keys) for x in (k, v))
    if idle.queries.numel():
        q, grad_out, grad_lse = (_without(x, idle.queries) for x in (q, grad_out, grad_lse.unsqueeze(-1)))
        grad_lse = grad_lse.squeeze(-1)
    is_part = ulysses_size > kv_heads
    transport = Transport(bound.outer, steps, Pair(k, v), is_part=is_part)
    with bound.in_words():
        settle = partial(bound.settle, "backward")
        dq, (dk, dv), d_captured = backward(grad_out, grad_lse, q, out, lse, call, transport, settle)
        if ulysses_size > 1:
            if not is_part:  # else they are summed before they are rounded
                dk, dv = dk.to(k.dtype), dv.to(v.dtype)
            dq, dk, dv = bound.heads.to_tokens(dq.to(q.dtype), dk, dv)
            dk, dv = summed(dk, kv_heads), summed(dv, kv_heads)
    likes = [q, k, v, *(captured[slot] for slot in wanted)]
    return [grad.to(like.dtype) for grad, like in zip([dq, dk, dv, *d_captured], likes, strict=True)]


@torch.library.register_fake("cpflex::attention_backward", lib=_library)
def _(
    grad_out,
    grad_lse,
    q,
    k,
    v,
    out,
    lse,
    captured,
    plan,
    score_key,
    scale,
    backend,
    deterministic,
    wanted,
    ulysses_size,
    kv_heads,
):
    batch, num_heads, length = grad_lse.shape
    kv_len = k.shape[2] // ulysses_size
    parts = ((q, num_heads, length), (k, kv_heads, kv_len), (v, kv_heads, kv_len))
    sizes = [(batch, heads, tokens, x.shape[3]) for x, heads, tokens in parts]
    grads = [x.new_empty(size) for x, size in zip((q, k, v), sizes, strict=True)]
    return grads + [torch.empty_like(captured[i], memory_format=torch.contiguous_format) for i in wanted]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, q, k, v, plan, score_key, scale, backend, deterministic, needs_grad, wants_max, ulysses_size, *captured
    ):
        with torch._C._AutoDispatchBelowAutograd():
            out, lse, max_scores, kept = attention(
                q, k, v, captured, plan, score_key, scale, backend, deterministic, needs_grad, wants_max, ulysses_size
            )
        ctx.mark_non_differentiable(max_scores)
        ctx.save_for_backward(*(kept or (q, k, v, out, lse)), plan, *captured)
        ctx.score_key, ctx.scale, ctx.backend, ctx.deterministic = score_key, scale, backend, deterministic
        ctx.ulysses_size, ctx.kv_heads = ulysses_size, k.shape[1]
        ctx.score_mod = _score_mods.get(score_key)  # alive until backward
        ctx.wanted = [slot for slot, tensor in enumerate(captured) if tensor.requires_grad]
        ctx.set_materialize_grads(False)  # nothing is made for max_scores
        return out, lse, max_scores

    @staticmethod
    def backward(ctx, grad_out: Tensor | None, grad_lse: Tensor | None, _: None):  # type: ignore[override]
        q, k, v, out, lse, plan, *captured = ctx.saved_tensors
        batch, heads, length = lse.shape
        rows = (batch, heads * ctx.ulysses_size, length // ctx.ulysses_size)
        grad_out = out.new_zeros(*rows, out.shape[3]) if grad_out is None else grad_out
        grad_lse = lse.new_zeros(rows) if grad_lse is None else grad_lse
        dq, dk, dv, *d_captured = attention_backward(
            *(grad_out, grad_lse, q, k, v, out, lse, captured, plan, ctx.score_key, ctx.scale, ctx.backend),
            *(ctx.deterministic, ctx.wanted, ctx.ulysses_size, ctx.kv_heads),
        )
        by_slot: list[Tensor | None] = [None] * len(captured)
        for slot, grad in zip(ctx.wanted, d_captured, strict=True):
            by_slot[slot] = grad
        return dq, dk, dv, *[None] * 8, *by_slot


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
        return *_Attention.apply(q, k, v, *rest, *captured), []  # type: ignore[misc]
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
    deterministic: bool,
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
        "whether it is deterministic": deterministic,
        "whether gradients are needed": needs_grad,
        "device": q.device.type,
    }


def _call(
    bound: Bound,
    captured: Sequence[Tensor],
    score_key: str,
    scale: float,
    backend: str,
    deterministic: bool,
    wanted: tuple[int, ...],
    q: Tensor,
    wants_max: bool = False,
) -> tuple[Call, Sequence[Step], Idle]:
    device, num_heads = q.device, q.shape[1]
    steps, tables = bound.tables_on(device)
    kind = (device, score_key, scale, backend, deterministic, wanted, wants_max, num_heads)
    if (call := bound.decided.get(kind)) is None:
        score_graph, brought = None, _brought(captured, device)
        if score_key:
            score_graph, brought = bound.heads.of_scores(_score_mods[score_key], brought, num_heads, device)
        call = Call(
            *(tables.mask, scale, score_graph, brought, wanted, backend or None, wants_max),
            packed_mask=tables.packed_mask,
            deterministic=deterministic,
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
