"""What torch computes and Triton has no word for: the device functions that generated mods call.

Written in primitives that Triton's interpreter knows too. Floats are fp32, or fp64 where torch promotes to it; integers
int32 or int64. Errors are under 4 ulp of fp32, plus what the device's approximate `exp` adds.
"""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

# -- integers: Triton divides as C does, towards zero


@triton.jit
def floor_div(x, y):
    rest = x % y
    return (x - rest) // y - ((rest != 0) & ((rest ^ y) < 0)).to(tl.int32)


@triton.jit
def floor_mod(x, y):
    rest = x % y
    return tl.where((rest != 0) & ((rest ^ y) < 0), rest + y, rest)


@triton.jit
def shift_left(x, n, BITS: tl.constexpr):
    return tl.where((n < 0) | (n >= BITS), 0, x << (n & (BITS - 1)).to(x.dtype))


@triton.jit
def shift_right(x, n, BITS: tl.constexpr):
    """A shift out of range leaves the sign."""
    return x >> tl.where((n < 0) | (n >= BITS), BITS - 1, n).to(x.dtype)


@triton.jit
def int_power(x, n, BITS: tl.constexpr):
    """``x ** n`` for n < 2**BITS, wrapped around; for negative n rounded towards 0, which leaves powers of 1 and -1."""
    base = tl.where((n >= 0) | (x == -1), x, (x == 1).to(x.dtype))
    power = tl.where((n < 0) & (base == 0), base, base * 0 + 1)
    for bit in tl.static_range(BITS):  # pyright: ignore[reportGeneralTypeIssues]
        power = tl.where(((n >> bit) & 1) != 0, power * base, power)
        base = base * base
    return power


@triton.jit
def within_int32(x, LO: tl.constexpr, HI: tl.constexpr):
    """An int64 that is compared with int32 numbers strictly between LO and HI: clamped, it compares the same."""
    return tl.minimum(tl.maximum(x, LO), HI).to(tl.int32)


# -- captured tensors: sizes holds 8 sizes, then 8 strides, of each

IS_COMPILED = tl.constexpr(isinstance(floor_div, triton.JITFunction))


@triton.constexpr_function
def words_of_load(kind):
    """The instruction that loads an element, its registers, the type that they have and the one that memory has."""
    bits = max(8, kind.primitive_bitwidth)  # a bool is a byte, 0 or 1
    register, word = ("=l,l", tl.int64) if bits == 64 else ("=r,l", tl.int32)
    return f"ld.global.nc.u{bits} $0, [$1];", register, word, tl.dtype(f"int{bits}")


@triton.jit
def load_pairs(ptrs):
    """`tl.load` of an element for each pair of a query and a key, of memory that nobody writes meanwhile.

    Triton would carry such a load through the stages of its pipeline, in shared memory: 4 bytes a pair, a stage and a
    table, more than the keys themselves. An instruction that it does not know as a load stays where it is used.
    """
    kind: tl.constexpr = ptrs.dtype.element_ty
    if IS_COMPILED:
        words: tl.constexpr = words_of_load(kind)
        x = tl.inline_asm_elementwise(words[0], words[1], [ptrs.to(tl.int64)], dtype=words[2], is_pure=True, pack=1)
        x = x != 0 if kind == tl.int1 else x.to(words[3]).to(kind, bitcast=True)
    else:
        x = tl.load(ptrs)
    return x


@triton.jit
def dim_size(sizes, SLOT: tl.constexpr, DIM: tl.constexpr):
    return tl.load(sizes + (16 * SLOT + DIM)).to(tl.int32)


@triton.jit
def place(index, sizes, SLOT: tl.constexpr, DIM: tl.constexpr):
    """``index``, which is not negative, clamped to the last one."""
    return tl.minimum(index, dim_size(sizes, SLOT, DIM) - 1).to(tl.int32)


@triton.jit
def wrapped_place(index, sizes, SLOT: tl.constexpr, DIM: tl.constexpr):
    """``index``, counted from the end if negative, then clamped."""
    size = dim_size(sizes, SLOT, DIM)
    return tl.minimum(tl.maximum(tl.where(index < 0, index + size, index), 0), size - 1).to(tl.int32)


@triton.jit
def offset(index, sizes, SLOT: tl.constexpr, DIM: tl.constexpr):
    return place(index, sizes, SLOT, DIM) * tl.load(sizes + (16 * SLOT + 8 + DIM))


@triton.jit
def wrapped_offset(index, sizes, SLOT: tl.constexpr, DIM: tl.constexpr):
    return wrapped_place(index, sizes, SLOT, DIM) * tl.load(sizes + (16 * SLOT + 8 + DIM))


# -- rounding and remainders


@triton.jit
def flag(is_true):
    """A 0-d bool as it is. Triton's interpreter spreads it over a block in the dtype of what was compared."""
    return is_true.to(tl.int32) != 0


@triton.jit
def round_to_bf16(x):
    """fp32 -> the nearest bf16, as an fp32. A cast there and back is the same, but Triton's interpreter truncates."""
    bits = x.to(tl.int32, bitcast=True)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)


@triton.jit
def sign(x):
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@triton.jit
def trunc(x):
    return tl.where(x < 0, tl.ceil(x), tl.floor(x))


@triton.jit
def round_half_even(x):
    down = tl.floor(x)
    rest = x - down
    is_odd = tl.floor(down * 0.5) * 2.0 != down
    return tl.where((rest > 0.5) | ((rest == 0.5) & is_odd), down + 1.0, down)


@triton.jit
def float_mod(x, y):
    """The remainder with the sign of x: long division in fp64, exact for fp32 operands."""
    x, y = tl.broadcast(x, y)
    size, by = tl.abs(x), tl.abs(y)
    rest = size.to(tl.float64)
    for i in tl.static_range(12):  # pyright: ignore[reportGeneralTypeIssues]
        digit = by.to(tl.float64) * 2.0 ** (24 * (11 - i))
        rest -= tl.floor(rest / digit) * digit
    # a quotient just under an integer may have been rounded up to it
    rest = tl.where(rest < 0, rest + by, tl.where(rest >= by, rest - by, rest)).to(x.dtype)
    rest = tl.where((by == float("inf")) & (size < by), size, rest)
    return tl.where(rest == 0, x * 0.0, tl.where(x < 0, -rest, rest))


@triton.jit
def float_floor_mod(x, y):
    x, y = tl.broadcast(x, y)
    rest = float_mod(x, y)
    return tl.where((rest != 0) & ((y < 0) != (rest < 0)), rest + y, rest)


@triton.jit
def divide(x, y):
    """Correctly rounded."""
    if x.dtype == tl.float32:
        quotient = tl.div_rn(x, y)
    else:
        quotient = x / y
    return quotient


@triton.jit
def float_floor_div(x, y):
    """From the remainder, as in torch and Python: a rounded quotient could be the next integer."""
    x, y = tl.broadcast(x, y)
    rest = float_mod(x, y)
    quotient = divide(x - rest, y)
    quotient = tl.where((rest != 0) & ((y < 0) != (rest < 0)), quotient - 1.0, quotient)
    down = tl.floor(quotient)
    return tl.where(y == 0, divide(x, y), tl.where(quotient - down > 0.5, down + 1.0, down))


# -- powers


@triton.jit
def square(x):
    return x * x


@triton.jit
def cube(x):
    return x * x * x


@triton.jit
def power(x, y):
    """In fp64: the exponent magnifies the error of a logarithm."""
    x, y = tl.broadcast(x, y)
    size = tl.abs(x)
    result = tl.exp2(tl.log2(size.to(tl.float64)) * y).to(x.dtype)
    result = tl.where((y == 0) | (x == 1) | ((x == -1) & (tl.abs(y) == float("inf"))), 1.0, result)
    is_integer = tl.floor(y) == y
    is_odd = is_integer & (tl.floor(y * 0.5) * 2.0 != y)
    is_negative = (x < 0) | (1.0 / x == float("-inf"))
    result = tl.where(is_negative & is_odd, result * -1.0, result)
    return tl.where((x < 0) & (size < float("inf")) & ~is_integer, float("nan"), result)


# -- functions of which exp, log or a quotient would lose digits; polynomials are minimax fits


@triton.jit
def reciprocal(x):
    """Of at least 2**-126, within 1 ulp; 0 where that would be below it. A division would compare its divisor first."""
    if IS_COMPILED and x.dtype == tl.float32:
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        y = 1.0 / x
    return y


@triton.jit
def exp_or_0(x):
    """exp x; 0 where that is below 2**-126, which Triton's own compares with first."""
    if IS_COMPILED and x.dtype == tl.float32:
        y = tl.exp2(x * 1.4426950408889634)  # which is as exact as the device's exp
    else:
        y = tl.exp(x)
    return y


@triton.jit
def sigmoid(x):
    return reciprocal(1.0 + exp_or_0(-x))


@triton.jit
def tanh(x):
    """Of fp32: x p(x^2) / q(x^2), a fit up to 9, from where tanh x is 1; no exponential, so nothing cancels near 0, and
    no comparison, which the elements of a block would wait for one after the other.
    """
    if x.dtype == tl.float32:
        x2 = tl.minimum(x * x, 81.0, propagate_nan=tl.PropagateNan.ALL)
        above = 1.0 + x2 * (0.1338398 + x2 * (0.0034989954 + x2 * (2.0661251e-5 + x2 * 1.3419807e-8)))
        below = 1.0 + x2 * (0.467173 + x2 * (0.025890203 + x2 * (0.00032910373 + x2 * 7.804723e-7)))
        y = x * above * reciprocal(below)
        y = tl.maximum(y, -1.0, propagate_nan=tl.PropagateNan.ALL)
        y = tl.minimum(y, 1.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        size, x2 = tl.abs(x), x * x
        far = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * size))
        near = x + x * x2 * (-0.3333333 + x2 * 0.13332924)
        y = tl.where(size < 0.001, near, tl.where(x < 0, -far, far))
    return y


@triton.jit
def expm1(x):
    near = 0.008333182 + x * (0.0013888673 + x * (0.00019962186 + x * 0.000024939742))
    near = 0.5 + x * (0.16666667 + x * (0.041666668 + x * near))
    near_end = 0.5 if x.dtype == tl.float32 else 0.001
    return tl.where(tl.abs(x) < near_end, x + x * x * near, exp_or_0(x) - 1.0)


@triton.jit
def log1p(x):
    # near 0: 2 atanh(s) = 2 (s + s^3 / 3 + ...)
    s = x * reciprocal(2.0 + x)
    s2 = s * s
    near = s2 * (1.0 / 3 + s2 * (1.0 / 5 + s2 * (1.0 / 7 + s2 * (1.0 / 9 + s2 * (1.0 / 11)))))
    more = 1.0 + x
    lost = tl.where((more > 0) & (more < 16777216.0), ((more - 1.0) - x) * reciprocal(more), 0.0)
    near_end = 0.25 if x.dtype == tl.float32 else 0.001
    return tl.where(tl.abs(x) < near_end, 2.0 * s + 2.0 * s * near, tl.log(more) - lost)


@triton.jit
def atan2(y, x):
    """Of fp32."""
    x, y = tl.broadcast(x, y)
    high, low = tl.maximum(tl.abs(x), tl.abs(y)), tl.minimum(tl.abs(x), tl.abs(y))
    t = tl.where(high == low, 1.0, tl.div_rn(low, high))
    t = tl.where(high == 0, 0.0, t)
    t2 = t * t
    angle = 0.06284352 + t2 * (-0.03627008 + t2 * (0.01375023 - t2 * 0.00244702))
    angle = -0.14279111 + t2 * (0.11037993 + t2 * (-0.08673166 + t2 * angle))
    angle = t + t * t2 * (-0.33333332 + t2 * (0.19999766 + t2 * angle))
    angle = tl.where(tl.abs(y) > tl.abs(x), 1.5707963267948966 - angle, angle)
    angle = tl.where(x.to(tl.int32, bitcast=True) < 0, 3.141592653589793 - angle, angle)
    angle = tl.where(y.to(tl.int32, bitcast=True) < 0, -angle, angle)
    return tl.where((x != x) | (y != y), float("nan"), angle)
