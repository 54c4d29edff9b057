"""The kernels of a call, compiled before a rank sends anything: one that fails in the middle of a ring would leave the
others waiting.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cpflex.kernels import fitting
from cpflex.kernels.call import Call
from cpflex.kernels.combining import combine
from cpflex.kernels.decode import attend_pages
from cpflex.kernels.launch import generated, on_device_of
from cpflex.kernels.pages import PageWork, empty_partials
from cpflex.kernels.state import State
from cpflex.tile_mask import TileMask

# B batch, Hq query heads, H heads of keys and values, S local queries and keys, D and Dv head dims


def compile_call(
    forward: Any,  # the modules of its kernels
    backward: Any,
    q: Tensor,  # [B, Hq, S, D]
    k: Tensor,  # [B, H, S, D]
    v: Tensor,  # [B, H, S, Dv]
    tile_mask: TileMask,
    call: Call,
    passes: Sequence[str],
    gradients: torch.dtype | None,
) -> None:
    """`kernels.prepare`, for tensors of the shapes and dtypes of the call, whatever their strides."""
    kind = ("prepared", q.shape[3], v.shape[3], q.dtype, *passes, gradients)
    if kind in call.decided:
        return

    def unset(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    def compile_all() -> None:
        call.decided.clear()  # a row may have been found not to fit
        rows, state = q.shape[:-1], None
        if "attend" in passes:
            state = State(unset(*rows, v.shape[-1]), unset(*rows), unset(*rows))
            forward.attend(q, k, v, tile_mask, call, state)
        if "attend_and_finish" in passes:
            forward.attend_and_finish(q, k, v, tile_mask, call, state)
        if gradients is not None:
            grad_out, lse = unset(*rows, v.shape[-1], dtype=q.dtype), unset(*rows)
            dq, d_captured = unset(*q.shape, dtype=gradients), [unset(*call.captured[i].shape) for i in call.wanted]
            backward.attend_backward(q, k, v, grad_out, lse, lse, tile_mask, call, dq, d_captured)

    functions = (mod.function for mod in generated(call, backward=gradients is not None))
    with on_device_of(q):
        fitting.fit(
            (*kind, q.device, forward.__name__, backward.__name__, call.wanted, call.wants_max, *functions), compile_all
        )
    call.decided[kind] = True


def compile_pages(
    q: Tensor,  # [1, Hq, N, D]
    k: Tensor,  # [1, H, R, D]
    v: Tensor,  # [1, H, R, Dv]
    work: PageWork,
    call: Call,
    home_heads: int,
) -> None:
    """`kernels.prepare_pages`."""
    rows = q.shape[1] // k.shape[1] * work.max_tokens
    kind = ("prepared pages", rows, q.shape[1], home_heads, q.shape[3], v.shape[3], q.dtype)
    if kind in call.decided:
        return

    def compile_all() -> None:
        call.decided.clear()  # a row may have been found not to fit
        partials = empty_partials(work.num_partials, q.shape[1], v.shape[3], q.device)
        attend_pages(q, k, v, work, call, partials)
        parts = torch.zeros(1, 3, dtype=torch.int32, device=q.device)
        for heads in {q.shape[1], home_heads}:
            partials = empty_partials(1, heads, v.shape[3], q.device)
            for dtype in {torch.float32, q.dtype}:  # for a message, and at the end
                combine(partials, parts, partials._replace(out=torch.empty_like(partials.out, dtype=dtype)))

    functions = (mod.function for mod in generated(call, backward=False))
    with on_device_of(q):
        fitting.fit((*kind, q.device, *functions), compile_all)
    call.decided[kind] = True
