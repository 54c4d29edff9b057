"""attend_backward as fused kernels, deterministic: each gradient is summed by one program in a fixed order, nothing is
added atomically.

dQ by blocks of queries that walk over keys; dK and dV by blocks of keys that walk over the queries of all heads of
their group (the two passes of FlashAttention-2, arXiv:2307.08691, without its atomics). Scores are computed again in
each pass. Captured tensors take one more pass (captured.py) for each place where the score_mod reads one whose gradient
is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cpflex.kernels.call import Call, with_whole_rows
from cpflex.kernels.captured import add_captured_gradients
from cpflex.kernels.launch import (
    NOT_SPECIALIZED,
    decide,
    described,
    on_device_of,
    rows_are_near,
    start,
    strides_in_units,
)
from cpflex.kernels.scores import (
    add_product,
    load_piece,
    load_rows,
    load_vector,
    load_walked,
    modified,
    products,
    store_piece,
    through_score_mod,
    zeros,
)
from cpflex.kernels.work import ITEM_FIELDS, advance, begin_walk, locate, work_by_key, work_by_query
from cpflex.tile_mask import TileMask

# B batch, Hq query heads, H heads of keys and values, S local queries, K visiting keys, D and Dv head dims


def attend_backward(
    q: Tensor,  # [B, Hq, S, D]
    k: Tensor,  # [B, H, K, D]
    v: Tensor,  # [B, H, K, Dv]
    grad_out: Tensor,  # [B, Hq, S, Dv]
    lse: Tensor,  # [B, Hq, S] fp32, over the keys of all ranks, base 2, inf for a query that sees no key
    delta: Tensor,  # [B, Hq, S] fp32, rowsum(out * grad_out) - grad_lse
    tile_mask: TileMask,
    call: Call,
    dq: Tensor,  # [B, Hq, S, D] fp32, added to in place; or of another dtype, overwritten
    d_captured: list[Tensor],  # fp32, like call.captured at call.wanted, added to in place
) -> tuple[Tensor, Tensor]:
    """dk [B, H, K, D] and dv [B, H, K, Dv] of the visiting keys, in the dtype of dq.

    Raises:
        RuntimeError: torch wants deterministic algorithms, and the gradient of a captured tensor needs atomic
        additions.
    """
    assert all(x.is_contiguous() for x in (lse, delta, dq)), "they were made by the loop"
    q, k, v, grad_out = with_whole_rows(q), with_whole_rows(k), with_whole_rows(v), with_whole_rows(grad_out)
    shared = shared_arguments(q, k, v, grad_out, lse, delta, tile_mask)
    with on_device_of(q):
        if call.wanted:
            add_captured_gradients(q, k, v, tile_mask, call, shared, d_captured)
        add_dq(q, k, v, tile_mask, call, shared, dq)
        return dk_and_dv(q, k, v, grad_out, tile_mask, call, shared, dq.dtype)


def shared_arguments(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, lse: Tensor, delta: Tensor, tile_mask: TileMask
) -> tuple[Any, ...]:
    """The first arguments of all kernels, for tensors `with_whole_rows`."""
    positions = tile_mask.q_positions, tile_mask.kv_positions
    return q, k, v, grad_out, lse, delta, *strides_in_units(q, k, v, grad_out), q.shape[2], *positions


def add_dq(q: Tensor, k: Tensor, v: Tensor, tile_mask: TileMask, call: Call, shared: Sequence[Any], dq: Tensor) -> None:
    """The pass of dq alone, on the current device."""
    decided = decide("dq", q, k, v, call)
    config = decided.config
    work = work_by_query(tile_mask, config.block_q, config.block_kv)
    num_items = work.num_busy if dq.dtype == torch.float32 else work.num_items  # written for all queries, too
    arguments = (
        *(*shared, *decided.heads, *decided.mods, work.items, work.runs, num_items),
        *(*described(config, config.block_kv, k, v), dq),
    )
    narrow = config.narrow and rows_are_near(*shared[:4])  # with grad_out
    start(dq_kernel, num_items * q.shape[0] * q.shape[1], arguments, decided, NARROW=narrow)


def dk_and_dv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    tile_mask: TileMask,
    call: Call,
    shared: Sequence[Any],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The pass of dk and dv alone, on the current device."""
    dk, dv = (torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format) for x in (k, v))
    decided = decide("dkdv", q, k, v, call)
    config = decided.config
    work = work_by_key(tile_mask, config.block_kv, config.block_q)
    arguments = (
        *(*shared, *decided.heads, *decided.mods, work.items, work.runs, work.num_items),
        *(*described(config, config.block_q, q, grad_out), k.shape[2], dk, dv),
    )
    for part in ("dk", "dv") if config.apart else ("both",):
        start(dkdv_kernel, work.num_items * k.shape[0] * k.shape[1], arguments, decided, PART=part)
    return dk, dv


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def dq_kernel(
    q_ptr,  # [B, Hq, S, D]
    k_ptr,  # [B, H, K, D]
    v_ptr,  # [B, H, K, Dv]
    grad_out_ptr,  # [B, Hq, S, Dv]
    lse_ptr,  # [B, Hq, S] fp32, base 2, inf for a query that sees no key; this and all below contiguous
    delta_ptr,  # [B, Hq, S] fp32
    q_stride_b,
    q_stride_h,
    q_stride_s,
    k_stride_b,
    k_stride_h,
    k_stride_s,
    v_stride_b,
    v_stride_h,
    v_stride_s,
    grad_out_stride_b,
    grad_out_stride_h,
    grad_out_stride_s,
    UNIT: tl.constexpr,  # of the strides, in elements
    q_len,
    q_positions_ptr,
    kv_positions_ptr,
    num_heads,  # Hq
    num_kv_heads,  # B * H
    heads_at_once,
    group_size,  # Hq / H
    scale,
    mask_mod: tl.constexpr,
    mask_numbers,
    mask_buffers,
    mask_sizes,
    score_mod: tl.constexpr,
    score_numbers,
    score_vjp: tl.constexpr,
    score_buffers,
    score_sizes,
    items_ptr,
    runs_ptr,
    num_items,
    k_blocks,  # tensor descriptors of k and v, or None
    v_blocks,
    dq_ptr,  # [B, Hq, S, D] fp32, added to; or of another dtype
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    DIM_COLS: tl.constexpr,
    V_COLS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    NARROW: tl.constexpr,  # offsets within a block are int32; those of dkdv_kernel would spill
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    item, head = locate(num_items, num_kv_heads, heads_at_once, group_size)
    item_ptr = items_ptr + item * ITEM_FIELDS
    first, end = tl.load(item_ptr), tl.load(item_ptr + 1)
    b, h = head // num_heads, head % num_heads
    kv_h = h // group_size
    batch, q_head, kv_head = b.to(tl.int64), h.to(tl.int64), kv_h.to(tl.int64)
    before = head.to(tl.int64) * q_len  # queries of the heads before this one
    q_ptr += (batch * q_stride_b + q_head * q_stride_h) * UNIT
    k_ptr += (batch * k_stride_b + kv_head * k_stride_h) * UNIT
    v_ptr += (batch * v_stride_b + kv_head * v_stride_h) * UNIT
    grad_out_ptr += (batch * grad_out_stride_b + q_head * grad_out_stride_h) * UNIT
    q_stride_s *= UNIT
    k_stride_s *= UNIT
    v_stride_s *= UNIT
    grad_out_stride_s *= UNIT

    q_idx = load_vector(q_positions_ptr, first, end, 0, BLOCK_Q, True)[:, None]
    q = load_rows(q_ptr, q_stride_s, first, end, HEAD_DIM, BLOCK_Q, DIM_COLS, True, NARROW)
    grad_out = load_rows(grad_out_ptr, grad_out_stride_s, first, end, V_DIM, BLOCK_Q, V_COLS, True, NARROW)
    lse = load_vector(lse_ptr + before, first, end, float("inf"), BLOCK_Q, True)[:, None]
    delta = load_vector(delta_ptr + before, first, end, 0.0, BLOCK_Q, True)[:, None]
    dq = zeros(BLOCK_Q, DIM_COLS)
    for FULL in tl.static_range(2):
        first_run, end_run = tl.load(item_ptr + 2 + 3 * FULL), tl.load(item_ptr + 3 + 3 * FULL)
        num_blocks = tl.load(item_ptr + 4 + 3 * FULL)
        kv, kv_end, next_run, next_kv, next_end = begin_walk(runs_ptr, first_run, end_run)
        for _ in range(num_blocks):
            # positions come first, as in the forward kernel
            kv_idx = load_vector(kv_positions_ptr, kv, kv_end, 0, BLOCK_KV, FULL == 0)[None, :]
            k = load_walked(
                *(k_ptr, k_stride_s, k_blocks, b, kv_h, kv, kv_end),
                *(HEAD_DIM, BLOCK_KV, DIM_COLS, FULL == 0, NARROW),
            )
            v = load_walked(
                *(v_ptr, v_stride_s, v_blocks, b, kv_h, kv, kv_end),
                *(V_DIM, BLOCK_KV, V_COLS, FULL == 0, NARROW),
            )
            s = products(q, k, INTERPRETED)
            dp = products(grad_out, v, INTERPRETED)
            x, unit = modified(s, scale, b, h, q_idx, kv_idx, score_numbers, score_buffers, score_sizes, score_mod)
            ds = tl.exp2(x * unit - lse) * (dp - delta)
            ds = through_score_mod(
                ds, s, scale, b, h, q_idx, kv_idx, score_numbers, score_buffers, score_sizes, score_vjp
            )
            if FULL == 0:  # last of all: a derivative that is not finite at a hidden pair would turn its zero into NaN
                inside = (tl.arange(0, BLOCK_KV) < kv_end - kv)[None, :]
                seen = inside & mask_mod(b, h, q_idx, kv_idx, mask_numbers, mask_buffers, mask_sizes)
                ds = tl.where(seen, ds, 0.0)
            dq = add_product(ds.to(k[0].dtype), k, dq, INTERPRETED)
            kv, kv_end, next_run, next_kv, next_end, _anew = advance(
                kv, kv_end, next_run, next_kv, next_end, runs_ptr, first_run, end_run, BLOCK_KV
            )

    rows = tl.arange(0, BLOCK_Q)
    at, inside = before + first + rows, rows < end - first
    for i in tl.static_range(len(DIM_COLS)):
        total = dq[i] * scale
        if dq_ptr.dtype.element_ty == tl.float32:
            total += load_piece(dq_ptr, at, inside, i, HEAD_DIM, DIM_COLS)
        store_piece(dq_ptr, at, total, inside, i, HEAD_DIM, DIM_COLS)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def dkdv_kernel(
    q_ptr,  # [B, Hq, S, D]
    k_ptr,  # [B, H, K, D]
    v_ptr,  # [B, H, K, Dv]
    grad_out_ptr,  # [B, Hq, S, Dv]
    lse_ptr,  # [B, Hq, S] fp32, base 2, inf for a query that sees no key; this and all below contiguous
    delta_ptr,  # [B, Hq, S] fp32
    q_stride_b,
    q_stride_h,
    q_stride_s,
    k_stride_b,
    k_stride_h,
    k_stride_s,
    v_stride_b,
    v_stride_h,
    v_stride_s,
    grad_out_stride_b,
    grad_out_stride_h,
    grad_out_stride_s,
    UNIT: tl.constexpr,  # of the strides, in elements
    q_len,
    q_positions_ptr,
    kv_positions_ptr,
    num_heads,  # Hq
    num_kv_heads,  # B * H
    heads_at_once,
    group_size,  # Hq / H
    scale,
    mask_mod: tl.constexpr,
    mask_numbers,
    mask_buffers,
    mask_sizes,
    score_mod: tl.constexpr,
    score_numbers,
    score_vjp: tl.constexpr,
    score_buffers,
    score_sizes,
    items_ptr,
    runs_ptr,
    num_items,
    q_blocks,  # tensor descriptors of q and grad_out, or None
    grad_out_blocks,
    kv_len,
    dk_ptr,  # [B, H, K, D]
    dv_ptr,  # [B, H, K, Dv]
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    DIM_COLS: tl.constexpr,
    V_COLS: tl.constexpr,
    PART: tl.constexpr,  # dk, dv or both
    INTERPRETED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    item, head = locate(num_items, num_kv_heads, heads_at_once, 1)
    item_ptr = items_ptr + item * ITEM_FIELDS
    first, end = tl.load(item_ptr), tl.load(item_ptr + 1)
    heads_per_batch = num_heads // group_size
    b, kv_h = head // heads_per_batch, head % heads_per_batch
    batch, kv_head = b.to(tl.int64), kv_h.to(tl.int64)
    k_ptr += (batch * k_stride_b + kv_head * k_stride_h) * UNIT
    v_ptr += (batch * v_stride_b + kv_head * v_stride_h) * UNIT
    q_ptr += batch * q_stride_b * UNIT
    grad_out_ptr += batch * grad_out_stride_b * UNIT
    q_stride_s *= UNIT
    k_stride_s *= UNIT
    v_stride_s *= UNIT
    grad_out_stride_s *= UNIT

    # scores are [keys, queries] here: their products with grad_out and q then take them as they come out of the tensor
    # cores
    kv_idx = load_vector(kv_positions_ptr, first, end, 0, BLOCK_KV, True)[:, None]
    k = load_rows(k_ptr, k_stride_s, first, end, HEAD_DIM, BLOCK_KV, DIM_COLS, True)
    if PART != "dv":
        v = load_rows(v_ptr, v_stride_s, first, end, V_DIM, BLOCK_KV, V_COLS, True)
    dk, dv = zeros(BLOCK_KV, DIM_COLS), zeros(BLOCK_KV, V_COLS)
    for FULL in tl.static_range(2):
        first_run, end_run = tl.load(item_ptr + 2 + 3 * FULL), tl.load(item_ptr + 3 + 3 * FULL)
        num_blocks = tl.load(item_ptr + 4 + 3 * FULL)
        at, at_end, next_run, next_at, next_end = begin_walk(runs_ptr, first_run, end_run)
        h = kv_h * group_size
        # one loop for all heads of the group: where the walk begins anew the next head begins, and the pipeline never
        # drains
        for _ in range(num_blocks * group_size):
            # positions come first, as in the forward kernel
            q_idx = load_vector(q_positions_ptr, at, at_end, 0, BLOCK_Q, FULL == 0)[None, :]
            q_head = h.to(tl.int64)
            before = (batch * num_heads + q_head) * q_len  # queries of the heads before this one
            q_rows = q_ptr + q_head * q_stride_h * UNIT
            q = load_walked(q_rows, q_stride_s, q_blocks, b, h, at, at_end, HEAD_DIM, BLOCK_Q, DIM_COLS, FULL == 0)
            # in an order that holds few blocks at once: 128 keys of 128 dims leave 95 registers beside dk and dv
            s = products(k, q, INTERPRETED)
            x, unit = modified(s, scale, b, h, q_idx, kv_idx, score_numbers, score_buffers, score_sizes, score_mod)
            lse = load_vector(lse_ptr + before, at, at_end, float("inf"), BLOCK_Q, FULL == 0)[None, :]
            x = x * unit - lse
            if FULL == 0:
                inside = (tl.arange(0, BLOCK_Q) < at_end - at)[None, :]
                seen = inside & mask_mod(b, h, q_idx, kv_idx, mask_numbers, mask_buffers, mask_sizes)
                x = tl.where(seen, x, float("-inf"))
            p = tl.exp2(x)
            if PART != "dv":
                # the vjp of p, which is linear in it, times (dp - delta) is the vjp of p * (dp - delta): s ends here
                p_vjp = through_score_mod(
                    p, s, scale, b, h, q_idx, kv_idx, score_numbers, score_buffers, score_sizes, score_vjp
                )
                if FULL == 0 and score_vjp is not None:
                    # hidden pairs have p = 0, and what a derivative that is not finite made of it
                    p_vjp = tl.where(p != 0, p_vjp, 0.0)
            grad_out_rows = grad_out_ptr + q_head * grad_out_stride_h * UNIT
            grad_out = load_walked(
                *(grad_out_rows, grad_out_stride_s, grad_out_blocks, b, h, at, at_end),
                *(V_DIM, BLOCK_Q, V_COLS, FULL == 0),
            )
            if PART == "dv":
                dv = add_product(p.to(grad_out[0].dtype), grad_out, dv, INTERPRETED)
            else:
                # before dv: a product that begins while dv is under way would, with its zeros, serialise both (ptxas
                # C7515)
                dp = products(v, grad_out, INTERPRETED)
                if PART == "both":
                    dv = add_product(p.to(grad_out[0].dtype), grad_out, dv, INTERPRETED)
                delta = load_vector(delta_ptr + before, at, at_end, 0.0, BLOCK_Q, FULL == 0)[None, :]
                ds = p_vjp * (dp - delta)
                dk = add_product(ds.to(q[0].dtype), q, dk, INTERPRETED)
            at, at_end, next_run, next_at, next_end, anew = advance(
                at, at_end, next_run, next_at, next_end, runs_ptr, first_run, end_run, BLOCK_Q
            )
            h += anew.to(tl.int32)

    rows = tl.arange(0, BLOCK_KV)
    at, inside = head.to(tl.int64) * kv_len + first + rows, rows < end - first
    if PART != "dv":
        for i in tl.static_range(len(DIM_COLS)):
            store_piece(dk_ptr, at, dk[i] * scale, inside, i, HEAD_DIM, DIM_COLS)
    if PART != "dk":
        for i in tl.static_range(len(V_COLS)):
            store_piece(dv_ptr, at, dv[i], inside, i, V_DIM, V_COLS)
