"""A user's mask_mod or score_mod as data: a small, typed, pointwise graph.

Every interpreter (tensors, intervals, generated kernels) reads this one form. It is homogeneous: the operands of a node
have one dtype and casts are nodes, so that type promotion is decided once, when the mod is traced.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

POSITIONS = ("b", "h", "q_idx", "kv_idx")
"""The integer inputs of every mod: batch, query head, global query position, global key position."""

Number = bool | int | float


class Ref(NamedTuple):
    """An earlier node, by its place in the graph."""

    index: int  # pyright: ignore[reportIncompatibleMethodOverride]


Arg = Ref | Number | str


class Node(NamedTuple):
    """One pointwise operation.

    ``input (name)`` · ``captured (slot)``: a 0-d captured tensor · ``gather (slot, idx...)``: one element of a captured
    tensor; indices wrap when negative and are then clamped · ``const (number)`` · ``cast (x)`` · every other op takes
    operands of one dtype.
    """

    op: str
    args: tuple[Arg, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Graph:
    """Nodes in execution order and the nodes that are its results."""

    nodes: tuple[Node, ...]
    outputs: tuple[Ref, ...]

    def refs(self, node: Node) -> Iterable[Ref]:
        return (arg for arg in node.args if isinstance(arg, Ref))

    @cached_property
    def inputs(self) -> frozenset[str]:
        """Names of the inputs that the outputs depend on."""
        return frozenset(str(node.args[0]) for node in self.nodes if node.op == "input")

    def __str__(self) -> str:
        return self.text

    @cached_property
    def text(self) -> str:
        """What tells it apart from others: 0.0 from -0.0, too, which Python calls equal."""

        def show(arg: Arg) -> str:
            return f"%{arg.index}" if isinstance(arg, Ref) else repr(arg)

        lines = [
            f"%{i}: {str(node.dtype).removeprefix('torch.')} = {node.op}({', '.join(map(show, node.args))})"
            for i, node in enumerate(self.nodes)
        ]
        return "\n".join([*lines, f"return {', '.join(map(show, self.outputs))}"])


class GraphBuilder:
    """Appends nodes, each distinct one once."""

    def __init__(self, nodes: Iterable[Node] = ()) -> None:
        self.nodes: list[Node] = list(nodes)
        self._known = {repr(node): Ref(i) for i, node in enumerate(self.nodes)}

    def add(self, op: str, *args: Arg, dtype: torch.dtype) -> Ref:
        node = Node(op, args, dtype)
        key = repr(node)  # not the node: 1 == 1.0 == True in Python, 0.0 == -0.0, nan != nan
        if key not in self._known:
            self._known[key] = Ref(len(self.nodes))
            self.nodes.append(node)
        return self._known[key]

    def dtype(self, ref: Ref) -> torch.dtype:
        return self.nodes[ref.index].dtype

    def cast(self, ref: Ref, dtype: torch.dtype) -> Ref:
        return ref if self.dtype(ref) == dtype else self.add("cast", ref, dtype=dtype)

    def graph(self, *outputs: Ref) -> Graph:
        """The nodes that the outputs need, renumbered in their order."""
        needed: set[int] = set()
        stack = [ref.index for ref in outputs]
        while stack:
            index = stack.pop()
            if index not in needed:
                needed.add(index)
                stack.extend(arg.index for arg in self.nodes[index].args if isinstance(arg, Ref))
        renumbered = {old: Ref(new) for new, old in enumerate(sorted(needed))}

        def renumber(node: Node) -> Node:
            return Node(node.op, tuple(renumbered[a.index] if isinstance(a, Ref) else a for a in node.args), node.dtype)

        return Graph(
            tuple(renumber(self.nodes[old]) for old in sorted(needed)), tuple(renumbered[r.index] for r in outputs)
        )


@dataclass(frozen=True, eq=False)
class Mod:
    """A traced mask_mod (bool result) or score_mod (float32 result) and the tensors that it captured."""

    graph: Graph
    captured: tuple[Tensor, ...]
    name: str

    @cached_property
    def key(self) -> str:
        """Names the computation: the graph and the kind of its captured tensors, neither their values nor the function
        object.
        """
        kinds = [(str(t.dtype), t.ndim) for t in self.captured]
        return hashlib.sha256(f"{self.graph}|{kinds}".encode()).hexdigest()[:16]

    @cached_property
    def content_key(self) -> str:
        """Names the computation and the values it captured; equal on two ranks iff the masks are the same."""
        digest = hashlib.blake2b(self.key.encode(), digest_size=8)
        for tensor in self.captured:
            digest.update(f"{tuple(tensor.shape)}".encode())
            if tensor.numel():
                data = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
                digest.update(data.view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def uses(self, name: str) -> bool:
        return name in self.graph.inputs

    def __getstate__(self) -> dict[str, object]:
        return {"graph": self.graph, "captured": tuple(_compressed(t) for t in self.captured), "name": self.name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state["captured"] = tuple(_decompressed(t) for t in state["captured"])
        self.__dict__.update(state)

    @cached_property
    def of_later_heads(self) -> Graph:
        """The graph for heads that are numbered from 0 and begin at another: at ``h`` plus a number, which is one more
        captured tensor, int64 [], the last. As it is if it does not depend on ``h``.
        """
        if not self.uses("h"):
            return self.graph
        builder, new = GraphBuilder(), dict[int, Ref]()
        for index, node in enumerate(self.graph.nodes):
            args = (new[arg.index] if isinstance(arg, Ref) else arg for arg in node.args)
            new[index] = builder.add(node.op, *args, dtype=node.dtype)
            if node.op == "input" and node.args == ("h",):
                first = builder.add("captured", len(self.captured), dtype=torch.int64)
                new[index] = builder.add("add", new[index], first, dtype=torch.int64)
        return builder.graph(*(new[ref.index] for ref in self.graph.outputs))

    def map_captured(self, fn: Callable[[Tensor], Tensor]) -> Mod:
        return Mod(self.graph, tuple(fn(t) for t in self.captured), self.name)


def _compressed(tensor: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """A long table of few runs of equal values, such as document ids, as (values, lengths of runs)."""
    if tensor.ndim != 1 or tensor.numel() < 1024:
        return tensor
    values, counts = torch.unique_consecutive(tensor.detach().cpu(), return_counts=True)
    # clones: a pickled view carries its whole storage
    return (values.clone(), counts.clone()) if 4 * values.numel() < tensor.numel() else tensor


def _decompressed(stored: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    return stored if isinstance(stored, Tensor) else torch.repeat_interleave(*stored)


def table_sizes(mod: Mod, inputs: Collection[str]) -> list[int]:
    """Sizes of the dims of captured tensors that are indexed by one of the inputs as it is; each must cover that
    input's range.
    """
    nodes = mod.graph.nodes
    return [
        mod.captured[node.args[0]].shape[dim]  # type: ignore[call-overload]
        for node in nodes
        if node.op == "gather"
        for dim, index in enumerate(node.args[1:])
        if isinstance(index, Ref) and nodes[index.index].op == "input" and nodes[index.index].args[0] in inputs
    ]
