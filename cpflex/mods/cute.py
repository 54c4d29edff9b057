"""A mod on the scalars of CuTe DSL: its graph, walked while a kernel of another library is traced.

CuTe DSL runs Python to write its kernels, so no source is generated: every node becomes an operation on a scalar of one
(query, key) pair. A result is that of `evaluate`: a mask's to the bit, a float's within a few ulp. Positions behave as
int64, computed with in Int32 wherever bounds prove it the same. Numbers of the mod are part of the kernel: another
window or softcap compiles another.

This file needs no package: ``language`` is the module `cutlass`, or what a test puts in its place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpflex.mods.graph import Arg, Graph, Node, Ref
from cpflex.mods.overflow import INT32, INTEGER_OPS, POSITION, Bounds, all_of, fits, result_bounds
from cpflex.mods.trace import UnsupportedMod


class _Value(NamedTuple):
    """A scalar of the language. An integer is an Int32 if its bounds fit, whatever its dtype, else an Int64; floats of
    16 bits are Float32.
    """

    scalar: Any
    dtype: torch.dtype
    bounds: Bounds = (0, 0)

    @property
    def is_wide(self) -> bool:
        return not fits(self.bounds, INT32)


_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
_HALVES = (torch.float16, torch.bfloat16)
_FLOATS = (*_HALVES, torch.float32)

_COMPARE = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
_INFIX = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}
_BITS = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}
_ON_BOOL = _BITS | {"mul": operator.and_, "add": operator.or_}
_ON_BOOL |= {"maximum": operator.or_, "clamp_min": operator.or_, "minimum": operator.and_, "clamp_max": operator.and_}
_LARGER, _SMALLER = ("maximum", "clamp_min"), ("minimum", "clamp_max")
_MATH = {name: name for name in ("floor", "ceil", "trunc", "exp", "exp2", "log", "log2", "sqrt")}
_MATH |= {name: name for name in ("rsqrt", "tanh", "sin", "cos", "erf", "atan2", "pow")}
_MATH |= {"round": "roundeven", "abs": "absf"}
_ROUNDS_NOTHING = {"neg", "abs", "sign", "floor", "ceil", "round", "trunc", "where", *_LARGER, *_SMALLER}
_POWERS: dict[Any, Callable[[Any, Any], Any]] = {
    1.0: lambda x, of: x,
    2.0: lambda x, of: x * x,
    3.0: lambda x, of: x * x * x,
    0.5: lambda x, of: of.cute.math.sqrt(x),
    -0.5: lambda x, of: of.Float32(1.0) / of.cute.math.sqrt(x),
    -1.0: lambda x, of: of.Float32(1.0) / x,
    -2.0: lambda x, of: of.Float32(1.0) / (x * x),
}
_LARGEST_POWER = 8
"""Of an integer: it is multiplied by itself."""


def walk(
    graph: Graph,
    language: Any,
    inputs: Mapping[str, Any],  # Int32 scalars; score and grad Float32
    captured: Sequence[Any],  # as `tables_of` makes them, by then tensors of the language
) -> list[Any]:
    """The outputs of a graph for one pair: a Boolean of a mask, Float32 of a score_mod and its vjp.

    Raises:
        UnsupportedMod: an operation has no CuTe form here.
    """
    walker = _Walker(graph, language, inputs, captured)
    return [walker.values[ref.index].scalar for ref in graph.outputs]


def require_form(graph: Graph) -> None:
    """Raise what `walk` would raise."""
    nothing = _Nothing()
    walk(graph, nothing, dict.fromkeys(graph.inputs, nothing), [nothing] * len(graph.nodes))


def tables_of(captured: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Captured tensors as the kernels take them: contiguous, of one dim at least, bools as uint8; of one dim if they
    have one element, whose strides would not say which dim is the last.
    """
    tables = [t.detach().to(device).contiguous() for t in captured]
    tables = [t.view(torch.uint8) if t.dtype == torch.bool else t for t in tables]
    return [t.view(1) if t.numel() == 1 else t for t in tables]


class _Nothing:
    """A scalar, a table and a language of which nothing is known."""

    def _same(self, *_: Any) -> _Nothing:
        return self

    __getattr__ = __call__ = __getitem__ = _same
    __add__ = __sub__ = __mul__ = __truediv__ = __floordiv__ = __mod__ = __neg__ = __invert__ = _same
    __and__ = __or__ = __xor__ = __lshift__ = __rshift__ = _same
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _same  # type: ignore[assignment]
    __hash__ = object.__hash__

    def __len__(self) -> int:
        return 0


def _no_form(op: str, dtype: torch.dtype) -> UnsupportedMod:
    return UnsupportedMod(
        f"{op} ({str(dtype).removeprefix('torch.')}) has no CuTe form; write the mod without it, "
        'or pass kernel_options={"backend": "triton"}'
    )


class _Walker:
    """The values of all nodes, in their order."""

    def __init__(self, graph: Graph, language: Any, inputs: Mapping[str, Any], captured: Sequence[Any]) -> None:
        self._of, self._inputs, self._captured = language, inputs, captured
        self.values: list[_Value] = []
        for node in graph.nodes:
            self.values.append(self._value(node))

    def _value(self, node: Node) -> _Value:
        op, args, dtype = node
        if dtype != torch.bool and dtype not in (*_INTEGERS, *_FLOATS):
            raise _no_form(op, dtype)
        if op == "input":
            return _Value(self._inputs[str(args[0])], dtype, POSITION)
        if op == "const":
            return self._number(args[0], dtype)
        if op in ("captured", "gather"):
            return self._loaded(node)
        kinds = (self.values[a.index].dtype for a in args if isinstance(a, Ref) and op != "where")
        beside = next(kinds, dtype)
        x = [self._operand(arg, op, place, beside) for place, arg in enumerate(args)]
        if op == "detach":
            return x[0]
        if op == "cast":
            return self._cast(x[0], dtype)
        if op in _COMPARE:
            return self._compared(op, *x)
        if dtype == torch.bool:
            return self._logic(op, x)
        if dtype in _INTEGERS:
            return self._integer(op, dtype, x)
        exponent = args[1] if op == "pow" and not isinstance(args[1], Ref) else None
        value = _Value(self._float(op, dtype, [v.scalar for v in x], exponent), dtype)
        return value if op in _ROUNDS_NOTHING else self._rounded(value)

    # -- what operations read

    def _operand(self, arg: Arg, op: str, place: int, beside: torch.dtype) -> _Value:
        if isinstance(arg, Ref):
            return self.values[arg.index]
        if beside in _HALVES and not (place == 1 and op in ("add", "sub", "mul", "div")):
            arg = torch.tensor(arg, dtype=beside).item()  # elsewhere torch computes with it in fp32
        return self._number(arg, beside)

    def _number(self, number: Any, dtype: torch.dtype) -> _Value:
        if dtype == torch.bool:
            return _Value(self._of.Boolean(bool(number)), dtype)
        if dtype not in _INTEGERS:
            return _Value(self._of.Float32(float(number)), dtype)
        value = int(number) & 255 if dtype == torch.uint8 else int(number)
        if not fits((value, value), all_of(dtype)):
            raise _no_form(f"the number {number}", dtype)
        kind = self._of.Int32 if fits((value, value), INT32) else self._of.Int64
        return _Value(kind(value), dtype, (value, value))

    def _loaded(self, node: Node) -> _Value:
        slot, *indices = node.args
        assert isinstance(slot, int), "the first argument says which captured tensor"
        table, of = self._captured[slot], self._of
        at = [of.Int32(0)]
        if len(indices) == len(table.shape):
            places = enumerate(self._operand(index, "gather", dim, torch.int64) for dim, index in enumerate(indices))
            at = [self._place(i, of.Int32(table.shape[dim])) for dim, i in places]
        element = table[at[0] if len(at) == 1 else tuple(at)]
        if node.dtype == torch.bool:
            return _Value(of.Int32(element) != of.Int32(0), node.dtype)
        if node.dtype in _FLOATS:
            return _Value(of.Float32(element), node.dtype)
        kind = of.Int64 if node.dtype == torch.int64 else of.Int32
        return _Value(kind(element), node.dtype, all_of(node.dtype))

    def _place(self, i: _Value, size: Any) -> Any:
        """Negative indices count from the end; the rest is clamped: a pad position never reads out of bounds."""
        of, index = self._of, i.scalar
        kind = of.Int64 if i.is_wide else of.Int32
        size = kind(size)
        if i.bounds[0] < 0:
            index = self._select(kind, index < kind(0), index + size, index)
            index = self._select(kind, index < kind(0), kind(0), index)
        return of.Int32(self._select(kind, index < size, index, size - kind(1)))

    def _select(self, kind: Callable[[Any], Any], condition: Any, x: Any, y: Any) -> Any:
        return kind(self._of.select_(condition, x, y))  # it may return a number that has forgotten its kind

    # -- bools

    def _compared(self, op: str, x: _Value, y: _Value) -> _Value:
        if x.dtype == torch.bool:
            x, y = self._cast(x, torch.int32), self._cast(y, torch.int32)
        if x.is_wide != y.is_wide:
            x, y = self._wide(x), self._wide(y)
        return _Value(_COMPARE[op](x.scalar, y.scalar), torch.bool)

    def _logic(self, op: str, x: list[_Value]) -> _Value:
        first, *rest = (v.scalar for v in x)
        if op == "not":
            return _Value(self._not(first), torch.bool)
        if op == "where":
            return _Value((first & rest[0]) | (self._not(first) & rest[1]), torch.bool)
        if op not in _ON_BOOL:
            raise _no_form(op, torch.bool)
        return _Value(_ON_BOOL[op](first, rest[0]), torch.bool)

    def _not(self, x: Any) -> Any:
        return x == self._of.Boolean(False)

    # -- integers

    def _wide(self, x: _Value) -> _Value:
        return x if x.is_wide or x.dtype not in _INTEGERS else x._replace(scalar=self._of.Int64(x.scalar))

    def _integer(self, op: str, dtype: torch.dtype, x: list[_Value]) -> _Value:
        if op not in INTEGER_OPS:
            raise _no_form(op, dtype)
        operands = x[1:] if op == "where" else x
        raw = result_bounds(op, *(v.bounds for v in operands))
        is_wide = not fits(raw, INT32) or any(v.is_wide for v in operands)
        if is_wide:
            x = [self._wide(v) for v in x]
        scalar = self._integer_scalar(op, dtype, x, self._of.Int64 if is_wide else self._of.Int32)
        return self._wrapped(_Value(scalar, dtype, raw), is_wide)

    def _integer_scalar(self, op: str, dtype: torch.dtype, x: list[_Value], kind: Callable[[int], Any]) -> Any:
        first, last, select = x[0].scalar, x[-1].scalar, partial(self._select, kind)
        if op in _INFIX or op in _BITS:
            return (_INFIX | _BITS)[op](first, last)
        if op in ("neg", "not"):
            return -first if op == "neg" else ~first
        if op in _LARGER or op in _SMALLER:
            return select(first > last if op in _LARGER else first < last, first, last)
        if op == "where":
            return select(first, x[1].scalar, last)
        if op == "abs":
            return select(first < kind(0), -first, first)
        if op == "sign":
            return select(first > kind(0), kind(1), select(first < kind(0), kind(-1), kind(0)))
        if op in ("lshift", "rshift"):
            if not fits(x[-1].bounds, (0, torch.iinfo(dtype).bits - 1)):
                raise _no_form(f"{op} by a number that may be out of range", dtype)
            return first << last if op == "lshift" else first >> last
        if op == "pow":
            return self._power(x[0], x[-1], kind)
        return self._division(op, x[0], x[-1], kind)

    def _power(self, x: _Value, y: _Value, kind: Callable[[int], Any]) -> Any:
        times = y.bounds[0]
        if times != y.bounds[1] or not 0 <= times <= _LARGEST_POWER:
            raise _no_form(f"an integer to another power than 0 to {_LARGEST_POWER}", x.dtype)
        scalar = kind(1)
        for _ in range(times):
            scalar = scalar * x.scalar
        return scalar

    def _division(self, op: str, x: _Value, y: _Value, kind: Callable[[int], Any]) -> Any:
        """In CuTe DSL ``//`` rounds down, and ``%`` has the sign of what is divided."""
        first, last, divisor = x.scalar, y.scalar, y.bounds[0]
        is_plain = x.bounds[0] >= 0 and y.bounds[0] > 0
        if op == "fmod" or (op == "remainder" and is_plain):
            return first % last
        if op in ("floor_div", "remainder") and divisor == y.bounds[1] > 0 and divisor & (divisor - 1) == 0:
            # shifting a negative number rounds it down
            return first >> kind(divisor.bit_length() - 1) if op == "floor_div" else first & kind(divisor - 1)
        if op == "remainder":
            return first - first // last * last
        if op == "floor_div" or is_plain:
            return first // last
        return (first - first % last) // last

    def _wrapped(self, x: _Value, is_wide: bool) -> _Value:
        """An integer as its dtype keeps it, and as narrow as its bounds."""
        of, dtype = self._of, x.dtype
        if not fits(x.bounds, all_of(dtype)):
            x = x._replace(bounds=all_of(dtype))
        if is_wide and not x.is_wide:
            x = x._replace(scalar=x.scalar.to(of.Int32))
        if dtype in (torch.int32, torch.int64) or x.bounds != all_of(dtype):
            return x
        if dtype == torch.uint8:
            return x._replace(scalar=x.scalar & of.Int32(255))
        unused = of.Int32(32 - torch.iinfo(dtype).bits)
        return x._replace(scalar=(x.scalar << unused) >> unused)

    # -- floats

    def _float(self, op: str, dtype: torch.dtype, x: list[Any], exponent: Arg | None) -> Any:
        first, last, of = x[0], x[-1], self._of
        select = partial(self._select, of.Float32)
        if op in _INFIX:
            return _INFIX[op](first, last)
        if op == "div":
            return first / last
        if op == "neg":
            return -first
        if op == "where":
            return select(first, x[1], last)
        if op in _LARGER or op in _SMALLER:  # NaN if either is
            return select((first > last if op in _LARGER else first < last) | (first != first), first, last)
        if op == "sign":
            zero, one = of.Float32(0.0), of.Float32(1.0)
            return select(first > zero, one, select(first < zero, -one, zero))
        if op == "sigmoid":
            one = of.Float32(1.0)
            return one / (one + of.cute.math.exp(-first))
        if op not in _MATH:
            raise _no_form(op, dtype)
        if exponent in _POWERS:  # as torch does them
            return _POWERS[exponent](first, of)
        return getattr(of.cute.math, _MATH[op])(*x)

    def _rounded(self, x: _Value) -> _Value:
        """16-bit floats are computed with in fp32 and rounded after each operation, as torch does."""
        if x.dtype not in _HALVES:
            return x
        half = self._of.Float16 if x.dtype == torch.float16 else self._of.BFloat16
        return x._replace(scalar=x.scalar.to(half).to(self._of.Float32))

    def _cast(self, x: _Value, dtype: torch.dtype) -> _Value:
        of = self._of
        if dtype == torch.bool:
            return self._compared("ne", x, self._number(0, x.dtype))
        if x.dtype == torch.bool:
            scalar = self._select(of.Int32, x.scalar, of.Int32(1), of.Int32(0))
            x = _Value(scalar, torch.int32, (0, 1))
        if dtype.is_floating_point:
            scalar = x.scalar if x.dtype.is_floating_point else of.Float32(x.scalar)
            return self._rounded(_Value(scalar, dtype))
        if x.dtype.is_floating_point:
            x = _Value(x.scalar.to(of.Int64), torch.int64, all_of(torch.int64))
        return self._wrapped(x._replace(dtype=dtype), x.is_wide)
