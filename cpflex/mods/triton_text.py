"""A graph as the text of a Triton function: an expression for each node, written into its use if short and used once.

Integers are int32 where `overflow` proves that they fit and int64 elsewhere, whatever their dtype; 8- and 16-bit ones
are wrapped to it when they may leave it. 16-bit floats are computed with in fp32 and rounded after each operation.
Names that begin with ``tl.`` are Triton's, others those of `triton_math`. This file does not need Triton.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from cpflex.mods.graph import Arg, Graph, Node, Number, Ref
from cpflex.mods.overflow import INT32, INTEGER_OPS, POSITION, Bounds, all_of, fits, result_bounds
from cpflex.mods.trace import UnsupportedMod

MAX_DIMS = 8
"""Of a captured tensor."""

MAX_GIVEN = 2**30 - 1
"""Of the integers that a kernel is given; larger ones stay in the text, as 0 does, which is seldom one that changes."""


class _Value(NamedTuple):
    """A node as an expression, and what is known of it."""

    text: str
    dtype: torch.dtype
    axes: frozenset[str] = frozenset()
    """Axes of the tile along which it varies: q, kv."""
    bounds: Bounds = (0, 0)
    """Of an integer: it is an int32 if it fits, whatever its dtype, else an int64."""
    is_atom: bool = True
    """Needs no parentheses inside another expression."""
    number: Number | None = None
    """What it is, if it is a number in the graph."""

    @property
    def is_wide(self) -> bool:
        return not fits(self.bounds, INT32)

    @property
    def inner(self) -> str:
        return self.text if self.is_atom else f"({self.text})"

    @property
    def tensor(self) -> str:
        return self.text if self.number is None else _tensor(self.number, self.dtype).text


_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
_HALVES = (torch.float16, torch.bfloat16)
_FLOATS = (*_HALVES, torch.float32, torch.float64)

_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_INFIX = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^"}
_ON_BOOL = {"and": "&", "mul": "&", "or": "|", "add": "|", "xor": "^"}
_ON_BOOL |= {"maximum": "|", "clamp_min": "|", "minimum": "&", "clamp_max": "&"}
_EXTREMUM = {"maximum": "tl.maximum", "clamp_min": "tl.maximum", "minimum": "tl.minimum", "clamp_max": "tl.minimum"}
_TRITONS_OWN = ("exp", "exp2", "log", "log2", "rsqrt", "erf", "sin", "cos", "floor", "ceil", "abs")
_ON_FLOAT = {name: f"tl.{name}" for name in _TRITONS_OWN}
_ON_FLOAT |= {name: name for name in ("sign", "trunc", "expm1", "log1p", "tanh", "sigmoid", "atan2")}
_ON_FLOAT |= {"round": "round_half_even", "fmod": "float_mod"}
_ON_FLOAT |= {"remainder": "float_floor_mod", "floor_div": "float_floor_div"}
_NOT_ON_FLOAT64 = ("atan2", "fmod", "remainder", "floor_div")

_STEPS = {"floor", "ceil", "round", "trunc", "sign", "floor_div", "remainder", "fmod", *_COMPARE}
_ROUNDS_NOTHING = {"neg", "abs", "sign", "floor", "ceil", "round", "trunc", "where", *_EXTREMUM}
_INLINE = 52
"""A value that is used once is written into its use if it is no longer than this."""


class Writer:
    """Writes the nodes of a graph as assignments, in their order."""

    def __init__(self, graph: Graph, other: Writer | None = None) -> None:
        """
        Args:
            other: a function that gets the same numbers; nodes that are also its own read them at the same places.
        """
        self.lines: list[str] = []
        self.numbers: list[int | float] = [] if other is None else list(other.numbers)
        """What the function reads as ``numbers``."""
        self._places: dict[int, list[int]] = {} if other is None else dict(other._places)
        """Of the numbers of a node, by its identity."""
        self._identities: dict[Any, int] = {} if other is None else dict(other._identities)
        self._values: list[_Value] = []
        uses = [ref.index for refs in (graph.outputs, *map(graph.refs, graph.nodes)) for ref in refs]
        leads_to_a_step = _leads_to_a_step(graph)
        identities: list[int] = []
        for i, node in enumerate(graph.nodes):
            args = [("node", identities[arg.index]) if isinstance(arg, Ref) else repr(arg) for arg in node.args]
            identities.append(self._identities.setdefault((node.op, node.dtype, *args), len(self._identities)))
            value = self._value(node, leads_to_a_step[i], identities[i])
            may_inline = uses.count(i) == 1 and not _loads(value.text)
            is_short = len(value.text) <= _INLINE or Ref(i) == graph.outputs[0]
            self._values.append(value if may_inline and is_short else self._named(value))

    def block(self, ref: Ref) -> str:
        value = self._values[ref.index]
        if value.axes == {"q", "kv"}:
            return value.text
        return f"tl.broadcast_to({value.text}, (q_idx & kv_idx).shape)"

    def place(self, function: str, index: Arg, slot: int, dim: int) -> str:
        """By ``place`` the index as an element of that dim; by ``offset`` how far from the first element that is."""
        value = self._values[index.index] if isinstance(index, Ref) else _tensor(index, torch.int64)
        return f"{'wrapped_' if value.bounds[0] < 0 else ''}{function}({value.text}, sizes, {slot}, {dim})"

    def _named(self, value: _Value) -> _Value:
        if value.text.isidentifier():
            return value
        name = f"x{len(self.lines)}"
        self.lines.append(f"{name} = {value.text}")
        return value._replace(text=name, is_atom=True, number=None)

    def _value(self, node: Node, exact: bool, identity: int) -> _Value:
        op, args, dtype = node
        if dtype != torch.bool and dtype not in (*_INTEGERS, *_FLOATS):
            raise _no_form(op, dtype)
        if op == "input":
            axes = {"q_idx": "q", "kv_idx": "kv", "score": "q kv", "grad": "q kv"}.get(str(args[0]), "")
            return _Value(str(args[0]), dtype, frozenset(axes.split()), POSITION)
        if op == "const":
            return _tensor(args[0], dtype)
        if op in ("captured", "gather"):
            return self._loaded(node)
        # numbers take the dtype of the values beside them
        kinds = (self._values[a.index].dtype for a in args if isinstance(a, Ref) and op != "where")
        beside = next(kinds, dtype)
        x = [
            self._values[arg.index] if isinstance(arg, Ref) else _number(_as_torch_takes(arg, op, i, beside), beside)
            for i, arg in enumerate(args)
        ]
        axes = frozenset().union(*(v.axes for v in x))
        if op == "detach":
            return x[0]
        if op == "cast":
            return _cast(x[0], dtype)
        if op == "div" and not exact and x[0].axes and (reciprocal := _reciprocal(x[1])) is not None:
            op, x = "mul", [x[0], reciprocal]
        x = self._given(op, dtype, x, identity)
        if op in _COMPARE:
            return _comparison(_COMPARE[op], *x)
        if dtype == torch.bool:
            return _Value(_logic(op, x), dtype, axes, is_atom=False)
        if dtype in _INTEGERS:
            return _integer(op, dtype, axes, x)
        text = _float(op, dtype, x, exact)
        value = _Value(text, dtype, axes, is_atom=_is_call(text))
        return value if op in _ROUNDS_NOTHING else _rounded(value)

    def _given(self, op: str, dtype: torch.dtype, x: list[_Value], identity: int) -> list[_Value]:
        """The operands, with `numbers` in place of those in the text where a kernel gains nothing by knowing them."""
        numbers, given, places = list(self.numbers), list(x), []
        known = self._places.get(identity, [])

        def name(number: int | float) -> str:
            place = known[len(places)] if len(places) < len(known) else -1
            if place < 0 or numbers[place] != number:
                place = len(numbers)
                numbers.append(number)
            places.append(place)
            return f"numbers[{place}]"

        for i, (_, kind, *_, number) in enumerate(x):
            if number is None:
                continue
            if kind in (torch.float32, *_HALVES) and 2.0**-126 <= abs(number) < 2.0**127:
                given[i] = _Value(name(float(number)), kind)
            elif kind in (torch.int32, torch.int64) and 0 < abs(number) <= MAX_GIVEN:
                # of an integer the text knows the sign; it comes as an odd one above 1 (triton_source)
                size = f"{name(2 * abs(int(number)) + 1)} >> 1"
                text, bounds = (size, (1, MAX_GIVEN)) if number > 0 else (f"-({size})", (-MAX_GIVEN, -1))
                given[i] = _Value(text, kind, bounds=bounds, is_atom=False)
        if not _may_be_given(op, dtype, x, given):
            return x
        self.numbers = numbers
        self._places.setdefault(identity, places)
        return given

    def _loaded(self, node: Node) -> _Value:
        slot, *indices = node.args
        assert isinstance(slot, int), "the first argument says which captured tensor"
        if len(indices) > MAX_DIMS:
            raise _no_form(f"a table of {len(indices)} dims", node.dtype)
        places = [self.place("offset", index, slot, dim) for dim, index in enumerate(indices)]
        axes = frozenset().union(*(self._values[i.index].axes for i in indices if isinstance(i, Ref)))
        load = "load_pairs" if axes == {"q", "kv"} else "tl.load"
        text = f"{load}({' + '.join([f'buffers[{slot}]', *places])})"
        if node.dtype in (torch.int8, torch.uint8, torch.int16):
            text += ".to(tl.int32)"
        elif node.dtype in _HALVES:
            text += ".to(tl.float32)"
        return _Value(text, node.dtype, axes, all_of(node.dtype) if node.dtype in _INTEGERS else (0, 0))


def _loads(text: str) -> bool:
    return "tl.load(" in text or "load_pairs(" in text


def _leads_to_a_step(graph: Graph) -> list[bool]:
    """Which values reach a comparison, a cast or another jump, where the last bit of a float can decide."""
    leads = [node.dtype in _HALVES for node in graph.nodes]
    for i in reversed(range(len(graph.nodes))):
        node = graph.nodes[i]
        if leads[i] or node.op in _STEPS or (node.op == "cast" and not node.dtype.is_floating_point):
            for ref in graph.refs(node):
                leads[ref.index] = True
    return leads


def _is_call(text: str) -> bool:
    """Calls and attributes only: `f(...)`, `x.to(...)`."""
    depth = 0
    for before, letter in zip(" " + text, text, strict=False):
        depth += (letter == "(") - (before == ")")
        if depth == 0 and letter not in ")." and not letter.isalnum() and letter != "_":
            return False
    return text.endswith(")") and not text.startswith("(")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).replace("torch.", "tl.")


def _no_form(op: str, dtype: torch.dtype) -> UnsupportedMod:
    return UnsupportedMod(
        f"{op} ({str(dtype).removeprefix('torch.')}) has no Triton form; write the mod without it, "
        'or pass kernel_options={"backend": "reference"}'
    )


# -- numbers


def _as_torch_takes(number: Any, op: str, place: int, dtype: torch.dtype) -> Any:
    """Rounded to the 16-bit dtype of the values beside it, except where torch computes with it in fp32."""
    if dtype not in _HALVES or (place == 1 and op in ("add", "sub", "mul", "div", "floor_div")):
        return number
    return torch.tensor(number, dtype=dtype).item()


def _number(number: Any, dtype: torch.dtype) -> _Value:
    """As a Python number, if Triton makes of it what torch does."""
    if dtype in (torch.bool, torch.float64):
        return _tensor(number, dtype)
    if dtype in _INTEGERS:
        value = int(number) & 255 if dtype == torch.uint8 else int(number)
        if not fits((value, value), all_of(dtype)):
            raise _no_form(f"the number {number}", dtype)
        if not fits((value, value), INT32):
            return _tensor(value, dtype)
        return _Value(repr(value), dtype, bounds=(value, value), is_atom=value >= 0, number=value)
    value = float(number)
    single = torch.tensor(value, dtype=torch.float32).item()
    value = value if 2.0**-126 <= abs(single) < math.inf else single
    if 0 < abs(single) < 2.0**-126:
        return _tensor(single, dtype)  # Triton would make it an fp64
    text = repr(value) if math.isfinite(value) else f'float("{value}")'
    return _Value(text, dtype, is_atom=not text.startswith("-"), number=value)


def _may_be_given(op: str, dtype: torch.dtype, x: list[_Value], given: list[_Value]) -> bool:
    if op in _COMPARE:
        return True
    if dtype.is_floating_point:
        return op in ("add", "sub", "mul", "div", "where", *_EXTREMUM)
    if op not in ("add", "sub", *_EXTREMUM) or dtype not in (torch.int32, torch.int64):
        return False  # a division by a number that is known takes a few instructions
    return fits(_raw_bounds(op, given), INT32) or not fits(_raw_bounds(op, x), INT32)


def _raw_bounds(op: str, operands: list[_Value]) -> Bounds:
    return result_bounds(op, *(v.bounds for v in operands))


def _tensor(number: Any, dtype: torch.dtype) -> _Value:
    """As a 0-d tensor."""
    bounds = (0, 0)
    if dtype in _INTEGERS:
        bounds = (int(number), int(number))
        text, kind = repr(int(number)), "tl.int32" if fits(bounds, INT32) else "tl.int64"
    elif dtype == torch.bool:
        text, kind = repr(bool(number)), "tl.int1"
    else:
        text = repr(float(number)) if math.isfinite(number) else f'float("{float(number)}")'
        kind = "tl.float64" if dtype == torch.float64 else "tl.float32"
    return _Value(f"tl.full([], {text}, {kind})", dtype, bounds=bounds, number=number)


# -- bools


def _comparison(symbol: str, x: _Value, y: _Value) -> _Value:
    if x.dtype == torch.bool and symbol not in ("==", "!="):
        x, y = _cast(x, torch.int32), _cast(y, torch.int32)
    if x.is_wide and not y.is_wide:
        x = _narrowed(x, y)
    elif y.is_wide and not x.is_wide:
        y = _narrowed(y, x)
    text, axes = f"{x.inner} {symbol} {y.inner}", x.axes | y.axes
    if axes or not (x.is_wide or y.is_wide or x.dtype.is_floating_point):
        return _Value(text, torch.bool, axes, is_atom=False)
    return _Value(f"flag({text})", torch.bool)


def _narrowed(wide: _Value, other: _Value) -> _Value:
    """An int64 compared with an int32, as an int32 too if it varies less: then blocks are compared in int32."""
    lo, hi = other.bounds[0] - 1, other.bounds[1] + 1
    if not fits((lo, hi), INT32) or (wide.axes and wide.axes >= other.axes):
        return wide
    if wide.number is not None:
        return _number(min(max(wide.number, lo), hi), torch.int64)
    return _Value(f"within_int32({wide.text}, {lo}, {hi})", torch.int64, wide.axes, (lo, hi))


def _logic(op: str, x: list[_Value]) -> str:
    if op == "not":
        return f"~{x[0].inner}"
    if op == "where":
        return f"tl.where({x[0].text}, {x[1].text}, {x[2].text})"
    if op not in _ON_BOOL:
        raise _no_form(op, torch.bool)
    return f"{x[0].inner} {_ON_BOOL[op]} {x[1].inner}"


# -- integers


def _integer(op: str, dtype: torch.dtype, axes: frozenset[str], x: list[_Value]) -> _Value:
    if op not in INTEGER_OPS:
        raise _no_form(op, dtype)
    operands = x[1:] if op == "where" else x
    raw = result_bounds(op, *(v.bounds for v in operands))
    meeting = operands[:1] if op in ("lshift", "rshift", "pow") else operands
    is_wide = dtype == torch.int64 and (not fits(raw, INT32) or any(v.is_wide for v in meeting))
    if is_wide and not any(v.is_wide for v in meeting):
        # where an int32 meets an int64 both are int64, so one conversion is enough: of what varies least
        i = min((i for i, v in enumerate(x) if v in meeting), key=lambda i: (x[i].number is not None, len(x[i].axes)))
        x = [*x[:i], _as_int64(x[i]), *x[i + 1 :]]
    text = _integer_text(op, dtype, x, is_wide)
    value = _Value(text, dtype, axes, raw, is_atom=_is_call(text))
    if not fits(raw, all_of(dtype)):
        # int32 and int64 wrap around by themselves
        value = value._replace(bounds=all_of(dtype)) if dtype in (torch.int32, torch.int64) else _wrapped(value, dtype)
    if is_wide and not value.is_wide:
        value = value._replace(text=f"{value.inner}.to(tl.int32)", is_atom=True)
    return value


def _as_int64(x: _Value) -> _Value:
    text = f"{x.inner}.to(tl.int64)" if x.number is None else f"tl.full([], {x.number}, tl.int64)"
    return x._replace(text=text, is_atom=True, number=None)


def _integer_text(op: str, dtype: torch.dtype, x: list[_Value], is_wide: bool) -> str:
    first, last = x[0], x[-1]
    if op in _INFIX:
        return f"{first.inner} {_INFIX[op]} {last.inner}"
    if op in ("neg", "not"):
        return f"{'-' if op == 'neg' else '~'}{first.inner}"
    if op in _EXTREMUM:
        return f"{_EXTREMUM[op]}({first.text}, {last.text})"
    if op == "where":
        return f"tl.where({', '.join(v.text for v in x)})"
    if op == "abs":
        return f"tl.abs({first.text})"
    if op == "sign":
        return f"sign({first.text})"
    if op == "lshift":
        return _shift("<<", "shift_left", first, last, torch.iinfo(dtype).bits)
    if op == "rshift":
        return _shift(">>", "shift_right", first, last, 64 if is_wide else 32)
    if op == "pow":
        if last.bounds[1] < 0:
            raise _no_form("an integer to a negative power", dtype)
        return f"int_power({first.tensor}, {last.tensor}, {max(1, last.bounds[1].bit_length())})"
    return _division(op, first, last)


def _shift(symbol: str, function: str, x: _Value, n: _Value, bits: int) -> str:
    if fits(n.bounds, (0, bits - 1)):
        return f"{x.inner} {symbol} {n.inner}"
    return f"{function}({x.tensor}, {n.tensor}, {bits})"


def _division(op: str, x: _Value, y: _Value) -> str:
    symbol = "//" if op in ("floor_div", "trunc_div") else "%"
    if op in ("trunc_div", "fmod") or (x.bounds[0] >= 0 and y.bounds[0] >= 0):
        return f"{x.inner} {symbol} {y.inner}"
    divisor = y.bounds[0]
    if divisor == y.bounds[1] and divisor > 0 and divisor & (divisor - 1) == 0:
        # shifting a negative number rounds it down
        return f"{x.inner} >> {divisor.bit_length() - 1}" if symbol == "//" else f"{x.inner} & {divisor - 1}"
    return f"{'floor_div' if symbol == '//' else 'floor_mod'}({x.text}, {y.text})"


def _wrapped(x: _Value, dtype: torch.dtype) -> _Value:
    """Any integer, as an integer dtype keeps it."""
    if dtype == torch.uint8:
        low = f"{x.inner}.to(tl.int32)" if x.is_wide else x.inner
        return x._replace(text=f"{low} & 255", dtype=dtype, bounds=(0, 255), is_atom=False)
    back = "" if dtype == torch.int32 else ".to(tl.int32)"
    return x._replace(text=f"{x.inner}.to({_name(dtype)}){back}", dtype=dtype, bounds=all_of(dtype), is_atom=True)


# -- floats


def _float(op: str, dtype: torch.dtype, x: list[_Value], exact: bool) -> str:
    first, last = x[0], x[-1]
    if op in ("add", "sub", "mul"):
        return f"{first.inner} {_INFIX[op]} {last.inner}"
    if op == "neg":
        return f"{first.inner} * -1.0"  # Triton's -x is 0 - x, which makes 0 of 0 and not -0
    if op in _EXTREMUM:
        return f"{_EXTREMUM[op]}({first.text}, {last.text}, propagate_nan=tl.PropagateNan.ALL)"
    if op == "where":
        return f"tl.where({', '.join(v.text for v in x)})"
    if op == "div":
        return _quotient(first, last, dtype, exact)
    if op == "sqrt":
        return f"tl.sqrt_rn({first.text})" if exact and dtype != torch.float64 else f"tl.sqrt({first.text})"
    if op == "pow":
        return _float_power(first, last, dtype)
    if op not in _ON_FLOAT or (dtype == torch.float64 and op in _NOT_ON_FLOAT64):
        raise _no_form(op, dtype)
    return f"{_ON_FLOAT[op]}({', '.join(v.tensor for v in x)})"


def _quotient(x: _Value, y: _Value, dtype: torch.dtype, exact: bool) -> str:
    """Correctly rounded if need be; else by the reciprocal of what varies less, which is the same within 2 ulp; that of
    a number is made a product before.
    """
    if dtype == torch.float64:
        return f"{x.inner} / {y.inner}"
    if exact or y.axes >= x.axes:
        return f"tl.div_rn({x.text}, {y.text})"
    if y.number is None:
        return f"{x.inner} * tl.div_rn(1.0, {y.text})"
    return f"tl.div_rn({x.text}, {y.text})"


def _reciprocal(x: _Value) -> _Value | None:
    """Of a number, if fp32 has it and its own in full precision."""
    if x.number is None or x.dtype == torch.float64 or not 2.0**-126 <= abs(x.number) <= 2.0**126:
        return None
    return _number(1.0 / x.number, x.dtype)


def _float_power(x: _Value, y: _Value, dtype: torch.dtype) -> str:
    """As torch does it, with other forms for a few exponents."""
    if x.number == 2:
        return f"tl.exp2({y.text})"
    reciprocal, sqrt = "tl.div_rn(1.0, {})", "tl.sqrt_rn({})"
    if dtype == torch.float64:
        reciprocal, sqrt = "1.0 / {}", "tl.sqrt({})"
    special = {1.0: "{}", 2.0: "square({})", 3.0: "cube({})", -1.0: reciprocal, -2.0: reciprocal.format("square({})")}
    special |= {0.5: sqrt, -0.5: reciprocal.format(sqrt)}
    if y.number in special:
        return special[y.number].format(x.inner)
    return f"power({x.tensor}, {y.tensor})"


def _cast(x: _Value, dtype: torch.dtype) -> _Value:
    if dtype == torch.bool:
        return _comparison("!=", x, _number(0, x.dtype))
    if dtype.is_floating_point:
        kind = torch.float64 if dtype == torch.float64 else torch.float32
        computed_in = torch.float32 if x.dtype in _HALVES else x.dtype
        text = x.text if computed_in == kind else f"{x.inner}.to({_name(kind)})"
        return _rounded(_Value(text, dtype, x.axes, is_atom=x.is_atom or computed_in != kind))
    if x.dtype == torch.bool:
        return _Value(f"{x.inner}.to(tl.int32)", dtype, x.axes, (0, 1))
    if x.dtype.is_floating_point:
        x = _Value(f"{x.inner}.to(tl.int64)", torch.int64, x.axes, all_of(torch.int64))
    return x._replace(dtype=dtype) if fits(x.bounds, all_of(dtype)) else _wrapped(x, dtype)


def _rounded(x: _Value) -> _Value:
    """16-bit floats are computed with in fp32 and rounded after each operation, as torch does."""
    if x.dtype == torch.float16:
        return x._replace(text=f"{x.inner}.to(tl.float16).to(tl.float32)", is_atom=True)
    if x.dtype == torch.bfloat16:
        return x._replace(text=f"round_to_bf16({x.text})", is_atom=True)
    return x
