"""Law of integer bounds: no operand within its bounds gives a result outside the result's."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpflex.mods.overflow import INTEGER_OPS, result_bounds

NUMBERS = st.one_of(
    st.integers(-9, 9), st.integers(-100, 100), st.integers(-(2**40), 2**40), st.sampled_from([-(2**31), 2**31 - 1])
)
BOUNDS, SMALL_BOUNDS = (
    st.tuples(numbers, numbers).map(lambda ends: (min(ends), max(ends))) for numbers in (NUMBERS, st.integers(-70, 70))
)


def _trunc_div(x: int, y: int) -> int:
    return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)


MEANING: dict[str, Callable[..., int]] = {
    **{name: getattr(operator, name) for name in ("add", "sub", "mul", "neg", "abs", "xor")},
    "sign": lambda x: (x > 0) - (x < 0),
    "not": operator.invert,
    "and": operator.and_,
    "or": operator.or_,
    **dict.fromkeys(("maximum", "clamp_min"), max),
    **dict.fromkeys(("minimum", "clamp_max"), min),
    "where": lambda x, y: x,
    "floor_div": operator.floordiv,
    "trunc_div": _trunc_div,
    "remainder": operator.mod,
    "fmod": lambda x, y: x - _trunc_div(x, y) * y,
    "pow": lambda x, y: x**y if y >= 0 else (x if abs(x) == 1 and y % 2 else int(abs(x) == 1)),
    "lshift": lambda x, y: x << y if 0 <= y < 64 else 0,
    "rshift": lambda x, y: x >> y if 0 <= y < 64 else x >> 63,
}


def test_every_integer_operation_has_a_meaning() -> None:
    assert MEANING.keys() == INTEGER_OPS


@pytest.mark.parametrize("op", sorted(INTEGER_OPS))
@given(data=st.data())
def test_results_are_within_their_bounds(op: str, data: st.DataObject) -> None:
    num_operands = 1 if op in ("neg", "abs", "sign", "not") else 2
    bounds = [data.draw(BOUNDS) for _ in range(num_operands)]
    if op in ("lshift", "rshift", "pow"):
        bounds[1] = data.draw(SMALL_BOUNDS)
    operands = [data.draw(st.integers(*b)) for b in bounds]
    if op in ("floor_div", "trunc_div", "remainder", "fmod") and operands[1] == 0:
        return
    lo, hi = result_bounds(op, *bounds)
    result = MEANING[op](*operands)
    if op == "pow" and abs(result) > 2**63:
        assert hi >= 2**63
    else:
        assert lo <= result <= hi
