"""Blocks of rows and of scores on the device: what the kernels of both directions share.

Mods are `@triton.jit` functions passed as constexprs. They are pointwise, so a block of scores may be [queries, keys]
or [keys, queries].
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(
    ptr, stride, first, end, DIM: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, BOUNDED: tl.constexpr
):
    """Rows ``first : first + ROWS`` of a matrix with DIM columns, as [ROWS, COLS]; zeros beyond DIM and, if BOUNDED,
    from row ``end`` on.

    Each row's address is one multiplication, made anew for each block: offsets kept in registers over a loop would
    spill accumulators.
    """
    rows = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLS)[None, :]
    ptrs = ptr + (first + rows).to(tl.int64) * stride + cols
    if BOUNDED and DIM < COLS:
        block = tl.load(ptrs, mask=(rows < end - first) & (cols < DIM), other=0.0)
    elif BOUNDED:
        block = tl.load(ptrs, mask=rows < end - first, other=0.0)
    elif DIM < COLS:
        block = tl.load(ptrs, mask=cols < DIM, other=0.0)
    else:
        block = tl.load(ptrs)
    return block


@triton.jit
def load_walked(
    ptr,
    stride,
    blocks,
    batch,
    head,
    first,
    end,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """`load_rows`; whole blocks come by ``blocks``, a descriptor of the tensor of which ``ptr`` is a head, if there is
    one. A masked walk keeps to pointers: a descriptor knows where the tensor ends, not where a run does.
    """
    if blocks is None or BOUNDED:
        block = load_rows(ptr, stride, first, end, DIM, ROWS, COLS, BOUNDED)
    else:
        block = tl.reshape(blocks.load([batch, head, first, 0]), (ROWS, COLS))
    return block


@triton.jit
def load_vector(ptr, first, end, other, SIZE: tl.constexpr, BOUNDED: tl.constexpr):
    """Elements ``first : first + SIZE``; if BOUNDED, ``other`` from ``end`` on."""
    at = tl.arange(0, SIZE)
    if BOUNDED:
        block = tl.load(ptr + first.to(tl.int64) + at, mask=at < end - first, other=other)
    else:
        block = tl.load(ptr + first.to(tl.int64) + at)
    return block


@triton.jit
def dot(a, b, acc, INTERPRETED: tl.constexpr):
    """a @ b + acc in fp32; ``acc`` may be None."""
    if INTERPRETED:  # which multiplies the bit patterns of bf16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def modified(s, scale, b, h, q_idx, kv_idx, numbers, buffers, sizes, score_mod: tl.constexpr):
    """(x, unit) of products ``s`` of queries and keys: x * unit are their scores in base 2. Without a score_mod the
    scale is left to be fused with what follows.
    """
    if score_mod is None:
        x, unit = s, scale * LOG2E
    else:
        x, unit = score_mod(s * scale, b, h, q_idx, kv_idx, numbers, buffers, sizes), LOG2E
    return x, unit


@triton.jit
def identity(score, b, h, q_idx, kv_idx, numbers, buffers, sizes):
    """A score_mod that changes nothing."""
    return score


@triton.jit
def through_score_mod(ds, s, scale, b, h, q_idx, kv_idx, numbers, buffers, sizes, score_vjp: tl.constexpr):
    """The gradient of ``s * scale`` from that of what the score_mod made of it."""
    if score_vjp is not None:
        ds = score_vjp(ds, s * scale, b, h, q_idx, kv_idx, numbers, buffers, sizes)[0]
    return ds
