"""What backward needs of each query besides its rows, in one pass: delta = rowsum(out * grad_out) - grad_lse, and lse
in base 2.

d lse enters as -delta does: ds = p * (dp - delta). The twin is `reference.begin_backward`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cpflex.kernels.launch import FUSED, on_device_of, padded, strides_of
from cpflex.kernels.scores import LOG2E

ELEMENTS = 4096
"""Of out, for each program: 32 a thread."""


def begin_backward(
    out: Tensor,  # [B, Hq, S, Dv]
    grad_out: Tensor,  # [B, Hq, S, Dv], any strides, 0 included
    grad_lse: Tensor,  # [B, Hq, S] fp32
    lse: Tensor,  # [B, Hq, S] fp32, natural log
) -> tuple[Tensor, Tensor]:
    """lse [B, Hq, S] in base 2, inf for a query that sees no key, so that its probabilities are exp2(score - inf) = 0;
    delta [B, Hq, S]; both fp32 and contiguous.
    """
    grad_lse, lse = grad_lse.contiguous(), lse.contiguous()
    lse2, delta = torch.empty_like(lse), torch.empty_like(lse)
    batch, heads, q_len, v_dim = out.shape
    cols = padded(v_dim)
    rows = ELEMENTS // cols
    with on_device_of(out):
        delta_kernel[(triton.cdiv(q_len, rows) * batch * heads,)](
            *(out, grad_out, grad_lse, lse, lse2, delta),
            *(*strides_of(out), out.stride(3), *strides_of(grad_out), grad_out.stride(3), heads, q_len),
            V_DIM=v_dim,
            V_COLS=cols,
            ROWS=rows,
            **FUSED,
        )
    return lse2, delta


@triton.jit(do_not_specialize=["num_heads", "q_len"])
def delta_kernel(
    out_ptr,  # [B, Hq, S, Dv]
    grad_out_ptr,  # [B, Hq, S, Dv]
    grad_lse_ptr,  # [B, Hq, S] fp32; this and all below contiguous
    lse_ptr,  # [B, Hq, S] fp32, natural log
    lse2_ptr,  # [B, Hq, S] fp32
    delta_ptr,  # [B, Hq, S] fp32
    out_stride_b,
    out_stride_h,
    out_stride_s,
    out_stride_d,
    grad_out_stride_b,
    grad_out_stride_h,
    grad_out_stride_s,
    grad_out_stride_d,
    num_heads,
    q_len,
    V_DIM: tl.constexpr,
    V_COLS: tl.constexpr,
    ROWS: tl.constexpr,
):
    num_blocks = tl.cdiv(q_len, ROWS)
    head = tl.program_id(0) // num_blocks
    first = tl.program_id(0) % num_blocks * ROWS
    b, h = (head // num_heads).to(tl.int64), (head % num_heads).to(tl.int64)
    rows = first + tl.arange(0, ROWS)
    inside = rows < q_len
    row, col = rows.to(tl.int64)[:, None], tl.arange(0, V_COLS)[None, :]
    seen = inside[:, None] & (col < V_DIM)
    out_ptr += b * out_stride_b + h * out_stride_h
    grad_out_ptr += b * grad_out_stride_b + h * grad_out_stride_h
    out = tl.load(out_ptr + row * out_stride_s + col * out_stride_d, mask=seen, other=0.0)
    grad_out = tl.load(grad_out_ptr + row * grad_out_stride_s + col * grad_out_stride_d, mask=seen, other=0.0)
    at = head.to(tl.int64) * q_len + rows
    delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), 1) - tl.load(grad_lse_ptr + at, mask=inside, other=0.0)
    lse = tl.load(lse_ptr + at, mask=inside, other=0.0)
    tl.store(delta_ptr + at, delta, mask=inside)
    tl.store(lse2_ptr + at, tl.where(lse == float("-inf"), float("inf"), lse * LOG2E), mask=inside)
