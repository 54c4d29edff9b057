"""combine as one fused kernel: the softmax of each token over its partials, a block of them at a time."""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from cpflex.kernels import fitting
from cpflex.kernels.forward import LOWEST
from cpflex.kernels.launch import FUSED, on_device_of, padded
from cpflex.kernels.pages import Partials
from cpflex.kernels.scores import LN2, LOG2E

# N tokens, Hq heads, Dv head dim, P partials

PARTS_AT_ONCE = 16
"""Partials of a token that are loaded at once."""


def combine(
    partials: Partials,
    parts: Tensor,  # int32 [N, 3]
    into: Partials,
) -> Partials:
    """One partial of those of each token, in ``into``. The same partials give the same bits."""
    _, num_heads, v_dim = partials.out.shape
    # strides in units of 16 bytes, where they are whole ones: Triton loads as many at a time. By the heads, too: a row
    # of `partials_of` is a whole number of units if its heads are, and torch gives one row alone another stride
    strides = [x.stride(0) for x in (*partials, *into)]
    unit = math.gcd(4, v_dim, num_heads, partials.out.stride(0), into.out.stride(0))
    strides[0], strides[2] = strides[0] // unit, strides[2] // unit
    arguments: list[Any] = [*partials, *into, *strides, parts, num_heads]
    options: dict[str, Any] = {"UNIT": unit, "V_DIM": v_dim, "V_COLS": padded(v_dim), "PARTS": PARTS_AT_ONCE} | FUSED
    with on_device_of(partials.out):
        if fitting.is_looking():
            combine_kernel.warmup(*arguments, grid=(1,), **options)
        elif len(parts):
            combine_kernel[(len(parts) * num_heads,)](*arguments, **options)
    return into


@triton.jit(
    do_not_specialize=["out_stride", "lse_stride", "into_out_stride", "into_lse_stride", "num_heads"],
    do_not_specialize_on_alignment=["into_out_ptr", "into_lse_ptr"],  # rows of a message begin anywhere
)
def combine_kernel(
    out_ptr,  # [P, Hq, Dv] fp32
    lse_ptr,  # [P, Hq] fp32
    into_out_ptr,  # [N, Hq, Dv]
    into_lse_ptr,  # [N, Hq] fp32
    out_stride,
    lse_stride,
    into_out_stride,
    into_lse_stride,
    parts_ptr,  # int32 [N, 3]
    num_heads,
    UNIT: tl.constexpr,  # of the strides of out, in elements
    V_DIM: tl.constexpr,
    V_COLS: tl.constexpr,
    PARTS: tl.constexpr,
):
    row, h = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    first, stride = tl.load(parts_ptr + 3 * row), tl.load(parts_ptr + 3 * row + 1)
    count = tl.load(parts_ptr + 3 * row + 2)
    cols = tl.arange(0, V_COLS)
    total = tl.zeros([V_COLS], tl.float32)
    m, l = tl.full([], LOWEST, tl.float32), tl.zeros([], tl.float32)  # noqa: E741
    for begin in range(0, count, PARTS):
        i = begin + tl.arange(0, PARTS)
        at = first.to(tl.int64) + i.to(tl.int64) * stride
        lse = tl.load(lse_ptr + at * lse_stride + h, mask=i < count, other=float("-inf")) * LOG2E
        saw_a_key = lse != float("-inf")  # else its out may hold anything
        ptrs = out_ptr + (at * out_stride * UNIT + h * V_DIM)[:, None] + cols
        out = tl.load(ptrs, mask=saw_a_key[:, None] & (cols < V_DIM), other=0.0)
        m_new = tl.maximum(m, tl.max(lse, 0))
        weight, decay = tl.exp2(lse - m_new), tl.exp2(m - m_new)
        total = total * decay + tl.sum(out * weight[:, None], 0)
        l = l * decay + tl.sum(weight, 0)  # noqa: E741
        m = m_new
    ptrs = into_out_ptr + row.to(tl.int64) * into_out_stride * UNIT + h * V_DIM + cols
    tl.store(ptrs, (total / tl.where(l != 0, l, 1.0)).to(into_out_ptr.dtype.element_ty), mask=cols < V_DIM)
    tl.store(
        into_lse_ptr + row.to(tl.int64) * into_lse_stride + h,
        tl.where(l != 0, (m + tl.log2(l)) * LN2, float("-inf")),
    )
