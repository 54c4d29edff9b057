"""A mod on tensors: the reference interpreter, and the exact verdict on tiles that intervals cannot decide."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cpflex.mods.graph import Arg, Graph, Node, Ref


def _logic(on_bool: Callable, on_int: Callable) -> Callable:
    return lambda a, b: on_bool(a, b) if (a if isinstance(a, Tensor) else b).dtype == torch.bool else on_int(a, b)


_OPS: dict[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge", "add", "sub", "mul")},
    **{name: getattr(torch, name) for name in ("neg", "abs", "sign", "floor", "ceil", "round", "trunc", "fmod", "pow")},
    **{name: getattr(torch, name) for name in ("exp", "exp2", "expm1", "log", "log2", "log1p", "sqrt", "rsqrt")},
    **{name: getattr(torch, name) for name in ("tanh", "sigmoid", "sin", "cos", "erf", "atan2", "remainder", "where")},
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "not": operator.invert,
    "lshift": operator.lshift,
    "rshift": operator.rshift,
    "maximum": lambda a, b: torch.clamp(a, min=b) if not isinstance(b, Tensor) else torch.maximum(a, b),
    "minimum": lambda a, b: torch.clamp(a, max=b) if not isinstance(b, Tensor) else torch.minimum(a, b),
    "clamp_min": lambda a, b: torch.clamp(a, min=b),
    "clamp_max": lambda a, b: torch.clamp(a, max=b),
    "div": torch.true_divide,
    "floor_div": lambda a, b: torch.div(a, b, rounding_mode="floor"),
    "trunc_div": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
    "detach": lambda a: a,
}


def evaluate(
    graph: Graph,
    captured: Sequence[Tensor],
    inputs: Mapping[str, Tensor],  # by name, mutually broadcastable; positions int64
) -> list[Tensor]:
    """The graph's outputs, broadcast as far as each depends on the inputs."""
    device = next(iter(inputs.values())).device
    values: list[Tensor] = []

    def read(arg: Arg, dtype: torch.dtype) -> Tensor:
        return values[arg.index] if isinstance(arg, Ref) else torch.tensor(arg, dtype=dtype, device=device)

    for node in graph.nodes:
        values.append(_execute(node, captured, inputs, values, read, device))
    return [values[ref.index] for ref in graph.outputs]


def _execute(
    node: Node,
    captured: Sequence[Tensor],
    inputs: Mapping[str, Tensor],
    values: list[Tensor],
    read: Callable[[Arg, torch.dtype], Tensor],
    device: torch.device,
) -> Tensor:
    if node.op == "input":
        return inputs[str(node.args[0])]
    if node.op == "captured":
        return captured[node.args[0]].detach().to(device)  # type: ignore[call-overload]
    if node.op == "const":
        return torch.tensor(node.args[0], dtype=node.dtype, device=device)
    if node.op == "cast":
        return values[node.args[0].index].to(node.dtype)  # type: ignore[union-attr]
    if node.op == "gather":
        table = captured[node.args[0]].detach().to(device)  # type: ignore[call-overload]
        return table[wrapped_indices(table, [read(arg, torch.int64) for arg in node.args[1:]])]
    dtype = next(values[arg.index].dtype for arg in reversed(node.args) if isinstance(arg, Ref))
    first, *rest = node.args
    # torch wants a tensor first; later numbers take the dtype of the tensors beside them
    operands = [read(first, dtype), *(values[a.index] if isinstance(a, Ref) else a for a in rest)]
    return _OPS[node.op](*operands).to(node.dtype)


def wrapped_indices(table: Tensor, indices: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Negative indices count from the end, as in torch; the rest is clamped: a pad position never reads out of
    bounds.
    """
    sizes = table.shape
    return tuple(torch.where(i < 0, i + n, i).clamp(0, n - 1) for i, n in zip(indices, sizes, strict=True))


def add_at(target: Tensor, indices: Sequence[Tensor], part: Tensor) -> None:
    """``target[indices] += part`` at `wrapped_indices`, in one order, whatever the number of threads.

    Args:
        target: contiguous.
        part: of the shape to which the indices, one per dim of ``target``, broadcast.
    """
    at = wrapped_indices(target, indices)
    if target.is_cuda:
        target.index_put_(at, part, accumulate=True)  # sorted there; on the CPU threads would add as they come
        return
    place = at[0]
    for index, size in zip(at[1:], target.shape[1:], strict=True):
        place = place * size + index
    target.view(-1).index_add_(0, place.reshape(-1), part.reshape(-1))
