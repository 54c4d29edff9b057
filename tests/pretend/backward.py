"""torch's backward pass in Python: its engine asks the accelerator for streams, which a machine without one has not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge


def run(
    outputs: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    keep_graph: bool,
    create_graph: bool,
    inputs: Sequence[Any],
    allow_unreachable: bool = False,
    accumulate_grad: bool = False,
) -> tuple[Tensor | None, ...]:
    """In place of ``torch.autograd._engine_run_backward``; hooks are not called."""
    assert not create_graph, "second derivatives are not pretended"
    wanted = [x if hasattr(x, "node") else get_gradient_edge(x) for x in inputs]
    found: list[Tensor | None] = [None] * len(wanted)
    roots = [get_gradient_edge(x) for x in outputs]
    waiting = _uses([root.node for root in roots])
    arrived: dict[Any, list[Tensor | None]] = {}

    def add(node: Any, place: int, grad: Tensor | None) -> None:
        held = arrived.setdefault(node, [None] * max(1, len(node._input_metadata)))
        if grad is not None:
            held[place] = grad if held[place] is None else held[place] + grad  # type: ignore[operator]

    for root, grad in zip(roots, grads, strict=True):
        add(root.node, root.output_nr, grad)
    ready = [node for node in dict.fromkeys(root.node for root in roots) if not waiting[node]]
    with torch.no_grad():
        while ready:
            node = ready.pop()
            held = arrived.pop(node)
            for i, edge in enumerate(wanted):
                if edge.node is node:
                    found[i] = held[edge.output_nr]
            passed_on = _apply(node, held, accumulate_grad and not inputs)
            edges = [edge for edge in node.next_functions if edge[0] is not None]
            for (following, place), grad in zip(edges, passed_on, strict=True):
                add(following, place, grad)
                waiting[following] -= 1
                if not waiting[following]:
                    ready.append(following)
    return tuple(found)


def _uses(roots: list[Any]) -> Counter:
    """How many nodes hand a gradient to each."""
    uses, seen, todo = Counter(), set(), list(roots)
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        for following, _ in node.next_functions:
            if following is not None:
                uses[following] += 1
                todo.append(following)
    return uses


def _apply(node: Any, grads: list[Tensor | None], accumulates: bool) -> list[Tensor | None]:
    """Gradients of those inputs that want one."""
    if hasattr(node, "variable"):  # a leaf
        if accumulates and grads[0] is not None:
            x = node.variable
            x.grad = grads[0] if x.grad is None else x.grad + grads[0]
        return []
    wanted = [following is not None for following, _ in node.next_functions]
    if all(grad is None for grad in grads):
        return [None] * sum(wanted)
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        given = [
            torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device) if grad is None else grad
            for grad, meta in zip(grads, node._input_metadata, strict=True)
        ]
        wanted = list(node.needs_input_grad)  # its results are of all inputs, those that are no tensors included
        results = node.apply(*given)
    else:
        results = node(*grads)
    results = results if isinstance(results, tuple) else (results,)
    return [grad for grad, is_wanted in zip(results, wanted, strict=False) if is_wanted]
