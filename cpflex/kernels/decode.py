"""attend_pages as one fused kernel: few queries, many keys, so that the bytes of the keys are what it costs.

A program owns one head of keys of one item, and as many rows as the query heads of its group times the tokens of the
item are, up to those of `tuning`: a key is read once for all of them (split-KV decoding, as Flash-Decoding). It walks
over the item's runs of rows, each cut where the sequence ends when the kernel runs: what nobody has filled is not read,
and the bound of a load is a number that is known beforehand, which keeps loads in the pipeline. There is no FULL walk.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cpflex.kernels.call import Call, with_whole_rows
from cpflex.kernels.forward import LOWEST
from cpflex.kernels.launch import NOT_SPECIALIZED, Decided, decide, on_device_of, padded, start, strides_in_units
from cpflex.kernels.pages import PageWork, Partials
from cpflex.kernels.scores import (
    LN2,
    add_product,
    columns_of_piece,
    load_rows,
    modified,
    products,
    scaled,
    zeros,
)

# N new tokens of all sequences, Hq query heads, H heads of keys and values, R rows of the pool, D and Dv head dims, I
# items, M runs, P partials

PAGE_ITEM_FIELDS = tl.constexpr(6)
"""As `pages.PageWork` has them."""

RUNS_AT_ONCE = tl.constexpr(128)
"""Whose blocks a program counts at once."""

LEAST_ROWS = 16
"""Of a block: what tensor cores multiply at least, as `launch.padded` has it."""


def attend_pages(
    q: Tensor,  # [1, Hq, N, D]
    k: Tensor,  # [1, H, R, D]
    v: Tensor,  # [1, H, R, Dv]
    work: PageWork,
    call: Call,
    into: Partials,
) -> Partials:
    """A partial for each token of each item, in ``into``."""
    q, k, v = with_whole_rows(q), with_whole_rows(k), with_whole_rows(v)
    decided = decide("decode", q, k, v, call)
    rows = q.shape[1] // k.shape[1] * work.max_tokens
    block_rows = rows_of_block(rows, decided)
    num_blocks, num_items = max(1, -(-rows // block_rows)), work.items.shape[0]
    arguments = (
        *(q, k, v, *into),
        *strides_in_units(q, k, v),
        *(into.out.stride(0), into.lse.stride(0), work.q_positions, work.kv_len, work.items, work.runs),
        *(num_blocks, *decided.heads, *decided.mods),
    )
    num_warps = decided.config.num_warps if block_rows > LEAST_ROWS else 4
    decided = decided._replace(options=decided.options | {"BLOCK_Q": block_rows, "num_warps": num_warps})
    with on_device_of(q):
        start(decode_kernel, num_items * k.shape[1] * num_blocks, arguments, decided)
    return into


def rows_of_block(rows: int, decided: Decided) -> int:
    """The least that holds ``rows``, up to those of `tuning`."""
    return min(padded(rows), decided.config.block_q)


@triton.jit(
    do_not_specialize=[*NOT_SPECIALIZED, "out_stride", "lse_stride", "num_blocks"],
    do_not_specialize_on_alignment=["out_ptr", "lse_ptr"],  # rows of a message begin anywhere
)
def decode_kernel(
    q_ptr,  # [1, Hq, N, D]
    k_ptr,  # [1, H, R, D]
    v_ptr,  # [1, H, R, Dv]
    out_ptr,  # [P, Hq, Dv] fp32
    lse_ptr,  # [P, Hq] fp32
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
    out_stride,
    lse_stride,
    q_positions_ptr,  # [N]
    kv_len_ptr,  # [B]
    items_ptr,  # [I, PAGE_ITEM_FIELDS]
    runs_ptr,  # [M, 3]
    num_blocks,  # of rows, of an item
    num_heads,  # Hq
    num_kv_heads,  # H
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
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    # items are the outermost: the blocks of rows of an item, which read the same keys, run at about the same time
    pid = tl.program_id(0)
    block, kv_h = pid % num_blocks, pid // num_blocks % num_kv_heads
    item_ptr = items_ptr + pid // num_blocks // num_kv_heads * PAGE_ITEM_FIELDS
    b, first, tokens = tl.load(item_ptr), tl.load(item_ptr + 1), tl.load(item_ptr + 2) - tl.load(item_ptr + 1)
    if block * BLOCK_Q >= group_size * tokens:
        return
    rows = block * BLOCK_Q + tl.arange(0, BLOCK_Q)  # (head of the group, token)
    inside = rows < group_size * tokens
    rows = tl.where(inside, rows, 0)
    h, token = kv_h * group_size + rows // tokens, rows % tokens
    q_idx = tl.load(q_positions_ptr + first + token)[:, None]
    q_rows = q_ptr + (h.to(tl.int64) * q_stride_h + (first + token).to(tl.int64) * q_stride_s) * UNIT
    q = gather_rows(q_rows, inside, HEAD_DIM, DIM_COLS)
    k_ptr += kv_h.to(tl.int64) * k_stride_h * UNIT
    v_ptr += kv_h.to(tl.int64) * v_stride_h * UNIT
    k_stride_s *= UNIT
    v_stride_s *= UNIT

    acc = zeros(BLOCK_Q, V_COLS)
    m = tl.full([BLOCK_Q], LOWEST, tl.float32)
    l = tl.zeros([BLOCK_Q], tl.float32)  # noqa: E741
    first_run, end_run, kv_len = tl.load(item_ptr + 3), tl.load(item_ptr + 4), tl.load(kv_len_ptr + b)
    num_kv_blocks = blocks_of_runs(runs_ptr, first_run, end_run, kv_len, BLOCK_KV)
    kv, kv_end, shift = read_run(runs_ptr, first_run, kv_len)
    next_run = first_run + 1
    next_kv, next_end, next_shift = read_run(runs_ptr, tl.where(next_run < end_run, next_run, first_run), kv_len)
    for _ in range(num_kv_blocks):
        kv_idx = (kv + shift + tl.arange(0, BLOCK_KV))[None, :]
        k = load_rows(k_ptr, k_stride_s, kv, kv_end, HEAD_DIM, BLOCK_KV, DIM_COLS, True)
        s = products(q, k, INTERPRETED)
        s, unit = modified(s, scale, b, h[:, None], q_idx, kv_idx, score_numbers, score_buffers, score_sizes, score_mod)
        filled = (tl.arange(0, BLOCK_KV) < kv_end - kv)[None, :]
        seen = filled & mask_mod(b, h[:, None], q_idx, kv_idx, mask_numbers, mask_buffers, mask_sizes)
        s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * unit)
        p = tl.exp2(s * unit - m_new[:, None])
        decay = tl.exp2(m - m_new)
        v = load_rows(v_ptr, v_stride_s, kv, kv_end, V_DIM, BLOCK_KV, V_COLS, True)
        l = l * decay + tl.sum(p, 1)  # noqa: E741
        acc = add_product(p.to(v[0].dtype), v, scaled(acc, decay), INTERPRETED)
        m = m_new
        # the next run is read one block ahead, so that no address waits for a load
        kv += BLOCK_KV
        is_exhausted = kv >= kv_end
        kv, kv_end = tl.where(is_exhausted, next_kv, kv), tl.where(is_exhausted, next_end, kv_end)
        shift = tl.where(is_exhausted, next_shift, shift)
        next_run += is_exhausted.to(tl.int32)
        next_kv, next_end, next_shift = read_run(runs_ptr, tl.where(next_run < end_run, next_run, first_run), kv_len)

    saw_a_key = l != 0  # also true for NaN, which must not be hidden
    at = (tl.load(item_ptr + 5) + token).to(tl.int64)
    for i in tl.static_range(len(V_COLS)):
        cols = columns_of_piece(i, V_COLS)
        ptrs = out_ptr + (at * out_stride + h * V_DIM)[:, None] + cols
        tl.store(ptrs, acc[i] / tl.where(saw_a_key, l, 1.0)[:, None], mask=inside[:, None] & (cols < V_DIM))
    tl.store(lse_ptr + at * lse_stride + h, tl.where(saw_a_key, (m + tl.log2(l)) * LN2, float("-inf")), mask=inside)


@triton.jit
def gather_rows(ptrs, inside, DIM: tl.constexpr, COLS: tl.constexpr):
    """Rows that begin at ``ptrs``, in pieces, as `load_rows` has them; zeros for those that are not ``inside``."""
    left_cols = columns_of_piece(0, COLS)
    left = tl.load(ptrs[:, None] + left_cols, mask=inside[:, None] & (left_cols < DIM), other=0.0)
    if len(COLS) == 1:
        rows = (left,)
    else:
        right_cols = columns_of_piece(1, COLS)
        rows = (left, tl.load(ptrs[:, None] + right_cols, mask=inside[:, None] & (right_cols < DIM), other=0.0))
    return rows


@triton.jit
def read_run(runs_ptr, run, kv_len):
    """(first row, end row, position of a row less the row) of what is filled of a run."""
    first, position = tl.load(runs_ptr + 3 * run), tl.load(runs_ptr + 3 * run + 2)
    shift = position - first
    return first, tl.minimum(tl.load(runs_ptr + 3 * run + 1), kv_len - shift), shift


@triton.jit
def blocks_of_runs(runs_ptr, first_run, end_run, kv_len, BLOCK: tl.constexpr):
    """Of the walk over the runs: one at least of each, also of one that is empty."""
    total = 0
    for first in range(first_run, end_run, RUNS_AT_ONCE):
        runs = first + tl.arange(0, RUNS_AT_ONCE)
        inside = runs < end_run
        begin = tl.load(runs_ptr + 3 * runs, mask=inside, other=0)
        end = tl.load(runs_ptr + 3 * runs + 1, mask=inside, other=0)
        position = tl.load(runs_ptr + 3 * runs + 2, mask=inside, other=0)
        rows = tl.minimum(end - begin, kv_len - position)
        total += tl.sum(tl.where(inside, tl.maximum(tl.cdiv(rows, BLOCK), 1), 0))
    return total
