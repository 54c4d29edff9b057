"""attend_backward for sm_90, in Gluon: one warpgroup copies by TMA while two others, of 64 rows each, keep the tensor
cores busy. Deterministic, in the two passes of `backward`: dQ by blocks of queries that walk over keys, dK and dV by
blocks of keys that walk over the queries of all heads of their group.

    producer    q0 o0, q1 o1, ..                                        o: grad_out
    consumer    k q0 and v o0 | p o0 | ds q0 | k q1 and v o1 | ..       p is made while v o is under way

Where a call allows another order of sums each time, dQ comes in the pass of dK and dV: the consumers give each other ds
in shared memory, make half of the columns of dQ each, and add them to fp32 by TMA. Five products instead of seven.

Where one consumer makes p or ds, the other has the tensor cores. Scores are [keys, queries] in the pass of dK and dV,
so that p and ds are operands as they come out of a product. The producer's threads bring lse and delta, which may begin
where no TMA copy could.

A block that is walked over may reach beyond the end of its run: p is 0 there, and multiplied by what the tensors hold,
which must be finite, as in a dense attention.
"""

# Gluon's stubs speak of values, device code of what the compiler makes of them
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from cpflex.kernels import backward, tuning
from cpflex.kernels.call import Call
from cpflex.kernels.captured import add_captured_gradients
from cpflex.kernels.hopper import (
    CONSUMERS,
    ROWS,
    add_out,
    barrier,
    blocks_of,
    copied,
    copy_in,
    decide,
    start,
    turned,
    with_strides,
)
from cpflex.kernels.launch import NOT_SPECIALIZED, on_device_of, padded
from cpflex.kernels.scores import modified, through_score_mod
from cpflex.kernels.work import (
    ITEM_FIELDS,
    advance,
    begin_walk,
    locate,
    work_of_consecutive_keys,
    work_of_consecutive_queries,
)
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
    """dk [B, H, K, D] and dv [B, H, K, Dv] of the visiting keys, in the dtype of dq. A pass that has no row in
    `tuning.GLUON` is that of `backward`, and so is that of captured tensors.

    Raises:
        RuntimeError: as `backward.attend_backward`.
    """
    assert all(x.is_contiguous() for x in (lse, delta, dq)), "they were made by the loop"
    q, k, v, grad_out = (with_strides(x) for x in (q, k, v, grad_out))
    if 0 in (q.shape[2], k.shape[2]):  # a tensor descriptor has at least one row
        if dq.dtype != torch.float32:
            dq.zero_()
        dk, dv = (torch.zeros_like(x, dtype=dq.dtype, memory_format=torch.contiguous_format) for x in (k, v))
        return dk, dv
    shared = backward.shared_arguments(q, k, v, grad_out, lse, delta, tile_mask)
    numbers = lse, delta
    with on_device_of(q):
        if call.wanted:
            add_captured_gradients(q, k, v, tile_mask, call, shared, d_captured)
        if is_in_one_pass(q, v, call):
            sums = dq if dq.dtype == torch.float32 else torch.zeros(dq.shape, dtype=torch.float32, device=dq.device)
            dk, dv = _dk_and_dv("onepass", q, k, v, grad_out, numbers, tile_mask, call, dq.dtype, sums)
            if sums is not dq:
                dq.copy_(sums)
            return dk, dv
        if tuning.is_served_by_gluon("dq", q, v, call.backend):
            _add_dq(q, k, v, grad_out, numbers, tile_mask, call, dq)
        else:
            backward.add_dq(q, k, v, tile_mask, call, shared, dq)
        if tuning.is_served_by_gluon("dkdv", q, v, call.backend):
            return _dk_and_dv("dkdv", q, k, v, grad_out, numbers, tile_mask, call, dq.dtype)
        return backward.dk_and_dv(q, k, v, grad_out, tile_mask, call, shared, dq.dtype)


def is_in_one_pass(q: Tensor, v: Tensor, call: Call) -> bool:
    """The call allows it, torch does, and there is a row."""
    if call.deterministic or torch.are_deterministic_algorithms_enabled():
        return False
    return tuning.is_served_by_gluon("onepass", q, v, call.backend)


def _add_dq(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    numbers: tuple[Tensor, Tensor],  # lse and delta
    tile_mask: TileMask,
    call: Call,
    dq: Tensor,
) -> None:
    config = tuning.GLUON[90, "dq", q.shape[3], v.shape[3]].config
    decided = decide("dq", q, k, v, call, config, ("HEAD_DIM", "DIM_COLS", "V_COLS"))
    work = work_of_consecutive_keys(tile_mask, *config.blocks[1:])
    num_items = work.num_busy if dq.dtype == torch.float32 else work.num_items  # written for all queries, too
    arguments = (
        *(blocks_of(q, ROWS.value), blocks_of(grad_out, ROWS.value)),
        *(blocks_of(k, config.walked), blocks_of(v, config.walked)),
        *(*numbers, dq, q.shape[2], tile_mask.q_positions, tile_mask.kv_positions),
        *(work.items, work.runs, num_items, *decided.heads, *decided.mods),
    )
    start(dq_kernel, num_items * q.shape[0] * q.shape[1], arguments, decided)


def _dk_and_dv(
    which: str,  # "dkdv", or "onepass", in which dq is added to
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    numbers: tuple[Tensor, Tensor],  # lse and delta
    tile_mask: TileMask,
    call: Call,
    dtype: torch.dtype,
    dq: Tensor | None = None,  # fp32
) -> tuple[Tensor, Tensor]:
    dk, dv = (torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format) for x in (k, v))
    config = tuning.GLUON[90, which, q.shape[3], v.shape[3]].config
    decided = decide(which, q, k, v, call, config, ("HEAD_DIM", "V_DIM", "DIM_COLS", "V_COLS"))
    _, block_kv, block_q = config.blocks
    work = work_of_consecutive_queries(tile_mask, block_kv, block_q, short_are_masked=dq is not None)
    dq_blocks = None if dq is None else blocks_of(dq, block_q, padded(dq.shape[3]) // CONSUMERS.value)
    arguments = (
        *(blocks_of(q, block_q), blocks_of(grad_out, block_q), blocks_of(k, block_kv), blocks_of(v, block_kv)),
        *(dq_blocks, *numbers, dk, dv, q.shape[2], k.shape[2], tile_mask.q_positions, tile_mask.kv_positions),
        *(work.items, work.runs, work.num_items, *decided.heads, *decided.mods),
    )
    start(dkdv_kernel, work.num_items * k.shape[0] * k.shape[1], arguments, decided)
    return dk, dv


# -- on the device


@gluon.jit
def indices(positions_ptr, first, end, offsets, MASKED: gl.constexpr):
    """Of tokens ``first + offsets`` of a run, whose positions follow each other."""
    if MASKED:  # a mod may look tokens up by position
        offsets = gl.minimum(offsets, end - first - 1)
    return gl.load(positions_ptr + first) + offsets


@gluon.jit
def probabilities(
    s, lse, inside, b, h, q_idx, kv_idx, scale,
    mask_mod: gl.constexpr, mask_numbers, mask_buffers, mask_sizes,
    score_mod: gl.constexpr, score_numbers, score_vjp: gl.constexpr, score_buffers, score_sizes, MASKED: gl.constexpr,
):  # fmt: skip
    """(p, its vjp) of products ``s``. The vjp of p, which is linear in it, times (dp - delta) is that of
    p * (dp - delta).
    """
    x, unit = modified(s, scale, b, h, q_idx, kv_idx, score_numbers, score_buffers, score_sizes, score_mod)
    x = x * unit - lse
    if MASKED:
        seen = inside & mask_mod(b, h, q_idx, kv_idx, mask_numbers, mask_buffers, mask_sizes)
        x = gl.where(seen, x, float("-inf"))
    p = gl.exp2(x)
    p_vjp = through_score_mod(p, s, scale, b, h, q_idx, kv_idx, score_numbers, score_buffers, score_sizes, score_vjp)
    if MASKED and score_vjp is not None:
        # hidden pairs have p = 0, and what a derivative that is not finite made of it
        p_vjp = gl.where(p != 0, p_vjp, 0.0)
    return p, p_vjp


# -- dq


@gluon.jit
def produce_keys(
    item_ptr, runs_ptr, b, h, kv_h, q_blocks, grad_out_blocks, k_blocks, v_blocks,
    q_rows, grad_out_rows, k_rows, v_rows, q_full, k_full, v_full, free,
    BLOCK_KV: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The queries and their gradients of out; then of each block K and V."""
    first = gl.load(item_ptr)
    for c in gl.static_range(CONSUMERS):
        mbarrier.expect(q_full.index(c), q_blocks.block_type.nbytes + grad_out_blocks.block_type.nbytes)
        copy_in(q_blocks, [b, h, first + c * ROWS, 0], q_full.index(c), q_rows.index(c))
        copy_in(grad_out_blocks, [b, h, first + c * ROWS, 0], q_full.index(c), grad_out_rows.index(c))
    buffer, phase = 0, 1  # a buffer that nobody has used is free
    for FULL in gl.static_range(2):
        first_run, end_run = gl.load(item_ptr + 2 + 3 * FULL), gl.load(item_ptr + 3 + 3 * FULL)
        kv, kv_end, next_run, next_kv, next_end = begin_walk(runs_ptr, first_run, end_run)
        for _ in range(gl.load(item_ptr + 4 + 3 * FULL)):
            mbarrier.wait(free.index(buffer), phase)
            copied(k_blocks, b, kv_h, kv, k_full.index(buffer), k_rows.index(buffer))
            copied(v_blocks, b, kv_h, kv, v_full.index(buffer), v_rows.index(buffer))
            buffer, phase = turned(buffer, phase, STAGES)
            kv, kv_end, next_run, next_kv, next_end, _anew = advance(
                kv, kv_end, next_run, next_kv, next_end, runs_ptr, first_run, end_run, BLOCK_KV
            )


@gluon.jit
def walk_keys(
    consumer: gl.constexpr, item_ptr, runs_ptr, b, h, head, q_rows, grad_out_rows, k_rows, v_rows,
    q_full, k_full, v_full, free, lse_ptr, delta_ptr, dq_ptr, q_len, q_positions_ptr, kv_positions_ptr, scale,
    mask_mod: gl.constexpr, mask_numbers, mask_buffers, mask_sizes,
    score_mod: gl.constexpr, score_numbers, score_vjp: gl.constexpr, score_buffers, score_sizes,
    HEAD_DIM: gl.constexpr, DIM_COLS: gl.constexpr, V_COLS: gl.constexpr, BLOCK_KV: gl.constexpr,
    STAGES: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """dq of 64 queries: of each block of keys q k and grad_out v, and ds k."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_KV, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM_COLS, 16])
    ds_layout: gl.constexpr = gl.DotOperandLayout(0, dq_layout, 2)
    first, end = gl.load(item_ptr) + consumer * ROWS, gl.load(item_ptr + 1)
    before = gl.cast(head, gl.int64) * q_len + first
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, s_layout))
    columns = gl.arange(0, BLOCK_KV, layout=gl.SliceLayout(0, s_layout))
    in_rows = rows < end - first
    q_idx = gl.expand_dims(gl.load(q_positions_ptr + first + rows, mask=in_rows, other=0), 1)
    lse = gl.expand_dims(gl.load(lse_ptr + before + rows, mask=in_rows, other=float("inf")), 1)
    delta = gl.expand_dims(gl.load(delta_ptr + before + rows, mask=in_rows, other=0.0), 1)
    dq = gl.full([ROWS, DIM_COLS], 0.0, gl.float32, layout=dq_layout)
    nothing = gl.full([ROWS, BLOCK_KV], 0.0, gl.float32, layout=s_layout)
    q = q_rows.index(consumer).reshape((ROWS, DIM_COLS))
    grad_out = grad_out_rows.index(consumer).reshape((ROWS, V_COLS))
    mbarrier.wait(q_full.index(consumer), 0)
    buffer, phase = 0, 0
    for FULL in gl.static_range(2):
        first_run, end_run = gl.load(item_ptr + 2 + 3 * FULL), gl.load(item_ptr + 3 + 3 * FULL)
        kv, kv_end, next_run, next_kv, next_end = begin_walk(runs_ptr, first_run, end_run)
        for _ in range(gl.load(item_ptr + 4 + 3 * FULL)):
            mbarrier.wait(k_full.index(buffer), phase)
            k = k_rows.index(buffer).reshape((BLOCK_KV, DIM_COLS))
            s = warpgroup_mma(q, k.permute((1, 0)), nothing, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(buffer), phase)
            v = v_rows.index(buffer).reshape((BLOCK_KV, V_COLS))
            dp = warpgroup_mma(grad_out, v.permute((1, 0)), nothing, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(1, deps=(s,))
            kv_idx = gl.expand_dims(indices(kv_positions_ptr, kv, kv_end, columns, FULL == 0), 0)
            _p, p_vjp = probabilities(
                s, lse, gl.expand_dims(columns < kv_end - kv, 0), b, h, q_idx, kv_idx, scale,
                mask_mod, mask_numbers, mask_buffers, mask_sizes,
                score_mod, score_numbers, score_vjp, score_buffers, score_sizes, FULL == 0,
            )  # fmt: skip
            dp = warpgroup_mma_wait(0, deps=(dp,))
            ds = gl.convert_layout((p_vjp * (dp - delta)).to(DTYPE), ds_layout)
            dq = warpgroup_mma_wait(0, deps=(warpgroup_mma(ds, k, dq, is_async=True),))
            mbarrier.arrive(free.index(buffer))
            buffer, phase = turned(buffer, phase, STAGES)
            if FULL == 0 or score_mod is not None:
                kv, kv_end, next_run, next_kv, next_end, _anew = advance(
                    kv, kv_end, next_run, next_kv, next_end, runs_ptr, first_run, end_run, BLOCK_KV
                )
    rows = gl.expand_dims(gl.arange(0, ROWS, layout=gl.SliceLayout(1, dq_layout)), 1)
    cols = gl.expand_dims(gl.arange(0, DIM_COLS, layout=gl.SliceLayout(0, dq_layout)), 0)
    at, inside = (before + rows) * HEAD_DIM + cols, (rows < end - first) & (cols < HEAD_DIM)
    total = dq * scale
    if dq_ptr.dtype.element_ty == gl.float32:
        total = total + gl.load(dq_ptr + at, mask=inside, other=0.0)
    gl.store(dq_ptr + at, total.to(dq_ptr.dtype.element_ty), mask=inside)


@gluon.jit(do_not_specialize=NOT_SPECIALIZED)
def dq_kernel(
    q_blocks,  # tensor descriptors of q [B, Hq, S, D], grad_out [B, Hq, S, Dv], k [B, H, K, D] and v [B, H, K, Dv]
    grad_out_blocks,
    k_blocks,
    v_blocks,
    lse_ptr,  # [B, Hq, S] fp32, base 2, inf for a query that sees no key; this and all below contiguous
    delta_ptr,  # [B, Hq, S] fp32
    dq_ptr,  # [B, Hq, S, D] fp32, added to; or of another dtype
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
    mask_mod: gl.constexpr,
    mask_numbers,
    mask_buffers,
    mask_sizes,
    score_mod: gl.constexpr,
    score_numbers,
    score_vjp: gl.constexpr,
    score_buffers,
    score_sizes,
    HEAD_DIM: gl.constexpr,
    DIM_COLS: gl.constexpr,
    V_COLS: gl.constexpr,
    BLOCK_KV: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    DTYPE: gl.constexpr = q_blocks.dtype
    q_rows = gl.allocate_shared_memory(DTYPE, [CONSUMERS] + q_blocks.block_type.shape, q_blocks.layout)
    grad_out_rows = gl.allocate_shared_memory(
        DTYPE, [CONSUMERS] + grad_out_blocks.block_type.shape, grad_out_blocks.layout
    )
    k_rows = gl.allocate_shared_memory(DTYPE, [STAGES] + k_blocks.block_type.shape, k_blocks.layout)
    v_rows = gl.allocate_shared_memory(DTYPE, [STAGES] + v_blocks.block_type.shape, v_blocks.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(free.index(i), count=CONSUMERS)

    item, head = locate(num_items, num_kv_heads, heads_at_once, group_size)
    item_ptr = items_ptr + item * ITEM_FIELDS
    b, h = head // num_heads, head % num_heads
    gl.warp_specialize(
        [
            (produce_keys, (
                item_ptr, runs_ptr, b, h, h // group_size, q_blocks, grad_out_blocks, k_blocks, v_blocks,
                q_rows, grad_out_rows, k_rows, v_rows, q_full, k_full, v_full, free,
                BLOCK_KV, STAGES,
            )),
            (walk_keys, (
                gl.constexpr(0), item_ptr, runs_ptr, b, h, head, q_rows, grad_out_rows, k_rows, v_rows,
                q_full, k_full, v_full, free,
                lse_ptr, delta_ptr, dq_ptr, q_len, q_positions_ptr, kv_positions_ptr, scale,
                mask_mod, mask_numbers, mask_buffers, mask_sizes,
                score_mod, score_numbers, score_vjp, score_buffers, score_sizes,
                HEAD_DIM, DIM_COLS, V_COLS, BLOCK_KV, STAGES, DTYPE,
            )),
            (walk_keys, (
                gl.constexpr(1), item_ptr, runs_ptr, b, h, head, q_rows, grad_out_rows, k_rows, v_rows,
                q_full, k_full, v_full, free,
                lse_ptr, delta_ptr, dq_ptr, q_len, q_positions_ptr, kv_positions_ptr, scale,
                mask_mod, mask_numbers, mask_buffers, mask_sizes,
                score_mod, score_numbers, score_vjp, score_buffers, score_sizes,
                HEAD_DIM, DIM_COLS, V_COLS, BLOCK_KV, STAGES, DTYPE,
            )),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )  # fmt: skip


# -- dk and dv


@gluon.jit
def produce_queries(
    item_ptr, runs_ptr, b, kv_h, num_heads, group_size, q_blocks, grad_out_blocks, k_blocks, v_blocks,
    q_rows, grad_out_rows, k_rows, v_rows, lse_rows, delta_rows, kv_full, q_full, grad_out_full, free,
    lse_ptr, delta_ptr, q_len, BLOCK_Q: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The keys and values; then of each block, of all heads of the group, q with lse and delta, and grad_out."""
    first = gl.load(item_ptr)
    mbarrier.expect(kv_full.index(0), k_blocks.block_type.nbytes + v_blocks.block_type.nbytes)
    copy_in(k_blocks, [b, kv_h, first, 0], kv_full.index(0), k_rows)
    copy_in(v_blocks, [b, kv_h, first, 0], kv_full.index(0), v_rows)
    rows = gl.arange(0, BLOCK_Q, layout=gl.BlockedLayout([1], [32], [4], [0]))
    buffer, phase = 0, 1  # a buffer that nobody has used is free
    for FULL in gl.static_range(2):
        first_run, end_run = gl.load(item_ptr + 2 + 3 * FULL), gl.load(item_ptr + 3 + 3 * FULL)
        at, at_end, next_run, next_at, next_end = begin_walk(runs_ptr, first_run, end_run)
        h = kv_h * group_size
        for _ in range(gl.load(item_ptr + 4 + 3 * FULL) * group_size):
            here, inside = gl.cast(b * num_heads + h, gl.int64) * q_len + at, rows < at_end - at
            lse = gl.load(lse_ptr + here + rows, mask=inside, other=float("inf"))
            delta = gl.load(delta_ptr + here + rows, mask=inside, other=0.0)
            mbarrier.wait(free.index(buffer), phase)
            copied(q_blocks, b, h, at, q_full.index(buffer), q_rows.index(buffer))
            lse_rows.index(buffer).store(lse)
            delta_rows.index(buffer).store(delta)
            mbarrier.arrive(q_full.index(buffer))
            copied(grad_out_blocks, b, h, at, grad_out_full.index(buffer), grad_out_rows.index(buffer))
            buffer, phase = turned(buffer, phase, STAGES)
            at, at_end, next_run, next_at, next_end, anew = advance(
                at, at_end, next_run, next_at, next_end, runs_ptr, first_run, end_run, BLOCK_Q
            )
            h += gl.where(anew, 1, 0)


@gluon.jit
def walk_queries(
    consumer: gl.constexpr, item_ptr, runs_ptr, b, kv_h, head, group_size,
    q_rows, grad_out_rows, k_rows, v_rows, lse_rows, delta_rows, kv_full, q_full, grad_out_full, free,
    dq_blocks, ds_rows, dq_rows, ds_full, dk_ptr, dv_ptr, kv_len, q_positions_ptr, kv_positions_ptr, scale,
    mask_mod: gl.constexpr, mask_numbers, mask_buffers, mask_sizes,
    score_mod: gl.constexpr, score_numbers, score_vjp: gl.constexpr, score_buffers, score_sizes,
    HEAD_DIM: gl.constexpr, V_DIM: gl.constexpr, DIM_COLS: gl.constexpr, V_COLS: gl.constexpr, BLOCK_Q: gl.constexpr,
    STAGES: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """dk and dv of 64 keys: of each block of queries k q and v grad_out, p grad_out and ds q. With ``dq_blocks``
    also ds k, over the keys of both consumers, for half of its columns.
    """
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_Q, 16])
    dk_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM_COLS, 16])
    dv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V_COLS, 16])
    ds_layout: gl.constexpr = gl.DotOperandLayout(0, dk_layout, 2)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, dv_layout, 2)
    columns_layout: gl.constexpr = gl.SliceLayout(0, s_layout)
    first, end = gl.load(item_ptr) + consumer * ROWS, gl.load(item_ptr + 1)
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, s_layout))
    columns = gl.arange(0, BLOCK_Q, layout=columns_layout)
    kv_idx = gl.expand_dims(gl.load(kv_positions_ptr + first + rows, mask=rows < end - first, other=0), 1)
    dk = gl.full([ROWS, DIM_COLS], 0.0, gl.float32, layout=dk_layout)
    dv = gl.full([ROWS, V_COLS], 0.0, gl.float32, layout=dv_layout)
    nothing = gl.full([ROWS, BLOCK_Q], 0.0, gl.float32, layout=s_layout)
    both_k = k_rows.reshape((CONSUMERS * ROWS, DIM_COLS))
    k = both_k.slice(consumer * ROWS, ROWS, 0)
    HALF: gl.constexpr = DIM_COLS // CONSUMERS
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    no_dq = gl.full([BLOCK_Q, HALF], 0.0, gl.float32, layout=dq_layout)
    turn, turn_phase = 0, 0
    v = v_rows.reshape((CONSUMERS * ROWS, V_COLS)).slice(consumer * ROWS, ROWS, 0)
    mbarrier.wait(kv_full.index(0), 0)
    buffer, phase = 0, 0
    for FULL in gl.static_range(2):
        first_run, end_run = gl.load(item_ptr + 2 + 3 * FULL), gl.load(item_ptr + 3 + 3 * FULL)
        at, at_end, next_run, next_at, next_end = begin_walk(runs_ptr, first_run, end_run)
        h = kv_h * group_size
        for _ in range(gl.load(item_ptr + 4 + 3 * FULL) * group_size):
            mbarrier.wait(q_full.index(buffer), phase)
            q = q_rows.index(buffer).reshape((BLOCK_Q, DIM_COLS))
            s = warpgroup_mma(k, q.permute((1, 0)), nothing, use_acc=False, is_async=True)
            mbarrier.wait(grad_out_full.index(buffer), phase)
            grad_out = grad_out_rows.index(buffer).reshape((BLOCK_Q, V_COLS))
            dp = warpgroup_mma(v, grad_out.permute((1, 0)), nothing, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(1, deps=(s,))
            lse = gl.expand_dims(lse_rows.index(buffer).load(columns_layout), 0)
            q_idx = gl.expand_dims(indices(q_positions_ptr, at, at_end, columns, FULL == 0), 0)
            inside = gl.expand_dims(columns < at_end - at, 0)
            if dq_blocks is not None:
                inside = inside & gl.expand_dims(rows < end - first, 1)
            p, p_vjp = probabilities(
                s, lse, inside, b, h, q_idx, kv_idx, scale,
                mask_mod, mask_numbers, mask_buffers, mask_sizes,
                score_mod, score_numbers, score_vjp, score_buffers, score_sizes, FULL == 0,
            )  # fmt: skip
            dp = warpgroup_mma_wait(0, deps=(dp,))
            delta = gl.expand_dims(delta_rows.index(buffer).load(columns_layout), 0)
            dv = warpgroup_mma(gl.convert_layout(p.to(DTYPE), p_layout), grad_out, dv, is_async=True)
            ds = (p_vjp * (dp - delta)).to(DTYPE)
            if dq_blocks is not None:
                # the other consumer is done with ds of the block before last: it has given that of the last, for which
                # this one waited
                ds_rows.index(turn).slice(consumer * ROWS, ROWS, 0).store(ds)
                fence_async_shared()
                mbarrier.arrive(ds_full.index(turn))
            dk = warpgroup_mma(gl.convert_layout(ds, ds_layout), q, dk, is_async=True)
            if dq_blocks is None:
                dv, dk = warpgroup_mma_wait(0, deps=(dv, dk))
                mbarrier.arrive(free.index(buffer))
            else:
                mbarrier.wait(ds_full.index(turn), turn_phase)
                both_ds, half_k = ds_rows.index(turn).permute((1, 0)), both_k.slice(consumer * HALF, HALF, 1)
                dq = warpgroup_mma(both_ds, half_k, no_dq, use_acc=False, is_async=True)
                dv, dk = warpgroup_mma_wait(1, deps=(dv, dk))
                mbarrier.arrive(free.index(buffer))
                tma.store_wait(0)
                dq = warpgroup_mma_wait(0, deps=(dq,))
                dq_rows.index(consumer).reshape((BLOCK_Q, HALF)).store(dq * scale)
                fence_async_shared()
                barrier()
                add_out(dq_blocks, [b, h, at, consumer * HALF], dq_rows.index(consumer))
                turn, turn_phase = turned(turn, turn_phase, 2)
            buffer, phase = turned(buffer, phase, STAGES)
            if FULL == 0 or score_mod is not None or dq_blocks is not None:
                at, at_end, next_run, next_at, next_end, anew = advance(
                    at, at_end, next_run, next_at, next_end, runs_ptr, first_run, end_run, BLOCK_Q
                )
                h += gl.where(anew, 1, 0)
    if dq_blocks is not None:
        tma.store_wait(0)
    at = gl.cast(head, gl.int64) * kv_len + first
    store_rows(dk_ptr, dk * scale, at, end - first, dk_layout, HEAD_DIM, DIM_COLS)
    store_rows(dv_ptr, dv, at, end - first, dv_layout, V_DIM, V_COLS)


@gluon.jit
def store_rows(ptr, block, first, num_rows, layout: gl.constexpr, DIM: gl.constexpr, COLS: gl.constexpr):
    rows = gl.expand_dims(gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout)), 1)
    cols = gl.expand_dims(gl.arange(0, COLS, layout=gl.SliceLayout(0, layout)), 0)
    inside = (rows < num_rows) & (cols < DIM)
    gl.store(ptr + (first + rows) * DIM + cols, block.to(ptr.dtype.element_ty), mask=inside)


@gluon.jit(do_not_specialize=[*NOT_SPECIALIZED, "kv_len"])
def dkdv_kernel(
    q_blocks,  # tensor descriptors of q [B, Hq, S, D], grad_out [B, Hq, S, Dv], k [B, H, K, D] and v [B, H, K, Dv]
    grad_out_blocks,
    k_blocks,
    v_blocks,
    dq_blocks,  # of dq [B, Hq, S, D], fp32, added to in no order; or None
    lse_ptr,  # [B, Hq, S] fp32, base 2, inf for a query that sees no key; this and all below contiguous
    delta_ptr,  # [B, Hq, S] fp32
    dk_ptr,  # [B, H, K, D]
    dv_ptr,  # [B, H, K, Dv]
    q_len,
    kv_len,
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
    mask_mod: gl.constexpr,
    mask_numbers,
    mask_buffers,
    mask_sizes,
    score_mod: gl.constexpr,
    score_numbers,
    score_vjp: gl.constexpr,
    score_buffers,
    score_sizes,
    HEAD_DIM: gl.constexpr,
    V_DIM: gl.constexpr,
    DIM_COLS: gl.constexpr,
    V_COLS: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    DTYPE: gl.constexpr = q_blocks.dtype
    k_rows = gl.allocate_shared_memory(DTYPE, k_blocks.block_type.shape, k_blocks.layout)
    v_rows = gl.allocate_shared_memory(DTYPE, v_blocks.block_type.shape, v_blocks.layout)
    q_rows = gl.allocate_shared_memory(DTYPE, [STAGES] + q_blocks.block_type.shape, q_blocks.layout)
    grad_out_rows = gl.allocate_shared_memory(
        DTYPE, [STAGES] + grad_out_blocks.block_type.shape, grad_out_blocks.layout
    )
    numbers_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    lse_rows = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_Q], numbers_layout)
    delta_rows = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_Q], numbers_layout)
    ds_rows, dq_rows, ds_full = None, None, None
    if dq_blocks is not None:
        ds_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
        ds_rows = gl.allocate_shared_memory(DTYPE, [2, CONSUMERS * ROWS, BLOCK_Q], ds_layout)
        dq_rows = gl.allocate_shared_memory(gl.float32, [CONSUMERS] + dq_blocks.block_type.shape, dq_blocks.layout)
        ds_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(2):
            mbarrier.init(ds_full.index(i), count=CONSUMERS)
    kv_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    grad_out_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_full.index(0), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=2)  # the copy, and the producer's stores
        mbarrier.init(grad_out_full.index(i), count=1)
        mbarrier.init(free.index(i), count=CONSUMERS)

    item, head = locate(num_items, num_kv_heads, heads_at_once, 1)
    item_ptr = items_ptr + item * ITEM_FIELDS
    heads_per_batch = num_heads // group_size
    b, kv_h = head // heads_per_batch, head % heads_per_batch
    gl.warp_specialize(
        [
            (produce_queries, (
                item_ptr, runs_ptr, b, kv_h, num_heads, group_size, q_blocks, grad_out_blocks, k_blocks, v_blocks,
                q_rows, grad_out_rows, k_rows, v_rows, lse_rows, delta_rows,
                kv_full, q_full, grad_out_full, free, lse_ptr, delta_ptr, q_len,
                BLOCK_Q, STAGES,
            )),
            (walk_queries, (
                gl.constexpr(0), item_ptr, runs_ptr, b, kv_h, head, group_size,
                q_rows, grad_out_rows, k_rows, v_rows, lse_rows, delta_rows,
                kv_full, q_full, grad_out_full, free, dq_blocks, ds_rows, dq_rows, ds_full,
                dk_ptr, dv_ptr, kv_len, q_positions_ptr, kv_positions_ptr, scale,
                mask_mod, mask_numbers, mask_buffers, mask_sizes,
                score_mod, score_numbers, score_vjp, score_buffers, score_sizes,
                HEAD_DIM, V_DIM, DIM_COLS, V_COLS, BLOCK_Q, STAGES, DTYPE,
            )),
            (walk_queries, (
                gl.constexpr(1), item_ptr, runs_ptr, b, kv_h, head, group_size,
                q_rows, grad_out_rows, k_rows, v_rows, lse_rows, delta_rows,
                kv_full, q_full, grad_out_full, free, dq_blocks, ds_rows, dq_rows, ds_full,
                dk_ptr, dv_ptr, kv_len, q_positions_ptr, kv_positions_ptr, scale,
                mask_mod, mask_numbers, mask_buffers, mask_sizes,
                score_mod, score_numbers, score_vjp, score_buffers, score_sizes,
                HEAD_DIM, V_DIM, DIM_COLS, V_COLS, BLOCK_Q, STAGES, DTYPE,
            )),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )  # fmt: skip
