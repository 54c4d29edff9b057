"""The graph on intervals: what is a mask over a whole tile - EMPTY, PARTIAL or FULL?

Each value of the graph is bounded over all (b, h, q_idx, kv_idx) of a tile: an operation maps bounds to bounds, for all
tiles at once. EMPTY and FULL are proofs. What cannot be bounded (an operation without a rule, an integer that may wrap
around, a division by what may be 0, a float that may be NaN) is unknown, never wrong. Arrays broadcast, so that what
depends on queries alone is computed once per row of tiles.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from cpflex.mods.counts import CountTable
from cpflex.mods.graph import Mod, Node, Ref

EMPTY, PARTIAL, FULL = 0, 1, 2

Array: TypeAlias = Any  # np.ndarray or a NumPy scalar: bool, int64 or float64


class Interval(NamedTuple):
    """Bounds of one value of the graph in each tile.

    Integers in int64. Bools: ``lo`` is "true everywhere", ``hi`` "true somewhere, perhaps". Floats of any precision in
    float64, where two NaN bounds stand for any value, NaN included, and other bounds promise that there is no NaN.
    A value known to be one number has ``lo is hi``, which saves work.
    """

    lo: Array
    hi: Array


class TileClassifier:
    """Verdicts on tiles of one traced mask_mod; its captured tensors are read when it is made.

    Called with inclusive bounds of global positions, it returns an int8 array of their broadcast shape. FULL: the mask
    is true at every (b, h, q_idx, kv_idx) of the tile. EMPTY: false at every one. PARTIAL: mixed, or not proven::

        classify = TileClassifier(trace_mask_mod(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx))
        start = np.arange(0, 384, 128)
        q, kv = start[:, None], start[None, :]
        classify(q, q + 127, kv, kv + 127)  # [[1, 0, 0], [2, 1, 0], [2, 2, 1]]
    """

    def __init__(self, mod: Mod) -> None:
        self._nodes = mod.graph.nodes
        self._output = mod.graph.outputs[0].index
        self._tables = [_RangeTable(t) for t in mod.captured]
        self._understood = {node.dtype for node in self._nodes} <= {torch.bool, *_INTS, *_FLOATS}
        assert self._nodes[self._output].dtype == torch.bool, f"{mod.name} is not a mask_mod"

    def __call__(
        self,
        q_lo: np.ndarray,  # int64, as the next three: mutually broadcastable
        q_hi: np.ndarray,
        kv_lo: np.ndarray,
        kv_hi: np.ndarray,
        *,
        b: tuple[Any, Any] = (0, 0),  # numbers, or int64 like the positions
        h: tuple[int, int] = (0, 0),
    ) -> np.ndarray:
        verdicts = np.zeros(np.broadcast_shapes(*map(np.shape, (q_lo, q_hi, kv_lo, kv_hi))), np.int8)
        if not self._understood:
            return verdicts + np.int8(PARTIAL)
        inputs = {"b": _positions(*b), "h": _positions(*h)}
        inputs |= {"q_idx": _positions(q_lo, q_hi), "kv_idx": _positions(kv_lo, kv_hi)}
        values: list[Interval] = []
        with np.errstate(all="ignore"):
            for node in self._nodes:
                values.append(self._bound(node, inputs, values))
        for proof in values[self._output]:
            verdicts += proof
        return verdicts

    def _bound(self, node: Node, inputs: dict[str, Interval], values: list[Interval]) -> Interval:
        op, args, dtype = node
        if op == "input":
            return inputs[str(args[0])]
        if op == "const":
            return _number(args[0], dtype)
        if op in ("captured", "gather"):
            indices = [values[i.index] if isinstance(i, Ref) else _number(i, torch.int64) for i in args[1:]]
            return self._tables[args[0]](indices)  # type: ignore[call-overload]
        sources = [self._nodes[x.index].dtype for x in args if isinstance(x, Ref)]
        kind = sources[0] if op in _COMPARE else dtype  # of the numbers among the operands
        x = [values[a.index] if isinstance(a, Ref) else _number(a, kind) for a in args]
        if op == "detach":
            return x[0]
        if op == "cast":
            return _cast(dtype, sources[0], x[0])
        if op == "where":
            return _where(*x)
        same = len(args) == 2 and args[0] == args[1]
        if op in _COMPARE:
            return _COMPARE[op](*[Interval(x[0].lo, x[0].lo)] * 2 if same else x)
        rule = _bool_rule if dtype == torch.bool else _float_rule if dtype.is_floating_point else _int_rule
        if op == "mul" and same:
            x = [rule("abs", dtype, x[0], x[0])] * 2
        return rule(op, dtype, x[0], x[-1])


# -- values

_INTS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SAFE = 2**62  # int64 results are trusted up to here, where float64 estimates cannot miss a wraparound


def _positions(lo: Any, hi: Any) -> Interval:
    lo, hi = np.asarray(lo, np.int64), np.asarray(hi, np.int64)
    return Interval(lo, lo) if lo.ndim == hi.ndim == 0 and lo == hi else Interval(lo, hi)


def _number(number: Any, dtype: torch.dtype) -> Interval:
    if dtype == torch.bool:
        value = np.bool_(number)
    elif dtype.is_floating_point:
        value = np.float64(number)
    elif torch.iinfo(dtype).min <= number <= torch.iinfo(dtype).max:
        value = np.int64(number)
    else:
        return _unknown(dtype)
    return _rounded(dtype, value, value) if dtype in _FLOATS[:3] else Interval(value, value)


def _unknown(dtype: torch.dtype) -> Interval:
    if dtype == torch.bool:
        return Interval(np.False_, np.True_)
    if dtype.is_floating_point:
        return Interval(np.float64(np.nan), np.float64(np.nan))
    return Interval(np.int64(torch.iinfo(dtype).min), np.int64(torch.iinfo(dtype).max))


def _unless(bad: Array, dtype: torch.dtype, x: Interval) -> Interval:
    """``x``, but unknown where ``bad``."""
    if not np.any(bad):
        return x
    unknown = _unknown(dtype)
    return Interval(np.where(bad, unknown.lo, x.lo), np.where(bad, unknown.hi, x.hi))


def _map(f: Callable[[Array], Array], x: Interval) -> Interval:
    """Bounds of an increasing function."""
    lo = f(x.lo)
    return Interval(lo, lo if x.lo is x.hi else f(x.hi))


def _negative(x: Interval) -> Interval:
    return Interval(-x.hi, -x.lo)


def _sum(a: Interval, b: Interval) -> Interval:
    return Interval(a.lo + b.lo, a.hi + b.hi)


def _difference(a: Interval, b: Interval) -> Interval:
    return Interval(a.lo - b.hi, a.hi - b.lo)


def _corners(f: Callable[[Array, Array], Array], a: Interval, b: Interval) -> Interval:
    """Bounds of a function that is monotone in each operand."""
    values = [f(x, y) for x in _ends(a) for y in _ends(b)]
    return Interval(reduce(np.minimum, values), reduce(np.maximum, values))


def _ends(x: Interval) -> Sequence[Array]:
    return (x.lo,) if x.lo is x.hi else x


def _has_zero(x: Interval) -> Array:
    return (x.lo <= 0) & (x.hi >= 0)


# -- captured tensors


class _RangeTable:
    """Least and greatest element of a captured tensor over boxes of indices, each wrapped when negative, then clamped.

    A sparse table: entry i of level k bounds a window of 2**k elements from i << _stride(k) on. Two or three windows
    per dim cover a box: exactly when its bounds are multiples of the stride, else reaching out by less than that. A
    level is built when the first box of its size comes; those of 32 elements and more take 1/16 of the table or less.
    A bool table of two or more dims is counted instead, which is exact over every box.
    """

    def __init__(self, tensor: Tensor) -> None:
        kind = (
            tensor.dtype if tensor.dtype == torch.bool else torch.float64 if tensor.is_floating_point() else torch.int64
        )
        elements = tensor.detach().cpu().to(kind).numpy()
        self._dtype = tensor.dtype
        self._elements = elements
        self._levels = {(0,) * elements.ndim: Interval(elements, elements)}
        self._counts: CountTable | None = None

    def __call__(self, indices: Sequence[Interval]) -> Interval:
        if 0 in self._elements.shape:
            return _unknown(self._dtype)
        boxes = [_wrapped(index, size) for index, size in zip(indices, self._elements.shape, strict=True)]
        sizes = [np.frexp(np.asarray(hi - lo + 1, np.float64))[1] - 1 for lo, hi in boxes]  # floor(log2(length))
        present = [np.flatnonzero(np.bincount(size.ravel())).tolist() for size in sizes]
        if self._dtype == torch.bool and len(boxes) > 1 and any(map(any, present)):
            self._counts = self._counts or CountTable(self._elements)
            return Interval(*self._counts(boxes))
        if all(len(ks) == 1 for ks in present):
            return self._lookup(tuple(ks[0] for ks in present), boxes)
        shape = np.broadcast_shapes(*(size.shape for size in sizes))
        boxes = [_map(lambda bound: np.broadcast_to(bound, shape), box) for box in boxes]
        found = Interval(*(np.empty(shape, self._elements.dtype) for _ in range(2)))
        for level in itertools.product(*present):
            at = reduce(
                np.logical_and, (np.broadcast_to(size == k, shape) for size, k in zip(sizes, level, strict=True))
            )
            if at.any():
                found.lo[at], found.hi[at] = self._lookup(level, [Interval(lo[at], hi[at]) for lo, hi in boxes])
        return found

    def _lookup(self, level: tuple[int, ...], boxes: Sequence[Interval]) -> Interval:
        windows = self._level(level)
        if not any(level):
            element = windows.lo[tuple(box.lo for box in boxes)]
            return Interval(element, element)
        corners = list(itertools.product(*(_starts(k, box) for k, box in zip(level, boxes, strict=True))))
        lo = reduce(np.minimum, (windows.lo[corner] for corner in corners))
        return Interval(lo, reduce(np.maximum, (windows.hi[corner] for corner in corners)))

    def _level(self, level: tuple[int, ...]) -> Interval:
        if level not in self._levels:
            dim = int(np.argmax(level))
            k = level[dim]
            if (
                k == BLOCK_LEVEL
            ):  # straight from the elements: the levels below, as large as the table, may never be built
                half = self._level((*level[:dim], 0, *level[dim + 1 :]))
                blocks = np.arange(0, half.lo.shape[dim], 1 << _stride(k))
                half = Interval(np.minimum.reduceat(half.lo, blocks, dim), np.maximum.reduceat(half.hi, blocks, dim))
                step, offset = 1, 1
            else:
                half = self._level((*level[:dim], k - 1, *level[dim + 1 :]))
                step, offset = 1 << (_stride(k) - _stride(k - 1)), 1 << (k - 1 - _stride(k - 1))
            lo = _joined_halves(np.minimum, half.lo, dim, step, offset)
            self._levels[level] = Interval(lo, _joined_halves(np.maximum, half.hi, dim, step, offset))
        return self._levels[level]


BLOCK_LEVEL = 5


def _stride(k: int) -> int:
    """log2 of the distance between windows of 2**k elements: 1, then 16, then a sixteenth of the window."""
    return 0 if k < BLOCK_LEVEL else max(BLOCK_LEVEL - 1, k - 4)


def _joined_halves(f: np.ufunc, half: np.ndarray, dim: int, step: int, offset: int) -> np.ndarray:
    """A window of 2**k elements is one of 2**(k-1) and the next; the last ones end with the table."""
    halves = np.moveaxis(half, dim, 0)
    joined, second = halves[::step].copy(), halves[offset::step]
    f(joined[: len(second)], second, out=joined[: len(second)])
    return np.moveaxis(joined, 0, dim)


def _starts(k: int, box: Interval) -> Sequence[Array]:
    """Entries of level k that cover a box of at least 2**k elements, less than twice that: rounded down, rounded up."""
    if k == 0:
        return (box.lo,)
    shift = _stride(k)
    first, last = box.lo >> shift, -((2**k - 1 - box.hi) >> shift)
    next_to_first = first + (2**k >> shift)
    return (first, last) if np.all(next_to_first >= last) else (first, np.minimum(next_to_first, last), last)


def _wrapped(index: Interval, size: int) -> Interval:
    wrapped = _map(lambda x: np.clip(np.where(x < 0, x + size, x), 0, size - 1), index)
    both_signs = (index.lo < 0) & (index.hi >= 0)
    if not np.any(both_signs):
        return wrapped
    return Interval(np.where(both_signs, 0, wrapped.lo), np.where(both_signs, size - 1, wrapped.hi))


# -- operations across dtypes; NaN bounds satisfy no comparison, so each is written that they neither prove nor refute


def _lt(a: Interval, b: Interval) -> Interval:
    return Interval(a.hi < b.lo, ~(a.lo >= b.hi))


def _le(a: Interval, b: Interval) -> Interval:
    return Interval(a.hi <= b.lo, ~(a.lo > b.hi))


def _eq(a: Interval, b: Interval) -> Interval:
    return Interval((a.lo == b.hi) & (a.hi == b.lo), ~((a.hi < b.lo) | (a.lo > b.hi)))


def _not(x: Interval) -> Interval:
    return Interval(~x.hi, ~x.lo)


_COMPARE: dict[str, Callable[[Interval, Interval], Interval]] = {
    "lt": _lt,
    "le": _le,
    "gt": lambda a, b: _lt(b, a),
    "ge": lambda a, b: _le(b, a),
    "eq": _eq,
    "ne": lambda a, b: _not(_eq(a, b)),
}


def _where(condition: Interval, a: Interval, b: Interval) -> Interval:
    def pick(hull: np.ufunc, x: Array, y: Array) -> Array:
        return np.where(condition.lo, x, np.where(condition.hi, hull(x, y), y))

    return Interval(pick(np.minimum, a.lo, b.lo), pick(np.maximum, a.hi, b.hi))


def _cast(dtype: torch.dtype, source: torch.dtype, x: Interval) -> Interval:
    if dtype == torch.bool:
        return Interval((x.lo > 0) | (x.hi < 0), ~((x.lo == 0) & (x.hi == 0)))
    if dtype.is_floating_point:
        wide = _map(lambda bound: np.asarray(bound, np.float64), x)
        return wide if dtype == torch.float64 else _rounded(dtype, *wide)
    if source == torch.bool:
        return _map(lambda bound: np.asarray(bound, np.int64), x)
    lo, hi = _map(np.trunc, x) if source.is_floating_point else x
    info = torch.iinfo(dtype)
    fits = (lo >= max(info.min, -_SAFE)) & (hi <= min(info.max, _SAFE))  # no NaN fits
    return _unless(~fits, dtype, _map(lambda bound: np.where(fits, bound, 0).astype(np.int64), Interval(lo, hi)))


def _ordered(op: str, a: Interval, b: Interval) -> Interval:
    f = np.maximum if op in ("maximum", "clamp_min") else np.minimum
    return Interval(f(a.lo, b.lo), f(a.hi, b.hi))


# -- rules of one dtype: (op, dtype, first operand, last operand) -> bounds of the result


def _bool_rule(op: str, dtype: torch.dtype, a: Interval, b: Interval) -> Interval:
    match op:
        case "not":
            return _not(a)
        case "and" | "mul" | "minimum" | "clamp_max":
            return Interval(a.lo & b.lo, a.hi & b.hi)
        case "or" | "add" | "maximum" | "clamp_min":
            return Interval(a.lo | b.lo, a.hi | b.hi)
        case "xor":
            return _not(_eq(a, b))
    return _unknown(dtype)


def _int_rule(op: str, dtype: torch.dtype, a: Interval, b: Interval) -> Interval:
    match op:
        case "add":
            return _unwrapped(_sum, dtype, a, b)
        case "sub":
            return _unwrapped(_difference, dtype, a, b)
        case "mul":
            return _unwrapped(partial(_corners, np.multiply), dtype, a, b)
        case "neg":
            return _unwrapped(_difference, dtype, _number(0, dtype), a)
        case "abs":
            minus = _int_rule("neg", dtype, a, a)
            lo, hi = np.maximum(np.maximum(a.lo, minus.lo), 0), np.maximum(a.hi, minus.hi)
            return _unless(minus.lo == torch.iinfo(dtype).min, dtype, Interval(lo, hi))
        case "sign":
            return _map(np.sign, a)
        case "not":
            ones = torch.iinfo(dtype).max if dtype == torch.uint8 else -1
            return Interval(ones - a.hi, ones - a.lo)
        case "floor_div" | "trunc_div" | "remainder" | "fmod":
            return _int_division(op, dtype, a, b)
        case "and" | "or" | "xor":
            lo, hi = _bitwise(op, a, b)
            return Interval(np.maximum(lo, torch.iinfo(dtype).min), np.minimum(hi, torch.iinfo(dtype).max))
        case "lshift":
            bad = (b.lo < 0) | (b.hi >= min(torch.iinfo(dtype).bits - 1, 62))
            return _unless(bad, dtype, _int_rule("mul", dtype, a, _map(lambda x: 1 << np.where(bad, 0, x), b)))
        case "rshift":
            bad = (b.lo < 0) | (b.hi >= torch.iinfo(dtype).bits)
            return _unless(bad, dtype, _corners(np.right_shift, a, _map(lambda x: np.where(bad, 0, x), b)))
        case "pow":
            return _power(_int_rule, dtype, a, b)
        case "maximum" | "clamp_min" | "minimum" | "clamp_max":
            return _ordered(op, a, b)
    return _unknown(dtype)


def _unwrapped(
    bounds: Callable[[Interval, Interval], Interval], dtype: torch.dtype, a: Interval, b: Interval
) -> Interval:
    """Unknown where a result may leave its dtype: torch would wrap it around."""
    result, info = bounds(a, b), torch.iinfo(dtype)
    if dtype != torch.int64:
        return _unless((result.lo < info.min) | (result.hi > info.max), dtype, result)
    if all(np.min(x.lo, initial=0) > -(2**31) and np.max(x.hi, initial=0) < 2**31 for x in (a, b)):
        return result
    estimate = bounds(*(_map(lambda bound: np.asarray(bound, np.float64), x) for x in (a, b)))
    return _unless((estimate.lo < -_SAFE) | (estimate.hi > _SAFE), dtype, result)


def _int_division(op: str, dtype: torch.dtype, a: Interval, b: Interval) -> Interval:
    divide = np.floor_divide if op in ("floor_div", "remainder") else _trunc_divide
    zero = _has_zero(b)
    b = _map(lambda x: np.where(zero, 1, x), b) if np.any(zero) else b
    if op in ("floor_div", "trunc_div"):
        return _unless(zero, dtype, _unwrapped(partial(_corners, divide), dtype, a, b))
    largest = np.maximum(b.hi - 1, -(b.lo + 1))
    signed = b if op == "remainder" else a
    return _unless(zero, dtype, _modulo(a, b, _corners(divide, a, b), signed, largest))


def _modulo(a: Interval, b: Interval, quotient: Interval, signed: Interval, largest: Array) -> Interval:
    """``a - quotient * b``, exact within one period, else between 0 and ``largest`` with the sign of ``signed``."""
    one_period = (quotient.lo == quotient.hi) & ((b.lo == b.hi) | (quotient.lo == 0))
    lo = np.where(one_period, a.lo - quotient.lo * b.lo, np.where(signed.lo < 0, -largest, 0))
    hi = np.where(one_period, a.hi - quotient.lo * b.lo, np.where(signed.hi > 0, largest, 0))
    return Interval(lo, hi)


def _trunc_divide(x: Array, y: Array) -> Array:
    quotient = x // y
    return quotient + ((quotient < 0) & (quotient * y != x))


def _bitwise(op: str, a: Interval, b: Interval) -> Interval:
    (a_always, a_free), (b_always, b_free) = _bits(a), _bits(b)
    if op == "xor":
        free = a_free | b_free
        always = (a_always ^ b_always) & ~free
    else:
        f = np.bitwise_and if op == "and" else np.bitwise_or
        always = f(a_always, b_always)
        free = f(a_always | a_free, b_always | b_free) & ~always
    free_sign = free & np.int64(torch.iinfo(torch.int64).min)
    return Interval(always | free_sign, always | (free & ~free_sign))


def _bits(x: Interval) -> tuple[np.ndarray, np.ndarray]:
    """The bits that all numbers of an interval have, and those in which they differ: none above where lo and hi do."""
    free = x.lo ^ x.hi
    for shift in (1, 2, 4, 8, 16, 32):
        free = free | (free >> shift)
    return x.lo & ~free, free


def _power(rule: Callable[..., Interval], dtype: torch.dtype, a: Interval, b: Interval) -> Interval:
    if b.lo is not b.hi or np.ndim(b.lo) or b.lo not in range(1, 9):
        return _unknown(dtype)
    base = rule("abs", dtype, a, a) if b.lo % 2 == 0 else a
    return reduce(partial(rule, "mul", dtype), [base] * int(b.lo))


def _float_rule(op: str, dtype: torch.dtype, a: Interval, b: Interval) -> Interval:
    match op:
        case "add":
            opposite = ((a.lo == -np.inf) & (b.hi == np.inf)) | ((a.hi == np.inf) & (b.lo == -np.inf))
            return _rounded(dtype, *_sum(a, b), nan=opposite)
        case "sub":
            return _float_rule("add", dtype, a, _negative(b))
        case "mul":
            zero_times_infinity = (_has_zero(a) & _infinite(b)) | (_has_zero(b) & _infinite(a))
            return _rounded(dtype, *_corners(np.multiply, a, b), nan=zero_times_infinity)
        case "div":
            return _rounded(dtype, *_corners(np.divide, a, b), nan=_has_zero(b), exact=False)
        case "floor_div":
            return _unless(_infinite(a), dtype, _map(np.floor, _float_rule("div", dtype, a, b)))
        case "remainder" | "fmod":
            return _float_modulo(op, dtype, a, b)
        case "neg":
            return _negative(a)
        case "abs":
            return Interval(np.maximum(np.maximum(a.lo, -a.hi), 0), np.maximum(a.hi, -a.lo))
        case "floor" | "ceil" | "trunc" | "sign":
            return _map(getattr(np, op), a)
        case "round":
            return _map(np.rint, a)
        case "pow":
            return _rounded(dtype, *_power(_float_rule, dtype, a, b), ulps=128, exact=False)
        case "exp" | "exp2" | "sqrt" | "sigmoid":
            f = (lambda x: 1 / (1 + np.exp(-x))) if op == "sigmoid" else getattr(np, op)
            return _rounded(dtype, *_map(f, a), ulps=128, exact=False)
        case "log" | "log2" | "log1p" | "expm1" | "tanh":
            return _rounded(dtype, *_map(getattr(np, op), a), ulps=128, near_zero=1.0, exact=False)
        case "maximum" | "clamp_min" | "minimum" | "clamp_max":
            return _ordered(op, a, b)
    return _unknown(dtype)


def _infinite(x: Interval) -> Array:
    return np.isinf(x.lo) | np.isinf(x.hi)


def _float_modulo(op: str, dtype: torch.dtype, a: Interval, b: Interval) -> Interval:
    quotient = _map(np.floor if op == "remainder" else np.trunc, _float_rule("div", dtype, a, b))
    lo, hi = _modulo(a, b, quotient, b if op == "remainder" else a, np.maximum(b.hi, -b.lo))
    slack = 8 * torch.finfo(dtype).eps * np.maximum(a.hi, -a.lo)  # devices may compute a - b * floor(a / b)
    return _rounded(dtype, lo - slack, hi + slack, nan=_infinite(a) | np.isnan(quotient.lo), exact=False)


def _rounded(
    dtype: torch.dtype,
    lo: Array,
    hi: Array,
    *,
    nan: Array = False,
    ulps: int = 4,
    near_zero: float = 0.0,
    exact: bool = True,
) -> Interval:
    """Bounds moved outward by some units in the last place: they hold whether a device rounds, fuses or approximates.

    Args:
        exact: every device rounds the operation correctly, so that a bound which the dtype can hold stays as it is.
        near_zero: results below it have the absolute error of a result of that size.
    """
    info = torch.finfo(dtype)

    def slack(bound: Array) -> Array:
        size = np.abs(bound)
        significand = np.frexp(bound)[0] * (2 / info.eps)
        held = (significand == np.rint(significand)) & ((size >= info.tiny) | (size == 0))
        held &= exact and dtype != torch.float64
        return np.where(held | np.isinf(bound), 0.0, ulps * info.eps * np.maximum(size, near_zero) + info.tiny)

    below, above = slack(lo), slack(hi)
    if np.any(below) or np.any(above):
        lo, hi = lo - below, hi + above
    if np.any(np.abs(lo) > info.max) or np.any(np.abs(hi) > info.max):
        lo, hi = np.where(lo < -info.max, -np.inf, lo), np.where(hi > info.max, np.inf, hi)
    return _unless(nan | np.isnan(lo) | np.isnan(hi), dtype, Interval(lo, hi))
