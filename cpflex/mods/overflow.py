"""Which integers of a mod fit in 32 bits: exact bounds of every operation, over all positions of all sequences.

Positions behave as int64, and kernels compute with int32 where that gives the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Bounds = tuple[int, int]
"""Least and greatest value, both possible as far as is known."""

INT32: Bounds = (-(2**31), 2**31 - 1)
POSITION: Bounds = (0, 2**31 - 2)
"""Sequences are shorter than 2**31 tokens."""


def all_of(dtype: torch.dtype) -> Bounds:
    return torch.iinfo(dtype).min, torch.iinfo(dtype).max


def fits(bounds: Bounds, within: Bounds) -> bool:
    return within[0] <= bounds[0] and bounds[1] <= within[1]


def magnitude(x: Bounds) -> int:
    return max(abs(x[0]), abs(x[1]))


def result_bounds(op: str, *operands: Bounds) -> Bounds:
    """Of an integer operation of the graph, before it is wrapped to its dtype; ``where`` takes its two branches."""
    return _RULES[op](*operands)


def _corners(f: Callable[[int, int], int], x: Bounds, y: Bounds) -> Bounds:
    """Of a function that is monotone in each operand."""
    values = [f(i, j) for i in x for j in y]
    return min(values), max(values)


def _abs(x: Bounds) -> Bounds:
    return (0 if x[0] <= 0 <= x[1] else min(abs(x[0]), abs(x[1]))), magnitude(x)


def _bitwise(x: Bounds, y: Bounds) -> Bounds:
    """Numbers with no more bits than the operands."""
    top = (1 << max(n if n >= 0 else ~n for n in (*x, *y)).bit_length()) - 1
    return (0 if min(x[0], y[0]) >= 0 else ~top), top


def _and(x: Bounds, y: Bounds) -> Bounds:
    masks = [z[1] for z in (x, y) if z[0] >= 0]  # such an operand has the bits of the result and perhaps more
    return (0, min(masks)) if masks else _bitwise(x, y)


def _divide(x: Bounds, y: Bounds) -> Bounds:
    if x[0] >= 0 and y[0] > 0:
        return x[0] // y[1], x[1] // y[0]
    return -magnitude(x), magnitude(x)


def _floor_mod(x: Bounds, y: Bounds) -> Bounds:
    lo, hi = min(y[0] + 1, 0), max(y[1] - 1, 0)
    return (lo, min(hi, x[1])) if x[0] >= 0 and y[0] > 0 else (lo, hi)


def _trunc_mod(x: Bounds, y: Bounds) -> Bounds:
    top = min(magnitude(x), max(magnitude(y) - 1, 0))
    return (-top if x[0] < 0 else 0), (top if x[1] > 0 else 0)


def _power(x: Bounds, y: Bounds) -> Bounds:
    top = max(1, magnitude(x) ** y[1]) if 0 <= y[1] < 64 else 2**63
    return (0 if x[0] >= 0 else -top), top


def _shift_left(x: Bounds, y: Bounds) -> Bounds:
    """A shift out of range gives 0."""
    lo, hi = _corners(lambda i, j: i << j, x, (max(y[0], 0), min(max(y[1], 0), 64)))
    return min(lo, 0), max(hi, 0)


def _shift_right(x: Bounds, y: Bounds) -> Bounds:
    """A shift out of range leaves 0 or -1."""
    return _corners(lambda i, j: i >> j, x, y) if fits(y, (0, 63)) else (min(x[0], 0), max(x[1], 0))


def _hull(x: Bounds, y: Bounds) -> Bounds:
    return min(x[0], y[0]), max(x[1], y[1])


def _maximum(x: Bounds, y: Bounds) -> Bounds:
    return max(x[0], y[0]), max(x[1], y[1])


def _minimum(x: Bounds, y: Bounds) -> Bounds:
    return min(x[0], y[0]), min(x[1], y[1])


_RULES: dict[str, Callable[..., Bounds]] = {
    "add": lambda x, y: (x[0] + y[0], x[1] + y[1]),
    "sub": lambda x, y: (x[0] - y[1], x[1] - y[0]),
    "mul": lambda x, y: _corners(lambda i, j: i * j, x, y),
    "neg": lambda x: (-x[1], -x[0]),
    "abs": _abs,
    "sign": lambda x: (-1, 1),
    "not": lambda x: (~x[1], ~x[0]),
    "and": _and,
    "or": _bitwise,
    "xor": _bitwise,
    "maximum": _maximum,
    "clamp_min": _maximum,
    "minimum": _minimum,
    "clamp_max": _minimum,
    "where": _hull,
    "floor_div": _divide,
    "trunc_div": _divide,
    "remainder": _floor_mod,
    "fmod": _trunc_mod,
    "pow": _power,
    "lshift": _shift_left,
    "rshift": _shift_right,
}

INTEGER_OPS = frozenset(_RULES)
