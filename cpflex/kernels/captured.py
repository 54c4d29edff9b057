"""Gradients of tensors that a score_mod captured: one more pass over the scores for each place where one is read.

Where the place depends on queries alone (or on no position), or on keys alone, a program sums along the other axis in a
fixed order, and the sums are added at their place afterwards. Where it depends on both, as in a table of relative
positions, they are added atomically: for all pairs of a diagonal of a block at once where these have one place, as they
have if positions follow one another, and for each pair elsewhere.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cpflex.kernels.call import OTHERWISE, Call
from cpflex.kernels.launch import NOT_SPECIALIZED, Decided, decide, start
from cpflex.kernels.scores import load_rows, load_vector, modified, products
from cpflex.kernels.work import ITEM_FIELDS, advance, begin_walk, locate, work_by_key, work_by_query
from cpflex.mods.evaluate import add_at, evaluate
from cpflex.mods.graph import Graph, GraphBuilder, Ref
from cpflex.mods.triton_math import dim_size
from cpflex.mods.vjp import CapturedGradient
from cpflex.tile_mask import TileMask

# B batch, Hq query heads, H heads of keys and values, S local queries, K visiting keys, D and Dv head dims


def add_captured_gradients(
    q: Tensor,  # [B, Hq, S, D]
    k: Tensor,  # [B, H, K, D]
    v: Tensor,  # [B, H, K, Dv]
    tile_mask: TileMask,
    call: Call,
    shared: Sequence[Any],
    d_captured: list[Tensor],
) -> None:
    """Add the part of the visiting keys to ``d_captured``, in place.

    Args:
        shared: the first arguments of all backward kernels.

    Raises:
        RuntimeError: torch wants deterministic algorithms, and a gradient needs atomic additions.
        NotImplementedError: atomic additions to a tensor of 2**31 elements.
    """
    reads = call.score_vjp.captured if call.score_vjp is not None else ()
    places = [_place(call.score_vjp.graph, read) for read in reads]  # type: ignore[union-attr]
    for read, place in zip(reads, places, strict=True):
        if _needs_atomics(place):
            _refuse_if_deterministic(read)
            if call.captured[read.slot].numel() >= 2**31:
                raise NotImplementedError(f"the gradient of a captured tensor of 2**31 elements or more{OTHERWISE}")
    for read, place in zip(reads, places, strict=True):
        target = d_captured[call.wanted.index(read.slot)]
        if _needs_atomics(place):
            sums = torch.zeros(target.shape, dtype=torch.float64, device=q.device)  # their order hardly shows
            decided = decide("captured_by_pair", q, k, v, call)
            _launch(q, tile_mask, shared, decided, read, sums, by_key=False, atomic=True)
            target += sums
            continue
        by_key = "kv_idx" in place.inputs
        sums = torch.zeros(*q.shape[:2], (k if by_key else q).shape[2], dtype=torch.float32, device=q.device)
        _launch(q, tile_mask, shared, decide("captured", q, k, v, call), read, sums, by_key, atomic=False)
        positions = tile_mask.kv_positions if by_key else tile_mask.q_positions
        _add_at_place(target, sums, place, read, call, positions.long())


def _place(vjp_graph: Graph, read: CapturedGradient) -> Graph:
    """The indices of a read, those that are not numbers, as a graph of their own."""
    indices = [vjp_graph.outputs[i.index] for i in read.indices if isinstance(i, Ref)]
    return GraphBuilder(vjp_graph.nodes).graph(*indices)


def _needs_atomics(place: Graph) -> bool:
    return "score" in place.inputs or {"q_idx", "kv_idx"} <= place.inputs


def _refuse_if_deterministic(read: CapturedGradient) -> None:
    if not torch.are_deterministic_algorithms_enabled():
        return
    message = (
        f"the gradient of captured tensor {read.slot} of the score_mod has no deterministic algorithm: its place "
        "depends on both q_idx and kv_idx, so it is added atomically; turn off torch.use_deterministic_algorithms, or "
        "pass "
        'kernel_options={"backend": "reference"}'
    )
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=2)


def _add_at_place(
    target: Tensor,
    sums: Tensor,  # [B, Hq, S] or [B, Hq, K]
    place: Graph,
    read: CapturedGradient,
    call: Call,
    positions: Tensor,  # int64 [S] or [K]
) -> None:
    if not read.indices:
        target += sums.sum()
        return
    b, h = (torch.arange(n, device=sums.device) for n in sums.shape[:2])
    inputs = {"b": b.view(-1, 1, 1), "h": h.view(-1, 1), "q_idx": positions, "kv_idx": positions}
    found = iter(evaluate(place, call.captured, inputs))
    indices = [next(found) if isinstance(i, Ref) else torch.tensor(i, device=sums.device) for i in read.indices]
    sums = sums.sum_to_size(torch.broadcast_shapes(*(i.shape for i in indices)))
    add_at(target, indices, sums)


def _launch(
    q: Tensor,
    tile_mask: TileMask,
    shared: Sequence[Any],
    decided: Decided,
    read: CapturedGradient,
    target: Tensor,
    by_key: bool,
    atomic: bool,
) -> None:
    config = decided.config
    if by_key:
        work = work_by_key(tile_mask, config.block_kv, config.block_q)
    else:
        work = work_by_query(tile_mask, config.block_q, config.block_kv)
    indices = read.indices if atomic else ()
    arguments = (
        *(*shared, *decided.heads, *decided.mods, work.items, work.runs, work.num_busy),
        *(target, target.shape[-1] if target.ndim else 1),
    )
    start(
        *(captured_kernel, work.num_busy * q.shape[0] * q.shape[1], arguments, decided),
        OUTPUT=read.output,
        SLOT=read.slot,
        PLACES=tuple(i.index if isinstance(i, Ref) else -1 for i in indices),
        NUMBERS=tuple(0 if isinstance(i, Ref) else int(i) % n for i, n in zip(indices, target.shape, strict=False)),
        ROWS_ARE_KEYS=by_key,
    )


@triton.jit
def scatter(target_ptr, place, part, seen):
    """``target[place] += part`` of the pairs that are seen. What the pairs of a diagonal have for one place is added
    before: one atomic addition instead of so many.
    """
    ROWS: tl.constexpr = part.shape[0]
    COLS: tl.constexpr = part.shape[1]
    DIAGONALS: tl.constexpr = (ROWS + COLS - 2) // COLS + 1  # that a column holds, below
    # each row moves to the left by its number, and what leaves comes in from the right: diagonals become columns
    moved = tl.arange(0, ROWS)[:, None] + tl.arange(0, COLS)[None, :]
    place = tl.gather(tl.where(seen, place, -1), moved % COLS, 1)
    part = tl.gather(part, moved % COLS, 1)
    have_one_place = True
    for n in tl.static_range(DIAGONALS):
        here = (moved // COLS == n) & (place >= 0)
        last = tl.max(tl.where(here, place, -1), 0)
        have_one_place &= tl.sum((here & (place != last[None, :])).to(tl.int32)) == 0
    if have_one_place:
        for n in tl.static_range(DIAGONALS):
            here = (moved // COLS == n) & (place >= 0)
            last = tl.max(tl.where(here, place, -1), 0)
            sums = tl.sum(tl.where(here, part, 0.0), 0).to(tl.float64)
            tl.atomic_add(target_ptr + last, sums, mask=last >= 0, sem="relaxed")
    else:
        tl.atomic_add(target_ptr + place, part.to(tl.float64), mask=place >= 0, sem="relaxed")


@triton.jit(do_not_specialize=[*NOT_SPECIALIZED, "target_len"])
def captured_kernel(
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
    target_ptr,  # [B, Hq, target_len] fp32; if there are PLACES, like the captured tensor, fp64
    target_len,
    OUTPUT: tl.constexpr,  # of score_vjp: what is added
    SLOT: tl.constexpr,  # of the captured tensor
    PLACES: tl.constexpr,  # of score_vjp: where in each dim; -1: at NUMBERS
    NUMBERS: tl.constexpr,
    ROWS_ARE_KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    DIM_COLS: tl.constexpr,
    V_COLS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    item, head = locate(num_items, num_kv_heads, heads_at_once, group_size)
    item_ptr = items_ptr + item * ITEM_FIELDS
    first, end = tl.load(item_ptr), tl.load(item_ptr + 1)
    b, h = head // num_heads, head % num_heads
    batch, q_head, kv_head = b.to(tl.int64), h.to(tl.int64), (h // group_size).to(tl.int64)
    q_ptr += (batch * q_stride_b + q_head * q_stride_h) * UNIT
    k_ptr += (batch * k_stride_b + kv_head * k_stride_h) * UNIT
    v_ptr += (batch * v_stride_b + kv_head * v_stride_h) * UNIT
    grad_out_ptr += (batch * grad_out_stride_b + q_head * grad_out_stride_h) * UNIT
    q_stride_s *= UNIT
    k_stride_s *= UNIT
    v_stride_s *= UNIT
    grad_out_stride_s *= UNIT
    lse_ptr += head.to(tl.int64) * q_len
    delta_ptr += head.to(tl.int64) * q_len

    # q and grad_out of a block of queries, or k and v of one of keys, stay; the others are walked over
    if ROWS_ARE_KEYS:
        ROWS: tl.constexpr = BLOCK_KV
        COLS: tl.constexpr = BLOCK_Q
        row_idx = load_vector(kv_positions_ptr, first, end, 0, ROWS, True)[:, None]
        row = load_rows(k_ptr, k_stride_s, first, end, HEAD_DIM, ROWS, DIM_COLS, True)
        row_value = load_rows(v_ptr, v_stride_s, first, end, V_DIM, ROWS, V_COLS, True)
    else:
        ROWS: tl.constexpr = BLOCK_Q
        COLS: tl.constexpr = BLOCK_KV
        row_idx = load_vector(q_positions_ptr, first, end, 0, ROWS, True)[:, None]
        row = load_rows(q_ptr, q_stride_s, first, end, HEAD_DIM, ROWS, DIM_COLS, True)
        row_value = load_rows(grad_out_ptr, grad_out_stride_s, first, end, V_DIM, ROWS, V_COLS, True)
        lse = load_vector(lse_ptr, first, end, float("inf"), ROWS, True)[:, None]
        delta = load_vector(delta_ptr, first, end, 0.0, ROWS, True)[:, None]
    in_rows = (tl.arange(0, ROWS) < end - first)[:, None]
    total = tl.zeros([ROWS], tl.float32)
    for FULL in tl.static_range(2):
        first_run, end_run = tl.load(item_ptr + 2 + 3 * FULL), tl.load(item_ptr + 3 + 3 * FULL)
        num_blocks = tl.load(item_ptr + 4 + 3 * FULL)
        at, at_end, next_run, next_at, next_end = begin_walk(runs_ptr, first_run, end_run)
        for _ in range(num_blocks):
            # positions come first, as in the forward kernel
            if ROWS_ARE_KEYS:
                q_idx, kv_idx = load_vector(q_positions_ptr, at, at_end, 0, COLS, FULL == 0)[None, :], row_idx
                col = load_rows(q_ptr, q_stride_s, at, at_end, HEAD_DIM, COLS, DIM_COLS, FULL == 0)
                col_value = load_rows(grad_out_ptr, grad_out_stride_s, at, at_end, V_DIM, COLS, V_COLS, FULL == 0)
                lse = load_vector(lse_ptr, at, at_end, float("inf"), COLS, FULL == 0)[None, :]
                delta = load_vector(delta_ptr, at, at_end, 0.0, COLS, FULL == 0)[None, :]
            else:
                q_idx, kv_idx = row_idx, load_vector(kv_positions_ptr, at, at_end, 0, COLS, FULL == 0)[None, :]
                col = load_rows(k_ptr, k_stride_s, at, at_end, HEAD_DIM, COLS, DIM_COLS, FULL == 0)
                col_value = load_rows(v_ptr, v_stride_s, at, at_end, V_DIM, COLS, V_COLS, FULL == 0)
            s = products(row, col, INTERPRETED)
            dp = products(row_value, col_value, INTERPRETED)
            x, unit = modified(s, scale, b, h, q_idx, kv_idx, score_numbers, score_buffers, score_sizes, score_mod)
            ds = tl.exp2(x * unit - lse) * (dp - delta)
            outputs = score_vjp(ds, s * scale, b, h, q_idx, kv_idx, score_numbers, score_buffers, score_sizes)
            seen = tl.broadcast_to(in_rows, s.shape)
            if FULL == 0:
                in_cols = (tl.arange(0, COLS) < at_end - at)[None, :]
                seen = in_rows & in_cols & mask_mod(b, h, q_idx, kv_idx, mask_numbers, mask_buffers, mask_sizes)
            part = tl.where(seen, outputs[OUTPUT], 0.0)
            if len(PLACES) == 0:
                total += tl.sum(part, 1)
            else:
                offset = tl.zeros(s.shape, tl.int32)
                for dim in tl.static_range(len(PLACES)):
                    index = NUMBERS[dim] if PLACES[dim] < 0 else outputs[PLACES[dim]]
                    offset = offset * dim_size(score_sizes, SLOT, dim) + index
                scatter(target_ptr, offset, part, seen)
            at, at_end, next_run, next_at, next_end, _anew = advance(
                at, at_end, next_run, next_at, next_end, runs_ptr, first_run, end_run, COLS
            )
    if len(PLACES) == 0:
        rows = tl.arange(0, ROWS)
        tl.store(target_ptr + head.to(tl.int64) * target_len + first + rows, total, mask=rows < end - first)
