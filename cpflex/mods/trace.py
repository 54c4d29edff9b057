"""Callable -> Mod: a mod is called once, on 0-d meta tensors, and the aten operations that it performs are written
down.

Nothing is executed on data, so a mod may hold tables of any size on any device. Tensors that the mod did not receive as
arguments are captured: 0-d ones by value, larger ones through indexing only.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from cpflex.mods.graph import POSITIONS, Arg, GraphBuilder, Mod, Ref


class UnsupportedMod(NotImplementedError):
    """A mask_mod or score_mod does something that cannot be evaluated tile by tile."""


# aten name -> op of the graph, for operations whose operands are promoted to one dtype
_COMPARE = {name: name for name in ("eq", "ne", "lt", "le", "gt", "ge")}
_BINARY = {
    **{name: name for name in ("add", "sub", "mul", "maximum", "minimum", "remainder", "fmod", "pow", "atan2")},
    "bitwise_and": "and",
    "bitwise_or": "or",
    "bitwise_xor": "xor",
    "__and__": "and",
    "__or__": "or",
    "__xor__": "xor",
    "bitwise_left_shift": "lshift",
    "bitwise_right_shift": "rshift",
    "__lshift__": "lshift",
    "__rshift__": "rshift",
    "floor_divide": "floor_div",
}
_LOGICAL = {"logical_and": "and", "logical_or": "or", "logical_xor": "xor"}
_UNARY = {
    **{name: name for name in ("neg", "abs", "sign", "floor", "ceil", "round", "trunc", "exp", "exp2", "expm1", "log")},
    **{name: name for name in ("log2", "log1p", "sqrt", "rsqrt", "tanh", "sigmoid", "sin", "cos", "erf")},
    "sgn": "sign",
    "bitwise_not": "not",
}
_ALIASES = ("alias", "clone", "lift_fresh", "lift_fresh_copy", "lift", "view", "expand", "squeeze", "_unsafe_view")
_CONSTANTS = {"zeros": 0, "ones": 1, "zeros_like": 0, "ones_like": 1, "new_zeros": 0, "new_ones": 1}
_FILLS = {"full": 1, "full_like": 1, "new_full": 2, "scalar_tensor": 0}
_REDUCTIONS = ("sum", "mean", "prod", "any", "all", "amax", "amin", "max", "min", "argmax", "argmin", "cumsum", "dot")
_REDUCTIONS += (
    "mm",
    "mv",
    "bmm",
    "softmax",
    "_softmax",
    "logsumexp",
    "norm",
    "linalg_vector_norm",
    "topk",
    "sort",
    "vdot",
)
_RANDOM = ("rand", "randn", "randint", "bernoulli", "rand_like", "randn_like", "native_dropout", "uniform", "normal")

SUPPORTED = sorted(
    {*_COMPARE, *_BINARY, *_LOGICAL, *_UNARY, *_CONSTANTS, *_FILLS}
    | {"div", "clamp", "where", "masked_fill", "logical_not", "to", "index", "select", "detach", "rsub", "reciprocal"}
    | {"square", "relu", "leaky_relu", "hardtanh", "gelu", "silu", "isnan", "isinf"}
)


@dataclass(frozen=True)
class _Table:
    """A captured tensor of one or more dims that has been indexed in some of them."""

    slot: int
    indices: tuple[Arg | None, ...]  # one per dim of the captured tensor; None: not indexed yet

    def free_dims(self) -> list[int]:
        return [dim for dim, index in enumerate(self.indices) if index is None]


def trace_mask_mod(mask_mod: Callable[..., Tensor]) -> Mod:
    """Trace ``mask_mod(b, h, q_idx, kv_idx) -> bool Tensor``.

    Raises:
        UnsupportedMod: an operation that is not pointwise, Python control flow on positions, randomness, a result that
        is not bool.
    """
    return _trace(mask_mod, POSITIONS, "mask_mod")


def trace_score_mod(score_mod: Callable[..., Tensor]) -> Mod:
    """Trace ``score_mod(score, b, h, q_idx, kv_idx) -> Tensor``; scores are float32. Raises as `trace_mask_mod`."""
    return _trace(score_mod, ("score", *POSITIONS), "score_mod")


def _trace(fn: Callable[..., Tensor], names: Sequence[str], kind: str) -> Mod:
    name = getattr(fn, "__name__", type(fn).__name__)
    recorder = _Recorder(f"{kind} {name!r}")
    with torch.inference_mode(False), torch.no_grad(), contextlib.ExitStack() as modes:
        for device_type in filter(torch.is_autocast_enabled, ("cpu", "cuda")):  # it would write casts into the graph
            modes.enter_context(torch.autocast(device_type, enabled=False))
        inputs = [recorder.input(n) for n in names]
        modes.enter_context(_PositionsStayTensors(recorder))
        modes.enter_context(recorder)
        try:
            result = fn(*inputs)
        except TypeError as error:
            if "to numpy" in str(error):
                raise UnsupportedMod(f"{recorder.what} uses numpy; torch.from_numpy its arrays outside") from error
            raise
    if not isinstance(result, Tensor):
        raise UnsupportedMod(
            f"{recorder.what} must return a Tensor computed from its arguments; got {type(result).__name__}"
        )
    ref = recorder.value(result)
    if not isinstance(ref, Ref) or result.ndim != 0:
        raise UnsupportedMod(
            f"{recorder.what} must be pointwise: one value for one (b, h, q_idx, kv_idx); "
            f"got shape {tuple(result.shape)}"
        )
    if kind == "mask_mod" and result.dtype != torch.bool:
        raise UnsupportedMod(
            f"{recorder.what} must return bool; got {result.dtype} - compare it, for instance `x != 0`"
        )
    if kind == "score_mod":
        if not result.dtype.is_floating_point:
            raise UnsupportedMod(f"{recorder.what} must return a floating point score; got {result.dtype}")
        ref = recorder.builder.cast(ref, torch.float32)
    graph = recorder.builder.graph(ref)
    return _drop_unused_captures(Mod(graph, tuple(recorder.captured), name))


def _drop_unused_captures(mod: Mod) -> Mod:
    slots = sorted({node.args[0] for node in mod.graph.nodes if node.op in ("captured", "gather")})  # type: ignore[type-var]
    new = {slot: i for i, slot in enumerate(slots)}
    builder = GraphBuilder()
    for node in mod.graph.nodes:
        args = (new[node.args[0]], *node.args[1:]) if node.op in ("captured", "gather") else node.args  # type: ignore[index]
        builder.add(node.op, *args, dtype=node.dtype)
    return Mod(builder.graph(*mod.graph.outputs), tuple(mod.captured[s] for s in slots), mod.name)  # type: ignore[index]


_TO_NUMBERS = {getattr(Tensor, f"__{name}__") for name in ("bool", "int", "float", "index", "complex", "contains")}
_TO_NUMBERS |= {Tensor.item, Tensor.tolist, Tensor.numpy}


class _PositionsStayTensors(TorchFunctionMode):
    """Indexing with a position becomes a gather; a position that Python wants as a number is an error."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _TO_NUMBERS and self.recorder.is_traced(args[0]):
            raise UnsupportedMod(
                f"{self.recorder.what} uses Python control flow or a Python number made from a position or score "
                f"({func.__name__}); use torch.where(condition, a, b), `&`, `|`, `~` instead of if / and / or / not"
            )
        if func is Tensor.__getitem__:
            indices = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(i, Tensor) and i.ndim == 0 for i in indices):
                full = [None if isinstance(i, slice) and i == slice(None) else i for i in indices]
                if all(i is None or isinstance(i, int | Tensor) for i in full):
                    return self.recorder.index(args[0], full)
        if func is Tensor.__setitem__:
            raise UnsupportedMod(
                f"{self.recorder.what} assigns to elements of a tensor; mods must be pure, use torch.where"
            )
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.builder = GraphBuilder()
        self.captured: list[Tensor] = []
        self._values: dict[int, Ref | _Table] = {}
        self._alive: list[Tensor] = []  # ids stay unique while tensors live
        self._aliased: set[int] = set()

    # -- tensors of the mod and what they stand for

    def input(self, name: str) -> Tensor:
        dtype = torch.float32 if name == "score" else torch.int64
        return self._track(torch.empty((), dtype=dtype, device="meta"), self.builder.add("input", name, dtype=dtype))

    def is_traced(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and id(tensor) in self._values and tensor.device.type == "meta"

    def value(self, tensor: Tensor) -> Ref | _Table:
        if id(tensor) not in self._values:
            self._capture(tensor)
        return self._values[id(tensor)]

    def _track(self, tensor: Tensor, value: Ref | _Table) -> Tensor:
        self._values[id(tensor)] = value
        self._alive.append(tensor)
        return tensor

    def _capture(self, tensor: Tensor) -> None:
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            raise UnsupportedMod(
                f"{self.what} captures a {type(tensor).__name__}; capture a plain local tensor (`.to_local()`)"
            )
        if tensor.device.type == "meta":
            raise UnsupportedMod(f"{self.what} makes or captures a tensor of shape {tuple(tensor.shape)} without data")
        if tensor.is_complex() or tensor.is_sparse or tensor.is_quantized:
            raise UnsupportedMod(
                f"{self.what} captures a {tensor.dtype} {tensor.layout} tensor; capture a dense real one"
            )
        slot = len(self.captured)
        self.captured.append(tensor)
        scalar = tensor.ndim == 0
        value = (
            self.builder.add("captured", slot, dtype=tensor.dtype) if scalar else _Table(slot, (None,) * tensor.ndim)
        )
        self._track(tensor, value)

    # -- operations

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # made of other operations, which autograd shows, but not of tensors of inference mode
                return func.decompose(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name.endswith("_") and not name.endswith("__"):
            return self._in_place(func, name[:-1], args, kwargs)
        return self._operation(func, name, args, kwargs)

    def _in_place(self, func, name: str, args, kwargs) -> Tensor:
        target = args[0]
        if not self.is_traced(target) or id(target) in self._aliased:
            raise UnsupportedMod(
                f"{self.what} changes a tensor in place ({func}); mods must be pure: write `x = x + y`"
            )
        functional = getattr(torch.ops.aten, name, None)
        if functional is None or name not in SUPPORTED:
            raise self._unsupported(func, name)
        result = self._operation(getattr(functional, func._overloadname), name, args, kwargs)
        ref = self.value(result)
        assert isinstance(ref, Ref), "a pointwise operation gives a pointwise value"
        self._values[id(target)] = self.builder.cast(ref, target.dtype)
        return target

    def _operation(self, func, name: str, args, kwargs) -> Tensor:
        if name == "index":
            return self.index(args[0], args[1])
        if name == "select":
            return self._select(*args)
        if name == "_to_copy" or (name in _ALIASES and self._keeps_shape(args)):
            return self._convert(args[0], kwargs.get("dtype"))
        if name == "detach":
            return self._detach(args[0])
        if name in _CONSTANTS or name in _FILLS:
            return self._constant(func, name, args, kwargs)

        tensors = [a for a in args if isinstance(a, Tensor)]
        for tensor in tensors:
            if isinstance(self.value(tensor), _Table) and name not in _REDUCTIONS:
                raise UnsupportedMod(
                    f"{self.what} computes ({func}) on a whole captured tensor of shape {tuple(tensor.shape)}; "
                    "do that outside the mod and capture the result, or index it down to one element first"
                )
        ref = self._pointwise(func, name, args, kwargs) if tensors else None
        if ref is None:
            raise self._unsupported(func, name)
        return self._result(ref)

    def _result(self, ref: Ref) -> Tensor:
        with _disable_current_modes():
            return self._track(torch.empty((), dtype=self.builder.dtype(ref), device="meta"), ref)

    def _pointwise(self, func, name: str, args, kwargs) -> Ref | None:
        add = self.builder.add
        if name in _COMPARE:
            a, b, _ = self._promote(*args)
            return add(name, a, b, dtype=torch.bool)
        if name in ("add", "sub", "rsub"):
            a, b, dtype = self._promote(*args[:2])
            alpha = kwargs.get("alpha", args[2] if len(args) > 2 else 1)
            if name == "rsub":
                a, b = b, a if alpha == 1 else add("mul", a, alpha, dtype=dtype)
            elif alpha != 1:
                b = add("mul", b, alpha, dtype=dtype) if isinstance(b, Ref) else b * alpha  # type: ignore[operator]
            return add("add" if name == "add" else "sub", a, b, dtype=dtype)
        if name in _BINARY:
            a, b, dtype = self._promote(*args)
            return add(_BINARY[name], a, b, dtype=dtype)
        if name in _LOGICAL:
            a, b = (self._to_bool(x) for x in args)
            return add(_LOGICAL[name], a, b, dtype=torch.bool)
        if name == "logical_not":
            return add("not", self._to_bool(args[0]), dtype=torch.bool)
        if name == "div":
            return self._divide(args[0], args[1], kwargs.get("rounding_mode"))
        if name in _UNARY:
            return self._unary(_UNARY[name], args[0])
        if name in ("clamp", "clamp_min", "clamp_max", "hardtanh"):
            return self._clamp(name, args, kwargs)
        if name == "where":
            a, b, dtype = self._promote(*args[1:])
            return add("where", self._ref(args[0], torch.bool), a, b, dtype=dtype)
        if name == "masked_fill":
            fill = args[2] if not isinstance(args[2], Tensor) else self._ref(args[2], args[0].dtype)
            return add("where", self._ref(args[1], torch.bool), fill, self._ref(args[0]), dtype=args[0].dtype)
        if name in ("isnan", "isinf"):
            x = self._ref(args[0])
            if name == "isnan":
                return add("ne", x, x, dtype=torch.bool)
            return add("eq", add("abs", x, dtype=args[0].dtype), math.inf, dtype=torch.bool)
        return self._activation(name, args, kwargs)

    def _activation(self, name: str, args, kwargs) -> Ref | None:
        if name not in ("reciprocal", "square", "relu", "leaky_relu", "gelu", "silu"):
            return None
        dtype = args[0].dtype if args[0].dtype.is_floating_point or name in ("square", "relu") else torch.float32
        x = self._ref(args[0], dtype)

        def op(kind: str, *operands: Arg) -> Ref:
            return self.builder.add(kind, *operands, dtype=torch.bool if kind == "gt" else dtype)

        if name == "reciprocal":
            return op("div", 1.0, x)
        if name == "square":
            return op("mul", x, x)
        if name == "relu":
            return op("where", op("gt", x, 0), x, 0)
        if name == "leaky_relu":
            slope = args[1] if len(args) > 1 else 0.01
            return op("where", op("gt", x, 0), x, op("mul", x, slope))
        if name == "silu":
            return op("mul", x, op("sigmoid", x))
        if kwargs.get("approximate", "none") == "tanh":
            cubic = op("add", x, op("mul", op("mul", op("mul", x, x), x), 0.044715))
            inner = op("tanh", op("mul", cubic, math.sqrt(2 / math.pi)))
        else:
            inner = op("erf", op("mul", x, math.sqrt(0.5)))
        return op("mul", op("mul", x, 0.5), op("add", inner, 1.0))

    def _divide(self, a: Any, b: Any, rounding_mode: str | None) -> Ref:
        x, y, dtype = self._promote(a, b)
        if rounding_mode == "floor":
            return self.builder.add("floor_div", x, y, dtype=dtype)
        if rounding_mode == "trunc" and not dtype.is_floating_point:
            return self.builder.add("trunc_div", x, y, dtype=dtype)
        if not dtype.is_floating_point:
            x, y, dtype = self._as(x, torch.float32), self._as(y, torch.float32), torch.float32
        quotient = self.builder.add("div", x, y, dtype=dtype)
        return self.builder.add("trunc", quotient, dtype=dtype) if rounding_mode == "trunc" else quotient

    def _unary(self, op: str, x: Tensor) -> Ref:
        transcendental = op not in ("neg", "abs", "sign", "floor", "ceil", "round", "trunc", "not")
        dtype = torch.float32 if transcendental and not x.dtype.is_floating_point else x.dtype
        if not dtype.is_floating_point and op in ("floor", "ceil", "round", "trunc"):
            return self._ref(x)
        return self.builder.add(op, self._ref(x, dtype), dtype=dtype)

    def _clamp(self, name: str, args, kwargs) -> Ref:
        bounds = dict(zip(("min", "max") if name != "clamp_max" else ("max",), args[1:], strict=False)) | kwargs
        if name == "hardtanh":
            return self._hardtanh(args[0], bounds.get("min", -1.0), bounds.get("max", 1.0))
        x: Any = args[0]
        for key, op in (("min", "clamp_min"), ("max", "clamp_max")):
            if bounds.get(key) is not None:
                a, b, dtype = self._promote(x, bounds[key])
                x = self._result(self.builder.add(op, a, b, dtype=dtype))
        return self._ref(x)

    def _hardtanh(self, x: Tensor, least: float, greatest: float) -> Ref:
        # constants at the bounds, where torch's derivative is 0 and that of clamp is 1
        add, ref = self.builder.add, self._ref(x)
        above = add("where", add("ge", ref, greatest, dtype=torch.bool), greatest, ref, dtype=x.dtype)
        return add("where", add("le", ref, least, dtype=torch.bool), least, above, dtype=x.dtype)

    # -- captured tensors

    def index(self, source: Tensor, indices: Sequence[Any]) -> Tensor:
        """``source[indices]``: None leaves a dim as it is, ints and 0-d integer tensors pick one element of it."""
        table = self.value(source)
        if not isinstance(table, _Table) or len(indices) > len(table.free_dims()):
            raise UnsupportedMod(f"{self.what} indexes a tensor of {source.ndim} dims with {len(indices)} indices")
        chosen = list(table.indices)
        for dim, index in zip(table.free_dims(), indices, strict=False):
            if isinstance(index, Tensor):
                if index.ndim or index.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
                    raise UnsupportedMod(
                        f"{self.what} indexes with {index.dtype} {tuple(index.shape)}; indices are 0-d integers"
                    )
                index = self._ref(index, torch.int64)
            chosen[dim] = index
        return self._indexed(source, _Table(table.slot, tuple(chosen)))

    def _select(self, source: Tensor, dim: int, index: int) -> Tensor:
        table = self.value(source)
        if not isinstance(table, _Table):
            raise UnsupportedMod(f"{self.what} selects from a value of one (b, h, q_idx, kv_idx)")
        chosen = list(table.indices)
        chosen[table.free_dims()[dim]] = int(index)
        return self._indexed(source, _Table(table.slot, tuple(chosen)))

    def _indexed(self, source: Tensor, table: _Table) -> Tensor:
        captured = self.captured[table.slot]
        for dim, index in enumerate(table.indices):
            if isinstance(index, int) and not -captured.shape[dim] <= index < captured.shape[dim]:
                raise IndexError(
                    f"{self.what}: index {index} is out of range for dim {dim} of size {captured.shape[dim]}"
                )
        shape = [captured.shape[dim] for dim in table.free_dims()]
        if not shape:
            indices = (i for i in table.indices if i is not None)
            return self._result(self.builder.add("gather", table.slot, *indices, dtype=source.dtype))
        with _disable_current_modes():
            return self._track(torch.empty(shape, dtype=source.dtype, device="meta"), table)

    # -- identities, casts, constants

    def _keeps_shape(self, args) -> bool:
        return len(args) == 1 or (args[0].ndim == 0 and not list(args[1] if isinstance(args[1], list | tuple) else []))

    def _convert(self, source: Tensor, dtype: torch.dtype | None) -> Tensor:
        value = self.value(source)
        if isinstance(value, _Table):
            if dtype not in (None, source.dtype):
                raise UnsupportedMod(
                    f"{self.what} casts a whole captured tensor; cast it outside the mod or after indexing it"
                )
            with _disable_current_modes():
                return self._track(torch.empty(source.shape, dtype=source.dtype, device="meta"), value)
        self._aliased.add(id(source))
        result = self._result(self.builder.cast(value, dtype or source.dtype))
        self._aliased.add(id(result))
        return result

    def _detach(self, source: Tensor) -> Tensor:
        if isinstance(self.value(source), _Table) or not source.dtype.is_floating_point:
            return self._convert(source, None)
        return self._result(self.builder.add("detach", self._ref(source), dtype=source.dtype))

    def _constant(self, func, name: str, args, kwargs) -> Tensor:
        fill = _CONSTANTS[name] if name in _CONSTANTS else args[_FILLS[name]]
        like = args[0] if args and isinstance(args[0], Tensor) else None
        size = (
            like.shape
            if like is not None and not name.startswith("new_")
            else next((a for a in args if isinstance(a, list | tuple | torch.Size)), ())
        )
        if len(size):
            raise UnsupportedMod(f"{self.what} makes a tensor of shape {tuple(size)} ({func}); mods must be pointwise")
        inferred = torch.tensor(fill).dtype if name == "full" else torch.get_default_dtype()
        dtype = kwargs.get("dtype") or (like.dtype if like is not None else inferred)
        return self._result(self.builder.add("const", fill, dtype=dtype))

    # -- operands

    def _ref(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Ref:
        value = self.value(tensor)
        assert isinstance(value, Ref), "whole tables were refused before"
        return self.builder.cast(value, dtype or tensor.dtype)

    def _as(self, operand: Arg, dtype: torch.dtype) -> Arg:
        return self.builder.cast(operand, dtype) if isinstance(operand, Ref) else _number(operand, dtype)  # type: ignore[arg-type]

    def _to_bool(self, operand: Tensor) -> Ref:
        ref = self._ref(operand)
        return ref if operand.dtype == torch.bool else self.builder.add("ne", ref, 0, dtype=torch.bool)

    def _promote(self, a: Any, b: Any) -> tuple[Arg, Arg, torch.dtype]:
        """Both operands in the dtype in which torch would combine them."""
        with _disable_current_modes():
            dtype = torch.result_type(*(_scalar_like(x) for x in (a, b)))
        operands = (self._ref(x, dtype) if isinstance(x, Tensor) else _number(x, dtype) for x in (a, b))
        return (*operands, dtype)  # type: ignore[return-value]

    def _unsupported(self, func, name: str) -> UnsupportedMod:
        if name in _RANDOM:
            return UnsupportedMod(
                f"{self.what} uses randomness ({func}); draw outside, capture the tensor and index it"
            )
        if name in _REDUCTIONS:
            return UnsupportedMod(
                f"{self.what} uses a reduction or a dot product ({func}); mods must be pointwise: one value for one "
                "(b, h, q_idx, kv_idx)"
            )
        return UnsupportedMod(f"{self.what} uses {func}, which is not supported; supported: {', '.join(SUPPORTED)}")


def _scalar_like(x: Any) -> Any:
    return torch.empty((), dtype=x.dtype) if isinstance(x, Tensor) else x


def _number(x: Any, dtype: torch.dtype) -> Arg:
    if dtype == torch.bool:
        return bool(x)
    return float(x) if dtype.is_floating_point else int(x)
