"""Steps that another library finishes: its out and lse over the keys of a step are merged into the state.

A step without pairs calls no kernel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from cpflex.kernels import reference
from cpflex.kernels.call import Call
from cpflex.kernels.state import State, empty, finish
from cpflex.tile_mask import TileMask

# B batch, Hq query heads, H heads of keys and values, S local queries, K visiting keys, D and Dv head dims

Step = Callable[[Tensor, Tensor, Tensor, TileMask, Call], tuple[Tensor, Tensor]]
"""q, k, v, the tile mask and the call give out [B, Hq, S, Dv] in q's dtype and lse [B, Hq, S] fp32, natural log."""


def attend_by(step: Step, q: Tensor, k: Tensor, v: Tensor, tile_mask: TileMask, call: Call, state: State) -> None:
    """`attend`, by a library's step."""
    if tile_mask.num_tiles:
        merge(state, *step(q, k, v, tile_mask, call))


def attend_and_finish_by(
    step: Step, q: Tensor, k: Tensor, v: Tensor, tile_mask: TileMask, call: Call, state: State | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`attend_and_finish`, by a library's step; without a state, out is as its kernel wrote it. [0] stands in place of
    the largest scores.
    """
    none = q.new_empty(0, dtype=torch.float32)
    if state is None and tile_mask.num_tiles:
        return *step(q, k, v, tile_mask, call), none
    state = empty(q, v.shape[-1]) if state is None else state
    attend_by(step, q, k, v, tile_mask, call, state)
    return *finish(state, q.dtype), none


def merge(
    state: State,
    out: Tensor,  # [B, Hq, S, Dv]
    lse: Tensor,  # [B, Hq, S] fp32, natural log; -inf for a query that saw no key, with 0 in out
) -> None:
    """A finished attention to other keys, into ``state``, in place: as a softmax whose m is lse and whose l is 1."""
    m = torch.maximum(state.m, lse)
    base = m.masked_fill(m == -torch.inf, 0.0)
    decay, weight = (state.m - base).exp_(), (lse - base).exp_()
    state.acc.mul_(decay.unsqueeze(-1)).addcmul_(out.float(), weight.unsqueeze(-1))
    state.l.mul_(decay).add_(weight)
    state.m.copy_(m)


def begin_backward(
    out: Tensor,  # [B, Hq, S, Dv]
    grad_out: Tensor,  # [B, Hq, S, Dv]
    grad_lse: Tensor,  # [B, Hq, S] fp32
    lse: Tensor,  # [B, Hq, S] fp32
) -> tuple[Tensor, Tensor]:
    """lse as it is, contiguous, and delta [B, Hq, S] fp32."""
    if out.is_cuda:
        from cpflex.kernels import delta

        return lse.contiguous(), delta.begin_backward(out, grad_out, grad_lse, lse)[1]
    lse, delta_of_rows = reference.begin_backward(out, grad_out, grad_lse, lse)
    return lse.contiguous(), delta_of_rows


def no_gradients(k: Tensor, v: Tensor, dq: Tensor) -> tuple[Tensor, Tensor]:
    """dk and dv of a step without pairs; a dq that is not fp32 is that of an only step."""
    if dq.dtype != torch.float32:
        dq.zero_()
    return k.new_zeros(k.shape, dtype=dq.dtype), v.new_zeros(v.shape, dtype=dq.dtype)


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Kernels are launched on the current CUDA device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
