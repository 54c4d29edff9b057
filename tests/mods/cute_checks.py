"""`walk` against the evaluator, on the mods of `generated`: by a stand-in for CuTe DSL and, where that is installed, by
itself, compiled for the CPU.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import generated
import torch
from torch import Tensor

from cpflex.mods.cute import tables_of, walk
from cpflex.mods.evaluate import evaluate
from cpflex.mods.graph import Graph, Mod
from cpflex.mods.trace import trace_mask_mod, trace_score_mod
from cpflex.mods.vjp import vjp
from cute_scalars import LANGUAGE, Scalar, Table

CPU = torch.device("cpu")


def by_stand_in(graph: Graph, inputs: dict[str, Tensor], captured: list[Tensor]) -> list[Tensor]:
    scalars = {name: Scalar(x.float() if x.is_floating_point() else x.int()) for name, x in inputs.items()}
    tables = [Table(t) for t in tables_of(captured, CPU)]
    return [scalar.values for scalar in walk(graph, LANGUAGE, scalars, tables)]


def by_cute_dsl(graph: Graph, inputs: dict[str, Tensor], captured: list[Tensor]) -> list[Tensor]:
    """Compiled for the CPU by the CuTe DSL that is installed."""
    import cutlass
    from cutlass import cute
    from cutlass.cute.runtime import from_dlpack

    names = sorted(graph.inputs)
    whole = torch.broadcast_tensors(*inputs.values())
    flat = dict(zip(inputs, (x.contiguous().view(-1) for x in whole), strict=True))
    given = [flat[name].float() if flat[name].is_floating_point() else flat[name].int() for name in names]
    out = torch.zeros(len(graph.outputs), whole[0].numel())
    tables = tables_of(captured, CPU)

    @cute.jit
    def host(out, given, tables):
        for i in range(cute.size(out, mode=[1])):
            found = walk(graph, cutlass, {name: x[i] for name, x in zip(names, given)}, tables)  # noqa: B905
            for n, value in enumerate(found):
                out[n, i] = cutlass.Float32(value)

    arguments = from_dlpack(out), [from_dlpack(x) for x in given], [from_dlpack(t) for t in tables]
    cute.compile(host, *arguments)(*arguments)
    return [x.view(whole[0].shape) for x in out]


Runner = Callable[[Graph, dict[str, Tensor], list[Tensor]], list[Tensor]]


def check_mask(name: str, run: Runner) -> None:
    check_mask_mod(trace_mask_mod(generated.all_masks()[name]), random.Random(name), run)


def check_mask_mod(mod: Mod, rng: random.Random, run: Runner) -> None:
    inputs = generated._inputs(*generated._positions("cpu", rng))
    expected = evaluate(mod.graph, mod.captured, inputs)[0]
    (got,) = run(mod.graph, inputs, list(mod.captured))
    got, expected = torch.broadcast_tensors(got.bool(), expected)
    assert torch.equal(got, expected), f"{int((got != expected).sum())} of {got.numel()} pairs\n{mod.graph}"


def check_score(name: str, run: Runner) -> None:
    """A score_mod and the derivative of its score."""
    mod = trace_score_mod(generated.all_scores()[name])
    q_idx, kv_idx = (x % (generated.PROBLEM.seq_len + 1) for x in generated._positions("cpu", random.Random(name)))
    inputs = {"score": generated._scores(special=False), **generated._inputs(q_idx, kv_idx)}
    captured = [t.detach() for t in mod.captured]
    compare(run(mod.graph, inputs, captured)[0], evaluate(mod.graph, captured, inputs)[0], ulps=8)
    graph, inputs = vjp(mod.graph, ()).graph, inputs | {"grad": generated._scores(special=False).flip(0)}
    compare(run(graph, inputs, captured)[0], evaluate(graph, captured, inputs)[0], ulps=8)


def check_operation(name: str, dtype: torch.dtype, run: Runner) -> None:
    operation, other = generated.OPERATIONS[name], generated._scores(special=True).view(-1)[:64].to(dtype)
    mod = trace_score_mod(lambda score, b, h, q, k: operation(score.to(dtype), other[k % 64]))
    q_idx, kv_idx = (x % 300 for x in generated._positions("cpu", random.Random(name)))
    inputs = {"score": generated._scores(special=True), **generated._inputs(q_idx, kv_idx)}
    expected = evaluate(mod.graph, list(mod.captured), inputs)[0]
    ulps = {torch.bfloat16: 2.0**16, torch.float16: 2.0**13}.get(dtype, 4)
    compare(run(mod.graph, inputs, list(mod.captured))[0], expected, ulps, absolute=False)


def compare(got: Tensor, expected: Tensor, ulps: float, absolute: bool = True) -> None:
    got, expected = torch.broadcast_tensors(got, expected)
    size = expected[expected.isfinite()].abs().max().item() if absolute else 0.0
    error = 2.0**-23 * ulps
    torch.testing.assert_close(got, expected, rtol=error, atol=error * size + 2.0**-126, equal_nan=True)
