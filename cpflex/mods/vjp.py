"""The derivative of a score_mod, graph to graph: reverse accumulation over the nodes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from cpflex.mods.graph import Arg, Graph, GraphBuilder, Node, Ref


@dataclass(frozen=True)
class CapturedGradient:
    """One place where a captured tensor is read: its gradient adds ``graph.outputs[output]`` at ``indices``."""

    slot: int
    output: int
    indices: tuple[Arg, ...]  # outputs of the graph (Ref: which one) or numbers; () for a 0-d tensor


@dataclass(frozen=True)
class Vjp:
    """``graph`` takes the inputs of the score_mod and ``grad``; its first output is the gradient of ``score``."""

    graph: Graph
    captured: tuple[CapturedGradient, ...]
    score: Graph
    """Of which it is the derivative."""


@lru_cache(maxsize=64)
def vjp(graph: Graph, wanted: tuple[int, ...]) -> Vjp:
    """Vector-Jacobian product of a traced score_mod: of the score, and of the captured tensors in the ``wanted``
    slots.
    """
    builder = GraphBuilder(graph.nodes)
    grad = builder.add("input", "grad", dtype=torch.float32)
    adjoints: dict[int, Ref] = {graph.outputs[0].index: grad}
    d_score = builder.add("const", 0.0, dtype=torch.float32)
    reads: list[tuple[int, Ref, tuple[Arg, ...]]] = []

    for index in reversed(range(len(graph.nodes))):
        node, adjoint = graph.nodes[index], adjoints.get(index)
        if adjoint is None or not node.dtype.is_floating_point:
            continue
        if node.op == "input":
            d_score = adjoint
        elif node.op in ("captured", "gather") and node.args[0] in wanted:
            reads.append((int(node.args[0]), builder.cast(adjoint, torch.float32), node.args[1:]))  # type: ignore[arg-type]
        for operand, part in _pullback(builder, node, Ref(index), adjoint):
            known = adjoints.get(operand.index)
            dtype = builder.dtype(operand)
            adjoints[operand.index] = part if known is None else builder.add("add", known, part, dtype=dtype)

    outputs: list[Ref] = [d_score]
    gradients = []
    for slot, part, indices in reads:
        at: list[Arg] = []
        outputs.append(part)
        place = len(outputs) - 1
        for i in indices:
            if isinstance(i, Ref):
                outputs.append(i)
            at.append(Ref(len(outputs) - 1) if isinstance(i, Ref) else i)
        gradients.append(CapturedGradient(slot, place, tuple(at)))
    return Vjp(builder.graph(*outputs), tuple(gradients), graph)


def _pullback(builder: GraphBuilder, node: Node, out: Ref, g: Ref) -> list[tuple[Ref, Ref]]:
    """(operand, its share of the adjoint) for each differentiable operand of ``node``."""
    if node.op == "cast":
        operand = node.args[0]
        assert isinstance(operand, Ref), "a cast has a node as its operand"
        dtype = builder.dtype(operand)
        return [(operand, builder.cast(g, dtype))] if dtype.is_floating_point else []
    rule = _RULES.get(node.op)
    if rule is None:
        return []
    dtype = node.dtype

    def op(name: str, *args: Arg) -> Ref:
        return builder.add(name, *args, dtype=torch.bool if name in ("ge", "gt", "le", "lt", "eq", "ne") else dtype)

    shares = rule(op, out, g, *node.args)
    return [
        (operand, share)
        for operand, share in zip(node.args, shares, strict=True)
        if isinstance(operand, Ref) and share is not None and builder.dtype(operand).is_floating_point
    ]


_Op = Callable[..., Ref]
_Shares = tuple[Ref | None, ...]


def _pow(op: _Op, out: Ref, g: Ref, x: Arg, y: Arg) -> _Shares:
    if not isinstance(y, Ref):
        power = float(y)  # type: ignore[arg-type]
        return (op("mul", g, op("mul", op("pow", x, power - 1.0), power)) if power else None), None
    if isinstance(x, Ref):
        d_x = op("where", op("eq", y, 0.0), 0.0, op("mul", g, op("mul", op("pow", x, op("sub", y, 1.0)), y)))
        return d_x, op("where", op("eq", x, 0.0), 0.0, op("mul", g, op("mul", out, op("log", x))))
    base = float(x)  # type: ignore[arg-type]
    return None, op("mul", g, op("mul", out, math.log(base) if base > 0 else 0.0))


def _extremum(wins: str) -> Callable[..., _Shares]:
    # a tie shares the gradient in halves, as torch.maximum and torch.minimum do
    def rule(op: _Op, out: Ref, g: Ref, x: Arg, y: Arg) -> _Shares:
        half = op("where", op("eq", x, y), op("mul", g, 0.5), 0.0)
        return op("where", op(wins, x, y), g, half), op("where", op(wins, y, x), g, half)

    return rule


def _of_clamp_at_its_bound() -> tuple[float, float]:
    with torch.inference_mode(False), torch.enable_grad():
        x, bound = (torch.zeros((), device="cpu", requires_grad=needs) for needs in (True, False))
        outs = x.clamp(min=0.0), x.clamp(min=bound)
        by_number, by_tensor = (torch.autograd.grad(out, x)[0].item() for out in outs)
    return by_number, by_tensor


AT_BOUND = _of_clamp_at_its_bound()
"""What of the gradient passes through torch.clamp where its argument lies at a bound that is a number, or a tensor: 1
and 1 in torch 2.13, 0 and 1/2 in torch 2.15.
"""


def _clamp(inside: str, outside: str) -> Callable[..., _Shares]:
    def rule(op: _Op, out: Ref, g: Ref, x: Arg, bound: Arg) -> _Shares:
        share = AT_BOUND[isinstance(bound, Ref)]
        if share == 1.0:
            keeps = {"gt": "ge", "lt": "le"}[inside]
            return op("where", op(keeps, x, bound), g, 0.0), op("where", op(outside, x, bound), g, 0.0)
        is_at = op("eq", x, bound)
        of_x, of_bound = (op("where", is_at, op("mul", g, part), 0.0) for part in (share, 1.0 - share))
        return op("where", op(inside, x, bound), g, of_x), op("where", op(outside, x, bound), g, of_bound)

    return rule


_RULES: dict[str, Callable[..., _Shares]] = {
    "add": lambda op, out, g, x, y: (g, g),
    "sub": lambda op, out, g, x, y: (g, op("neg", g)),
    "mul": lambda op, out, g, x, y: (op("mul", g, y), op("mul", g, x)),
    "div": lambda op, out, g, x, y: (op("div", g, y), op("neg", op("div", op("mul", g, out), y))),
    "remainder": lambda op, out, g, x, y: (g, op("neg", op("mul", g, op("floor", op("div", x, y))))),
    "fmod": lambda op, out, g, x, y: (g, op("neg", op("mul", g, op("trunc", op("div", x, y))))),
    "pow": _pow,
    "atan2": lambda op, out, g, y, x: (
        op("div", op("mul", g, x), op("add", op("mul", x, x), op("mul", y, y))),
        op("neg", op("div", op("mul", g, y), op("add", op("mul", x, x), op("mul", y, y)))),
    ),
    "neg": lambda op, out, g, x: (op("neg", g),),
    "abs": lambda op, out, g, x: (op("mul", g, op("sign", x)),),
    "maximum": _extremum("gt"),
    "minimum": _extremum("lt"),
    "clamp_min": _clamp("gt", "lt"),
    "clamp_max": _clamp("lt", "gt"),
    "where": lambda op, out, g, c, x, y: (None, op("where", c, g, 0.0), op("where", c, 0.0, g)),
    "exp": lambda op, out, g, x: (op("mul", g, out),),
    "exp2": lambda op, out, g, x: (op("mul", op("mul", g, out), math.log(2)),),
    "expm1": lambda op, out, g, x: (op("mul", g, op("add", out, 1.0)),),
    "log": lambda op, out, g, x: (op("div", g, x),),
    "log2": lambda op, out, g, x: (op("div", g, op("mul", x, math.log(2))),),
    "log1p": lambda op, out, g, x: (op("div", g, op("add", x, 1.0)),),
    "sqrt": lambda op, out, g, x: (op("div", g, op("mul", out, 2.0)),),
    "rsqrt": lambda op, out, g, x: (op("mul", op("mul", g, -0.5), op("mul", out, op("mul", out, out))),),
    "tanh": lambda op, out, g, x: (op("mul", g, op("sub", 1.0, op("mul", out, out))),),
    "sigmoid": lambda op, out, g, x: (op("mul", g, op("mul", out, op("sub", 1.0, out))),),
    "sin": lambda op, out, g, x: (op("mul", g, op("cos", x)),),
    "cos": lambda op, out, g, x: (op("neg", op("mul", g, op("sin", x))),),
    "erf": lambda op, out, g, x: (
        op("mul", op("mul", g, 2 / math.sqrt(math.pi)), op("exp", op("neg", op("mul", x, x)))),
    ),
}
"""Derivatives; an op that is absent (floor, sign, comparisons, detach ...) passes no gradient."""
