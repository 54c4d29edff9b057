"""A stand-in for `cutlass`, the module of CuTe DSL: its scalars are tensors of pairs, with its integer arithmetic."""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class Scalar:
    """One value of every pair. Operands have one type, as those of `walk` do."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def to(self, kind: Callable[[Any], Scalar]) -> Scalar:
        return kind(self)

    def __neg__(self) -> Scalar:
        return Scalar(-self.values)

    def __invert__(self) -> Scalar:
        assert self.values.dtype != torch.bool, "~ of a Boolean is not its opposite in every release"
        return Scalar(~self.values)

    def __mod__(self, other: Scalar) -> Scalar:
        return _both(torch.fmod)(self, other)

    __hash__ = None  # type: ignore[assignment]


def _both(fn: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Scalar, Scalar], Scalar]:
    def of_scalars(x: Scalar, y: Scalar) -> Scalar:
        assert x.values.dtype == y.values.dtype, f"{x.values.dtype} and {y.values.dtype}"
        return Scalar(fn(x.values, y.values))

    return of_scalars


for _name in ("add", "sub", "mul", "truediv", "floordiv", "and_", "or_", "xor", "lshift", "rshift"):
    setattr(Scalar, f"__{_name.strip('_')}__", _both(getattr(operator, _name)))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Scalar, f"__{_name}__", _both(getattr(operator, _name)))


def _kind(dtype: torch.dtype) -> Callable[[Any], Scalar]:
    def make(x: Any) -> Scalar:
        return Scalar(x.values.to(dtype) if isinstance(x, Scalar) else torch.tensor(x, dtype=dtype))

    return make


def _select(condition: Scalar, x: Scalar, y: Scalar) -> Scalar:
    assert condition.values.dtype == torch.bool
    return _both(lambda a, b: torch.where(condition.values, a, b))(x, y)


def _math(name: str) -> Callable[..., Scalar]:
    fn = getattr(torch, {"absf": "abs", "roundeven": "round"}.get(name, name))
    return lambda *x: Scalar(fn(*(v.values for v in x)))


KINDS = {"Boolean": torch.bool, "Int32": torch.int32, "Int64": torch.int64, "Float32": torch.float32}
KINDS |= {"Float16": torch.float16, "BFloat16": torch.bfloat16}
MATH = (
    "floor",
    "ceil",
    "trunc",
    "roundeven",
    "absf",
    "exp",
    "exp2",
    "log",
    "log2",
    "sqrt",
    "rsqrt",
    "tanh",
    "sin",
    "cos",
)
MATH += ("erf", "atan2", "pow")
LANGUAGE = SimpleNamespace(
    **{name: _kind(dtype) for name, dtype in KINDS.items()},
    select_=_select,
    cute=SimpleNamespace(math=SimpleNamespace(**{name: _math(name) for name in MATH})),
)


class Table:
    """A captured tensor; reading beyond its end fails."""

    def __init__(self, values: Tensor) -> None:
        self.values, self.shape = values, values.shape

    def __getitem__(self, index: Scalar | tuple[Scalar, ...]) -> Scalar:
        places = [i.values for i in (index if isinstance(index, tuple) else (index,))]
        assert len(places) == self.values.ndim
        for place, size in zip(places, self.shape, strict=True):
            assert place.dtype == torch.int32
            assert not ((place < 0) | (place >= size)).any(), "out of bounds"
        return Scalar(self.values[tuple(place.long() for place in places)])
