"""attend as one fused kernel, generic in the mods (FlashAttention-2, arXiv:2307.08691, continued across steps).

A program owns a block of queries of one head. It walks over the PARTIAL keys, where the mask is evaluated, then over
the FULL ones, where there is none: two loops, because a branch inside would cost the software pipeline. Scores are in
base 2 inside, natural outside.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cpflex.kernels.call import Call, with_whole_rows
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
    LN2,
    LOG2E,
    add_product,
    load_piece,
    load_rows,
    load_vector,
    load_walked,
    modified,
    products,
    scaled,
    store_piece,
    zeros,
)
from cpflex.kernels.state import State
from cpflex.kernels.work import ITEM_FIELDS, advance, begin_walk, locate, work_by_query
from cpflex.tile_mask import TileMask

# B batch, Hq query heads, H heads of keys and values, S local queries, K visiting keys, D and Dv head dims

LOWEST = tl.constexpr(-3.4028234663852886e38)
"""The maximum of a query that has seen no key. It is finite, so that no step subtracts -inf from -inf."""


def attend(
    q: Tensor,  # [B, Hq, S, D]
    k: Tensor,  # [B, H, K, D]
    v: Tensor,  # [B, H, K, Dv]
    tile_mask: TileMask,
    call: Call,
    state: State,
) -> None:
    """Continue ``state`` with the visiting keys, in place."""
    _launch(q, k, v, tile_mask, call, state, None, None, None)


def attend_and_finish(
    q: Tensor,  # [B, Hq, S, D]
    k: Tensor,  # [B, H, K, D]
    v: Tensor,  # [B, H, K, Dv]
    tile_mask: TileMask,
    call: Call,
    state: State | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The last step, `attend` and `finish` in one pass; without a state it is also the first.

    Returns:
        out [B, Hq, S, Dv] in q's dtype, lse [B, Hq, S] fp32, natural log, and the largest scores [B, Hq, S] fp32, [0]
        unless the call wants them.
    """
    rows = q.shape[:-1]
    out = torch.empty(*rows, v.shape[-1], dtype=q.dtype, device=q.device)
    lse, max_scores = (
        torch.empty(shape, dtype=torch.float32, device=q.device) for shape in (rows, rows if call.wants_max else (0,))
    )
    _launch(q, k, v, tile_mask, call, state, out, lse, max_scores if call.wants_max else None)
    return out, lse, max_scores


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tile_mask: TileMask,
    call: Call,
    state: State | None,
    out: Tensor | None,
    lse: Tensor | None,
    max_scores: Tensor | None,
) -> None:
    q, k, v = with_whole_rows(q), with_whole_rows(k), with_whole_rows(v)
    decided = decide("forward", q, k, v, call)
    config = decided.config
    work = work_by_query(tile_mask, config.block_q, config.block_kv)
    num_items = work.num_busy if out is None else work.num_items  # out is written for queries that see no key, too
    carried = (None, None, None) if state is None else (state.acc, state.m, state.l)
    arguments = (
        *(q, k, v, *described(config, config.block_kv, k, v), *carried, out, lse, max_scores),
        *strides_in_units(q, k, v),
        *(q.shape[2], tile_mask.q_positions, tile_mask.kv_positions),
        *(work.items, work.runs, num_items, *decided.heads, *decided.mods),
    )
    with on_device_of(q):
        narrow = config.narrow and rows_are_near(q, k, v)
        start(attend_kernel, num_items * q.shape[0] * q.shape[1], arguments, decided, NARROW=narrow)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def attend_kernel(
    q_ptr,  # [B, Hq, S, D]
    k_ptr,  # [B, H, K, D]
    v_ptr,  # [B, H, K, Dv]
    k_blocks,  # tensor descriptors of k and v, or None
    v_blocks,
    acc_ptr,  # [B, Hq, S, Dv] fp32; this and all below contiguous; None in a first step that is also the last
    m_ptr,  # [B, Hq, S] fp32
    l_ptr,  # [B, Hq, S] fp32
    out_ptr,  # [B, Hq, S, Dv]; None if another step follows
    lse_ptr,  # [B, Hq, S] fp32
    max_ptr,  # [B, Hq, S] fp32; None if it is not wanted
    q_stride_b,
    q_stride_h,
    q_stride_s,
    k_stride_b,
    k_stride_h,
    k_stride_s,
    v_stride_b,
    v_stride_h,
    v_stride_s,
    UNIT: tl.constexpr,  # of the strides, in elements
    q_len,
    q_positions_ptr,
    kv_positions_ptr,
    items_ptr,
    runs_ptr,
    num_items,
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
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    DIM_COLS: tl.constexpr,
    V_COLS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    NARROW: tl.constexpr,  # offsets within a block are int32
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    item, head = locate(num_items, num_kv_heads, heads_at_once, group_size)
    item_ptr = items_ptr + item * ITEM_FIELDS
    first, end = tl.load(item_ptr), tl.load(item_ptr + 1)
    b, h = head // num_heads, head % num_heads
    kv_h = h // group_size
    batch, q_head, kv_head = b.to(tl.int64), h.to(tl.int64), kv_h.to(tl.int64)
    q_ptr += (batch * q_stride_b + q_head * q_stride_h) * UNIT
    k_ptr += (batch * k_stride_b + kv_head * k_stride_h) * UNIT
    v_ptr += (batch * v_stride_b + kv_head * v_stride_h) * UNIT
    q_stride_s *= UNIT
    k_stride_s *= UNIT
    v_stride_s *= UNIT

    q_idx = load_vector(q_positions_ptr, first, end, 0, BLOCK_Q, True)[:, None]
    q = load_rows(q_ptr, q_stride_s, first, end, HEAD_DIM, BLOCK_Q, DIM_COLS, True, NARROW)
    acc = zeros(BLOCK_Q, V_COLS)
    m = tl.full([BLOCK_Q], LOWEST, tl.float32)
    l = tl.zeros([BLOCK_Q], tl.float32)  # noqa: E741
    for FULL in tl.static_range(2):
        first_run, end_run = tl.load(item_ptr + 2 + 3 * FULL), tl.load(item_ptr + 3 + 3 * FULL)
        num_blocks = tl.load(item_ptr + 4 + 3 * FULL)
        kv, kv_end, next_run, next_kv, next_end = begin_walk(runs_ptr, first_run, end_run)
        for _ in range(num_blocks):
            # positions come first: a mask that looks tokens up by position needs them a stage before the rows, and
            # Triton fits the stage of the walk to the first line that reads it
            kv_idx = load_vector(kv_positions_ptr, kv, kv_end, 0, BLOCK_KV, FULL == 0)[None, :]
            k = load_walked(
                *(k_ptr, k_stride_s, k_blocks, b, kv_h, kv, kv_end),
                *(HEAD_DIM, BLOCK_KV, DIM_COLS, FULL == 0, NARROW),
            )
            s = products(q, k, INTERPRETED)
            s, unit = modified(s, scale, b, h, q_idx, kv_idx, score_numbers, score_buffers, score_sizes, score_mod)
            if FULL == 0:
                inside = (tl.arange(0, BLOCK_KV) < kv_end - kv)[None, :]
                seen = inside & mask_mod(b, h, q_idx, kv_idx, mask_numbers, mask_buffers, mask_sizes)
                s = tl.where(seen, s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1) * unit)
            p = tl.exp2(s * unit - m_new[:, None])
            decay = tl.exp2(m - m_new)
            v = load_walked(
                *(v_ptr, v_stride_s, v_blocks, b, kv_h, kv, kv_end),
                *(V_DIM, BLOCK_KV, V_COLS, FULL == 0, NARROW),
            )
            l = l * decay + tl.sum(p, 1)  # noqa: E741
            acc = add_product(p.to(v[0].dtype), v, scaled(acc, decay), INTERPRETED)
            m = m_new
            kv, kv_end, next_run, next_kv, next_end, _anew = advance(
                kv, kv_end, next_run, next_kv, next_end, runs_ptr, first_run, end_run, BLOCK_KV
            )

    # the state comes in only here: an accumulator that begins with loaded values serialises the tensor cores (ptxas
    # C7514)
    rows = tl.arange(0, BLOCK_Q)
    inside = rows < end - first
    at = head.to(tl.int64) * q_len + first + rows
    if acc_ptr is not None:
        m_old = tl.load(m_ptr + at, mask=inside, other=float("-inf")) * LOG2E
        m_new = tl.maximum(m, m_old)
        decay, decay_old = tl.exp2(m - m_new), tl.exp2(m_old - m_new)
        acc = scaled(acc, decay)
        l = l * decay + tl.load(l_ptr + at, mask=inside, other=0.0) * decay_old  # noqa: E741
        m = m_new
    saw_a_key = l != 0  # also true for NaN, which must not be hidden
    for i in tl.static_range(len(V_COLS)):
        total = acc[i]
        if acc_ptr is not None:  # a query that had seen no key has nothing to be read
            total += load_piece(acc_ptr, at, inside & (m_old > float("-inf")), i, V_DIM, V_COLS) * decay_old[:, None]
        if out_ptr is None:
            store_piece(acc_ptr, at, total, inside, i, V_DIM, V_COLS)
        else:
            store_piece(out_ptr, at, total / tl.where(saw_a_key, l, 1.0)[:, None], inside, i, V_DIM, V_COLS)
    if out_ptr is None:
        tl.store(m_ptr + at, tl.where(m > LOWEST, m * LN2, float("-inf")), mask=inside)
        tl.store(l_ptr + at, l, mask=inside)
    else:
        lse = tl.where(saw_a_key, (m + tl.log2(l)) * LN2, float("-inf"))
        tl.store(lse_ptr + at, lse, mask=inside)
        if max_ptr is not None:
            tl.store(max_ptr + at, tl.where(m > LOWEST, m * LN2, float("-inf")), mask=inside)
