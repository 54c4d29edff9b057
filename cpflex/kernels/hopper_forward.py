"""attend for sm_90, in Gluon: one warpgroup copies by TMA while two others, of 64 queries each, keep the tensor cores
busy (FlashAttention-3, arXiv:2407.08608). The tables, mods, state and results are those of `forward`.

    producer    K0  K1 V0  K2 V1  ..          each as soon as its buffer is free
    consumer    q K0 | q K1, p0 V0 | q K2, p1 V1 | ..
                     softmax 0   softmax 1     ..  while p v of the block before is under way

A block of keys is one TMA copy, so it may reach beyond the end of its run: those scores are hidden, and what V holds
there is multiplied by 0. As in a dense attention, it must be finite.
"""

# Gluon's stubs speak of values, device code of what the compiler makes of them
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from cpflex.kernels import tuning
from cpflex.kernels.call import Call
from cpflex.kernels.hopper import CONSUMERS, ROWS, barrier, blocks_of, copied, decide, start, turned, with_strides
from cpflex.kernels.launch import NOT_SPECIALIZED, on_device_of
from cpflex.kernels.state import State
from cpflex.kernels.work import ITEM_FIELDS, Work, advance, begin_walk, locate, work_of_consecutive_keys
from cpflex.tile_mask import TileMask

# B batch, Hq query heads, H heads of keys and values, S local queries, K visiting keys, D and Dv head dims

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
LOWEST = gl.constexpr(-3.4028234663852886e38)


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
    """The last step, `attend` and `finish` in one pass; without a state it is also the first. What is returned is as
    in `forward`.
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
    config = tuning.GLUON[90, "forward", q.shape[3], v.shape[3]].config
    kv_positions = tile_mask.kv_positions
    if k.shape[2] == 0:  # a tensor descriptor has at least one row; nobody sees this one
        k, v = (x.new_zeros(*x.shape[:2], 1, x.shape[3]) for x in (k, v))
        kv_positions = torch.zeros(1, dtype=torch.int32, device=k.device)
    q, k, v = (with_strides(x) for x in (q, k, v))
    decided = decide("forward", q, k, v, call, config, ("V_DIM", "DIM_COLS", "V_COLS"))
    work: Work = work_of_consecutive_keys(tile_mask, *config.blocks[1:])
    num_items = work.num_busy if out is None else work.num_items  # out is written for queries that see no key, too
    carried = (None, None, None) if state is None else (state.acc, state.m, state.l)
    arguments = (
        *(blocks_of(q, ROWS.value), blocks_of(k, config.block_kv), blocks_of(v, config.block_kv)),
        *(*carried, out, lse, max_scores, q.shape[2], k.shape[2], tile_mask.q_positions, kv_positions),
        *(work.items, work.runs, num_items, *decided.heads, *decided.mods),
    )
    with on_device_of(q):
        start(attend_kernel, num_items * q.shape[0] * q.shape[1], arguments, decided)


# -- on the device


@gluon.jit
def first_block(item_ptr, kv, kv_end, kv_len, FULL: gl.constexpr):
    """(blocks of a walk, start and end of its first run). An item that sees nothing has one block of keys behind the
    last: TMA fills in zeros, and all are hidden. So no program is without a block.
    """
    num_masked, num_full = gl.load(item_ptr + 4), gl.load(item_ptr + 7)
    if FULL == 0:
        idle = num_masked + num_full == 0
        found = gl.where(idle, 1, num_masked), gl.where(idle, kv_len, kv), gl.where(idle, kv_len, kv_end)
    else:
        found = num_full, kv, kv_end
    return found


@gluon.jit
def produce(
    item_ptr, runs_ptr, kv_len, b, h, kv_h, q_blocks, k_blocks, v_blocks, q_rows, k_rows, v_rows,
    q_full, k_full, k_free, v_full, v_free,
    BLOCK_KV: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
):  # fmt: skip
    """The queries; then of each block K, and V of the block before: V is needed a block later."""
    first = gl.load(item_ptr)
    for c in gl.static_range(CONSUMERS):
        copied(q_blocks, b, h, first + c * ROWS, q_full.index(c), q_rows.index(c))
    k_at, k_phase, v_at, v_phase = 0, 1, 0, 1  # a buffer that nobody has used is free
    before = -1
    for FULL in gl.static_range(2):
        first_run, end_run = gl.load(item_ptr + 2 + 3 * FULL), gl.load(item_ptr + 3 + 3 * FULL)
        kv, kv_end, next_run, next_kv, next_end = begin_walk(runs_ptr, first_run, end_run)
        num_blocks, kv, kv_end = first_block(item_ptr, kv, kv_end, kv_len, FULL)
        for _ in range(num_blocks):
            mbarrier.wait(k_free.index(k_at), k_phase)
            copied(k_blocks, b, kv_h, kv, k_full.index(k_at), k_rows.index(k_at))
            k_at, k_phase = turned(k_at, k_phase, K_STAGES)
            if before >= 0:
                mbarrier.wait(v_free.index(v_at), v_phase)
                copied(v_blocks, b, kv_h, before, v_full.index(v_at), v_rows.index(v_at))
                v_at, v_phase = turned(v_at, v_phase, V_STAGES)
            before = kv
            kv, kv_end, next_run, next_kv, next_end, _anew = advance(
                kv, kv_end, next_run, next_kv, next_end, runs_ptr, first_run, end_run, BLOCK_KV
            )
    mbarrier.wait(v_free.index(v_at), v_phase)
    copied(v_blocks, b, kv_h, before, v_full.index(v_at), v_rows.index(v_at))


@gluon.jit
def packed(p, dtype: gl.constexpr):
    """p [M, N] rounded to 16 bits, two columns in an int32 [M, N / 2]: a loop that carries 16-bit numbers unpacks and
    packs them at each turn.
    """
    left, right = gl.split(p.reshape((p.shape[0], p.shape[1] // 2, 2)))
    if dtype == gl.bfloat16:
        both = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,r,r", [right, left], dtype=gl.int32, is_pure=True, pack=1
        )
    else:
        both = gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $1, $2;", "=r,r,r", [right, left], dtype=gl.int32, is_pure=True, pack=1
        )
    return both


@gluon.jit
def unpacked(both, dtype: gl.constexpr, layout: gl.constexpr):
    left = both.to(gl.int16).to(dtype, bitcast=True)
    right = (both >> 16).to(gl.int16).to(dtype, bitcast=True)
    return gl.convert_layout(gl.join(left, right).reshape((both.shape[0], both.shape[1] * 2)), layout)


@gluon.jit
def softmax(
    s, m, l, kv, kv_end, kv_len, kv_positions_ptr, q_idx, columns, b, h, scale,  # noqa: E741
    mask_mod: gl.constexpr, mask_numbers, mask_buffers, mask_sizes,
    score_mod: gl.constexpr, score_numbers, score_buffers, score_sizes, MASKED: gl.constexpr,
):  # fmt: skip
    """The softmax continued with products ``s``: (p, m, l, decay of what was). Keys of a run are consecutive."""
    unit = scale * LOG2E
    if MASKED or score_mod is not None:
        first_idx = gl.load(kv_positions_ptr + gl.minimum(kv, kv_len - 1))
        if MASKED:  # a mod may look tokens up by position
            kv_idx = gl.expand_dims(first_idx + gl.minimum(columns, gl.maximum(kv_end - kv - 1, 0)), 0)
        else:
            kv_idx = gl.expand_dims(first_idx + columns, 0)
        if score_mod is not None:
            unit = LOG2E
            s = score_mod(s * scale, b, h, q_idx, kv_idx, score_numbers, score_buffers, score_sizes)
        if MASKED:
            inside = gl.expand_dims(columns < kv_end - kv, 0)
            seen = inside & mask_mod(b, h, q_idx, kv_idx, mask_numbers, mask_buffers, mask_sizes)
            s = gl.where(seen, s, float("-inf"))
    m_new = gl.maximum(m, gl.max(s, 1) * unit)
    p = gl.exp2(s * unit - gl.expand_dims(m_new, 1))
    decay = gl.exp2(m - m_new)
    total = gl.sum(p, 1)
    # total * 0 keeps the rescaling of the accumulator, and with it the wait for p v, behind the exponentials
    return p, m_new, l * decay + total, decay + total * 0.0


@gluon.jit
def consume(
    consumer: gl.constexpr, item_ptr, runs_ptr, kv_len, b, h, head, q_rows, k_rows, v_rows,
    q_full, k_full, k_free, v_full, v_free,
    acc_ptr, m_ptr, l_ptr, out_ptr, lse_ptr, max_ptr, q_len, q_positions_ptr, kv_positions_ptr, scale,
    mask_mod: gl.constexpr, mask_numbers, mask_buffers, mask_sizes,
    score_mod: gl.constexpr, score_numbers, score_buffers, score_sizes,
    V_DIM: gl.constexpr, DIM_COLS: gl.constexpr, V_COLS: gl.constexpr, BLOCK_KV: gl.constexpr,
    K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """64 queries over all blocks: q k of a block and p v of the one before, then the softmax while p v is under way."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_KV, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V_COLS, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    first, end = gl.load(item_ptr) + consumer * ROWS, gl.load(item_ptr + 1)
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, s_layout))
    columns = gl.arange(0, BLOCK_KV, layout=gl.SliceLayout(0, s_layout))
    q_idx = gl.load(q_positions_ptr + first + rows, mask=rows < end - first, other=0)
    q_idx = gl.expand_dims(q_idx, 1)
    m = gl.full([ROWS], LOWEST, gl.float32, layout=gl.SliceLayout(1, s_layout))
    l = gl.full([ROWS], 0.0, gl.float32, layout=gl.SliceLayout(1, s_layout))  # noqa: E741
    acc = gl.full([ROWS, V_COLS], 0.0, gl.float32, layout=o_layout)
    nothing = gl.full([ROWS, BLOCK_KV], 0.0, gl.float32, layout=s_layout)
    q = q_rows.index(consumer).reshape((ROWS, DIM_COLS))

    # the first block, of either walk, with a mask: that of a FULL block is true
    run = gl.where(gl.load(item_ptr + 4) > 0, gl.load(item_ptr + 2), gl.load(item_ptr + 5))
    kv, kv_end = gl.load(runs_ptr + 2 * run), gl.load(runs_ptr + 2 * run + 1)
    idle = gl.load(item_ptr + 4) + gl.load(item_ptr + 7) == 0
    kv, kv_end = gl.where(idle, kv_len, kv), gl.where(idle, kv_len, kv_end)
    mbarrier.wait(q_full.index(consumer), 0)
    mbarrier.wait(k_full.index(0), 0)
    k = k_rows.index(0).reshape((BLOCK_KV, DIM_COLS)).permute((1, 0))
    s = warpgroup_mma_wait(0, deps=(warpgroup_mma(q, k, nothing, use_acc=False, is_async=True),))
    mbarrier.arrive(k_free.index(0))
    p, m, l, decay = softmax(  # noqa: E741
        s, m, l, kv, kv_end, kv_len, kv_positions_ptr, q_idx, columns, b, h, scale,
        mask_mod, mask_numbers, mask_buffers, mask_sizes, score_mod, score_numbers, score_buffers, score_sizes, True,
    )  # fmt: skip
    p = packed(p, DTYPE)
    k_at, k_phase = turned(0, 0, K_STAGES)
    v_at, v_phase = 0, 0
    done = 0
    for FULL in gl.static_range(2):
        first_run, end_run = gl.load(item_ptr + 2 + 3 * FULL), gl.load(item_ptr + 3 + 3 * FULL)
        kv, kv_end, next_run, next_kv, next_end = begin_walk(runs_ptr, first_run, end_run)
        num_blocks, kv, kv_end = first_block(item_ptr, kv, kv_end, kv_len, FULL)
        if (done == 0) & (num_blocks > 0):  # the block that was first
            kv, kv_end, next_run, next_kv, next_end, _anew = advance(
                kv, kv_end, next_run, next_kv, next_end, runs_ptr, first_run, end_run, BLOCK_KV
            )
            num_blocks -= 1
            done += 1
        for _ in range(num_blocks):
            # before a product is under way: what defines operands must not come between two (ptxas C7513)
            weights = unpacked(p, DTYPE, p_layout)
            mbarrier.wait(k_full.index(k_at), k_phase)
            k = k_rows.index(k_at).reshape((BLOCK_KV, DIM_COLS)).permute((1, 0))
            s = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(v_at), v_phase)
            v = v_rows.index(v_at).reshape((BLOCK_KV, V_COLS))
            acc = warpgroup_mma(weights, v, acc, is_async=True)
            s = warpgroup_mma_wait(1, deps=(s,))
            mbarrier.arrive(k_free.index(k_at))
            p, m, l, decay = softmax(  # noqa: E741
                s, m, l, kv, kv_end, kv_len, kv_positions_ptr, q_idx, columns, b, h, scale,
                mask_mod, mask_numbers, mask_buffers, mask_sizes,
                score_mod, score_numbers, score_buffers, score_sizes, FULL == 0,
            )  # fmt: skip
            # V of a block earlier: freed at once, it would drag the wait before the exponentials
            mbarrier.arrive(v_free.index(gl.where(v_at == 0, V_STAGES - 1, v_at - 1)), pred=done >= 2)
            barrier()
            acc = warpgroup_mma_wait(0, deps=(acc,))
            acc = acc * gl.expand_dims(gl.convert_layout(decay, gl.SliceLayout(1, o_layout)), 1)
            p = packed(p, DTYPE)  # only now: a register that a product will read must not be written under another
            k_at, k_phase = turned(k_at, k_phase, K_STAGES)
            v_at, v_phase = turned(v_at, v_phase, V_STAGES)
            done += 1
            if FULL == 0 or score_mod is not None:
                kv, kv_end, next_run, next_kv, next_end, _anew = advance(
                    kv, kv_end, next_run, next_kv, next_end, runs_ptr, first_run, end_run, BLOCK_KV
                )
    mbarrier.wait(v_full.index(v_at), v_phase)
    v = v_rows.index(v_at).reshape((BLOCK_KV, V_COLS))
    acc = warpgroup_mma_wait(0, deps=(warpgroup_mma(unpacked(p, DTYPE, p_layout), v, acc, is_async=True),))
    at = gl.cast(head, gl.int64) * q_len + first
    finished(
        acc, m, l, acc_ptr, m_ptr, l_ptr, out_ptr, lse_ptr, max_ptr, at, end - first,
        s_layout, o_layout, V_DIM, V_COLS,
    )  # fmt: skip


@gluon.jit
def finished(
    acc, m, l, acc_ptr, m_ptr, l_ptr, out_ptr, lse_ptr, max_ptr, first, num_rows,  # noqa: E741
    s_layout: gl.constexpr, o_layout: gl.constexpr, V_DIM: gl.constexpr, V_COLS: gl.constexpr,
):  # fmt: skip
    """Fold in the carried state, and write it back, or out and lse. The state comes in only here: an accumulator that
    begins with loaded values serialises the tensor cores (ptxas C7514).
    """
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, s_layout))
    inside, at = rows < num_rows, first + rows
    acc_rows = gl.expand_dims(gl.arange(0, ROWS, layout=gl.SliceLayout(1, o_layout)), 1)
    cols = gl.expand_dims(gl.arange(0, V_COLS, layout=gl.SliceLayout(0, o_layout)), 0)
    acc_inside, acc_at = (acc_rows < num_rows) & (cols < V_DIM), (first + acc_rows) * V_DIM + cols
    if acc_ptr is not None:
        m_old = gl.load(m_ptr + at, mask=inside, other=float("-inf")) * LOG2E
        m_new = gl.maximum(m, m_old)
        decay, decay_old = gl.exp2(m - m_new), gl.exp2(m_old - m_new)
        had_seen = gl.expand_dims(gl.convert_layout(m_old, gl.SliceLayout(1, o_layout)) > float("-inf"), 1)
        acc_old = gl.load(acc_ptr + acc_at, mask=acc_inside & had_seen, other=0.0)
        acc = acc * gl.expand_dims(gl.convert_layout(decay, gl.SliceLayout(1, o_layout)), 1)
        acc = acc + acc_old * gl.expand_dims(gl.convert_layout(decay_old, gl.SliceLayout(1, o_layout)), 1)
        l = l * decay + gl.load(l_ptr + at, mask=inside, other=0.0) * decay_old  # noqa: E741
        m = m_new
    if out_ptr is None:
        gl.store(acc_ptr + acc_at, acc, mask=acc_inside)
        gl.store(m_ptr + at, gl.where(m > LOWEST, m * LN2, float("-inf")), mask=inside)
        gl.store(l_ptr + at, l, mask=inside)
    else:
        saw_a_key = l != 0  # also true for NaN, which must not be hidden
        total = gl.expand_dims(gl.convert_layout(gl.where(saw_a_key, l, 1.0), gl.SliceLayout(1, o_layout)), 1)
        gl.store(out_ptr + acc_at, (acc / total).to(out_ptr.dtype.element_ty), mask=acc_inside)
        gl.store(lse_ptr + at, gl.where(saw_a_key, (m + gl.log2(l)) * LN2, float("-inf")), mask=inside)
        if max_ptr is not None:
            gl.store(max_ptr + at, gl.where(m > LOWEST, m * LN2, float("-inf")), mask=inside)


@gluon.jit(do_not_specialize=[*NOT_SPECIALIZED, "kv_len"])
def attend_kernel(
    q_blocks,  # tensor descriptors of q [B, Hq, S, D], k [B, H, K, D] and v [B, H, K, Dv]
    k_blocks,
    v_blocks,
    acc_ptr,  # [B, Hq, S, Dv] fp32; this and all below contiguous; None in a first step that is also the last
    m_ptr,  # [B, Hq, S] fp32
    l_ptr,  # [B, Hq, S] fp32
    out_ptr,  # [B, Hq, S, Dv]; None if another step follows
    lse_ptr,  # [B, Hq, S] fp32
    max_ptr,  # [B, Hq, S] fp32; None if it is not wanted
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
    V_DIM: gl.constexpr,
    DIM_COLS: gl.constexpr,
    V_COLS: gl.constexpr,
    BLOCK_KV: gl.constexpr,
    K_STAGES: gl.constexpr,
    V_STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    DTYPE: gl.constexpr = q_blocks.dtype
    q_rows = gl.allocate_shared_memory(DTYPE, [CONSUMERS] + q_blocks.block_type.shape, q_blocks.layout)
    k_rows = gl.allocate_shared_memory(DTYPE, [K_STAGES] + k_blocks.block_type.shape, k_blocks.layout)
    v_rows = gl.allocate_shared_memory(DTYPE, [V_STAGES] + v_blocks.block_type.shape, v_blocks.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(i), count=1)
    for i in gl.static_range(K_STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=CONSUMERS)
    for i in gl.static_range(V_STAGES):
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_free.index(i), count=CONSUMERS)

    item, head = locate(num_items, num_kv_heads, heads_at_once, group_size)
    item_ptr = items_ptr + item * ITEM_FIELDS
    b, h = head // num_heads, head % num_heads
    gl.warp_specialize(
        [
            (produce, (
                item_ptr, runs_ptr, kv_len, b, h, h // group_size, q_blocks, k_blocks, v_blocks,
                q_rows, k_rows, v_rows, q_full, k_full, k_free, v_full, v_free, BLOCK_KV, K_STAGES, V_STAGES,
            )),
            (consume, (
                gl.constexpr(0), item_ptr, runs_ptr, kv_len, b, h, head, q_rows, k_rows, v_rows,
                q_full, k_full, k_free, v_full, v_free,
                acc_ptr, m_ptr, l_ptr, out_ptr, lse_ptr, max_ptr, q_len, q_positions_ptr, kv_positions_ptr, scale,
                mask_mod, mask_numbers, mask_buffers, mask_sizes, score_mod, score_numbers, score_buffers, score_sizes,
                V_DIM, DIM_COLS, V_COLS, BLOCK_KV, K_STAGES, V_STAGES, DTYPE,
            )),
            (consume, (
                gl.constexpr(1), item_ptr, runs_ptr, kv_len, b, h, head, q_rows, k_rows, v_rows,
                q_full, k_full, k_free, v_full, v_free,
                acc_ptr, m_ptr, l_ptr, out_ptr, lse_ptr, max_ptr, q_len, q_positions_ptr, kv_positions_ptr, scale,
                mask_mod, mask_numbers, mask_buffers, mask_sizes, score_mod, score_numbers, score_buffers, score_sizes,
                V_DIM, DIM_COLS, V_COLS, BLOCK_KV, K_STAGES, V_STAGES, DTYPE,
            )),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )  # fmt: skip
