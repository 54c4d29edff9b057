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
    ptr,
    stride,
    first,
    end,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BOUNDED: tl.constexpr,
    NARROW: tl.constexpr = False,  # pyright: ignore[reportArgumentType]
):
    """Rows ``first : first + ROWS`` of a matrix with DIM columns, in pieces: a tuple of blocks [ROWS, COLS[0]] and, if
    there are two COLS, [ROWS, COLS[1]]; zeros beyond DIM and, if BOUNDED, from row ``end`` on. If NARROW, the elements
    of a block are less than 2**31 apart (`launch.rows_are_near`).
    """
    left = load_block(ptr, stride, first, end, DIM, ROWS, COLS[0], BOUNDED, NARROW)
    if len(COLS) == 1:
        rows = (left,)
    else:
        rows = (left, load_block(ptr + COLS[0], stride, first, end, DIM - COLS[0], ROWS, COLS[1], BOUNDED, NARROW))
    return rows


@triton.jit
def load_block(
    ptr,
    stride,
    first,
    end,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BOUNDED: tl.constexpr,
    NARROW: tl.constexpr,
):
    """One piece, [ROWS, COLS].

    If NARROW, the offsets from the first row are int32, and stay in registers over a loop. Else each row's address is
    one multiplication in int64, made anew for each block, also where those registers would spill accumulators.
    """
    rows = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLS)[None, :]
    if NARROW:
        ptrs = (ptr + first.to(tl.int64) * stride) + (rows * stride + cols)
    else:
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
    NARROW: tl.constexpr = False,  # pyright: ignore[reportArgumentType]
):
    """`load_rows`; whole blocks come by ``blocks``, a descriptor of the tensor of which ``ptr`` is a head, if there is
    one. A masked walk keeps to pointers: a descriptor knows where the tensor ends, not where a run does.
    """
    if blocks is None or BOUNDED:
        rows = load_rows(ptr, stride, first, end, DIM, ROWS, COLS, BOUNDED, NARROW)
    else:
        LEFT: tl.constexpr = COLS[0]
        rows = (tl.reshape(blocks.load([batch, head, first, 0]), (ROWS, LEFT)),)
    return rows


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
def products(a, b, INTERPRETED: tl.constexpr):
    """Rows of ``a`` times rows of ``b``, [ROWS of a, ROWS of b]."""
    s = dot(a[0], tl.trans(b[0]), None, INTERPRETED)
    if len(a) == 2:
        s = dot(a[1], tl.trans(b[1]), s, INTERPRETED)
    return s


@triton.jit
def add_product(weights, rows, acc, INTERPRETED: tl.constexpr):
    """weights @ rows + acc, in the pieces of ``rows``."""
    left = dot(weights, rows[0], acc[0], INTERPRETED)
    if len(rows) == 1:
        total = (left,)
    else:
        total = (left, dot(weights, rows[1], acc[1], INTERPRETED))
    return total


@triton.jit
def scaled(acc, factor):
    """Each row of the pieces times its factor."""
    left = acc[0] * factor[:, None]
    if len(acc) == 1:
        total = (left,)
    else:
        total = (left, acc[1] * factor[:, None])
    return total


@triton.jit
def zeros(ROWS: tl.constexpr, COLS: tl.constexpr):
    LEFT: tl.constexpr = COLS[0]
    left = tl.zeros([ROWS, LEFT], tl.float32)
    if len(COLS) == 1:
        rows = (left,)
    else:
        RIGHT: tl.constexpr = COLS[1]
        rows = (left, tl.zeros([ROWS, RIGHT], tl.float32))
    return rows


@triton.jit
def load_piece(ptr, at, inside, i: tl.constexpr, DIM: tl.constexpr, COLS: tl.constexpr):
    """Piece ``i`` of the rows ``at`` of a contiguous matrix with DIM columns; zeros where a row is not ``inside``."""
    cols = columns_of_piece(i, COLS)
    return tl.load(ptr + at[:, None] * DIM + cols, mask=inside[:, None] & (cols < DIM), other=0.0)


@triton.jit
def store_piece(ptr, at, piece, inside, i: tl.constexpr, DIM: tl.constexpr, COLS: tl.constexpr):
    cols = columns_of_piece(i, COLS)
    ptrs = ptr + at[:, None] * DIM + cols
    tl.store(ptrs, piece.to(ptr.dtype.element_ty), mask=inside[:, None] & (cols < DIM))


@triton.jit
def columns_of_piece(i: tl.constexpr, COLS: tl.constexpr):
    return COLS[0] * i + tl.arange(0, COLS[i])[None, :]


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
