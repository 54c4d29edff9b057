"""A mod as a `@triton.jit` device function: its graph, written out as readable source.

`causal() & sliding_window(7)` becomes

    @triton.jit
    def mask_a34ed1d255(b, h, q_idx, kv_idx, numbers, buffers, sizes):
        x0 = tl.load(buffers[0])
        return (kv_idx <= q_idx) & (kv_idx > within_int32(q_idx - x0, -1, 2147483647))

``b`` and ``h`` are integer scalars; ``q_idx`` and ``kv_idx`` int32 blocks that broadcast against each other, as
[BLOCK_Q, 1] and [1, BLOCK_KV] or, in a transposed tile, [1, BLOCK_Q] and [BLOCK_KV, 1]; ``score`` and ``grad`` fp32
blocks. ``buffers`` is a tuple of pointers and ``sizes`` a table of sizes and strides, both made by `pack_captured`;
``numbers`` is a tuple of the Python numbers in the mod. All are data, so a longer table, another window or softcap
compiles nothing. An integer n comes as 2 |n| + 1: Triton compiles variants for 1 and for multiples of 16, and in a
tuple it cannot be told not to. Numbers that a kernel does better to know stay in the text: 0, exponents, indices,
divisors and factors of integers, and those without which a sum would need int64. What depends on queries alone is a
column.

A result is that of `evaluate`: a mask's to the bit, a float's within a few ulp; if a mask compares sums of products of
floats, to the bit where the kernel does not fuse them (``enable_fp_fusion``). Positions behave as int64, computed with
in int32 wherever bounds prove it the same. Functions that are not Triton's own are those of `triton_math`.
"""

from __future__ import annotations

import hashlib
import linecache
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cpflex.mods import triton_math
from cpflex.mods.graph import POSITIONS, Graph, Ref
from cpflex.mods.triton_text import MAX_DIMS, Writer
from cpflex.mods.vjp import Vjp


class Generated(NamedTuple):
    """A mod inside a kernel: what is compiled, and what is passed."""

    function: Any
    """A `JITFunction`; one object for all graphs that differ in numbers only."""
    numbers: tuple[int | float, ...] = ()


def mask_function(graph: Graph) -> Generated:
    """``mask(b, h, q_idx, kv_idx, numbers, buffers, sizes) -> bool block`` of a traced mask_mod.

    Raises `UnsupportedMod` if an operation has no Triton form, as the next two do.
    """
    return _mod_function("mask", graph, graph.text)


def score_function(graph: Graph) -> Generated:
    """``score_mod(score, b, h, q_idx, kv_idx, numbers, buffers, sizes) -> fp32 block`` of a traced score_mod."""
    return _mod_function("score_mod", graph, graph.text)


def vjp_function(vjp: Vjp) -> Generated:
    """``score_vjp(grad, score, b, h, q_idx, kv_idx, numbers, buffers, sizes) -> tuple``. Its numbers begin with those
    of the score_mod: a kernel passes one tuple to both, and what both compute is computed once.

    The tuple is laid out as ``vjp.graph.outputs`` are: first the gradient of the score, an fp32 block; then, for each
    ``read`` of ``vjp.captured``, its adjoint, an fp32 block, at ``read.output``, and those of ``read.indices`` that are
    not numbers at their ``index.index``: int32, wrapped and clamped already, of any shape that broadcasts to a block.
    """
    return _vjp_function(vjp, f"{vjp.score.text}\n{vjp.graph.text}")


def source_of(mod: Any) -> str:
    """The text of a generated function, or of the one that a graph or a vjp becomes."""
    if isinstance(mod, Vjp):
        mod = vjp_function(mod).function
    elif isinstance(mod, Graph):
        is_mask = mod.nodes[mod.outputs[0].index].dtype == torch.bool
        mod = (mask_function(mod) if is_mask else score_function(mod)).function
    return "".join(linecache.getlines(mod.fn.__code__.co_filename))


def pack_captured(captured: Sequence[Tensor], device: torch.device | str) -> tuple[tuple[Tensor, ...], Tensor]:
    """``buffers`` and ``sizes`` of a launch: the tensors on ``device``, and int64 [16 * num_captured] on it.

    Raises:
        ValueError: a tensor that is empty, or has more than 8 dims, or a dim of 2**31 elements.
    """
    buffers = tuple(_aligned(tensor.detach().to(device)) for tensor in captured)
    for tensor in buffers:
        if tensor.ndim > MAX_DIMS or tensor.numel() == 0 or max(tensor.shape, default=0) >= 2**31:
            raise ValueError(
                f"a captured tensor must have at most {MAX_DIMS} dims, each of 1 to 2**31 - 1 elements; "
                f"got {tuple(tensor.shape)} - capture a part of it"
            )
    where = buffers[0].device if buffers else torch.device(device)
    return buffers, _sizes(tuple((t.shape, t.stride()) for t in buffers), where)


def _aligned(tensor: Tensor) -> Tensor:
    """Triton compiles another variant for a pointer that is not a multiple of 16 bytes."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


@lru_cache(maxsize=256)
def _sizes(layouts: tuple[tuple[Sequence[int], Sequence[int]], ...], device: torch.device) -> Tensor:
    rows = [[*numbers, *[0] * (MAX_DIMS - len(numbers))] for layout in layouts for numbers in layout]
    return torch.tensor(rows or [[0]], dtype=torch.int64, device=device).view(-1)


# -- from text to function


@lru_cache(maxsize=1024)
def _mod_function(kind: str, graph: Graph, text: str) -> Generated:
    # the graph's text tells apart what Python calls equal: 0.0 and -0.0
    writer = Writer(graph)
    result = writer.block(graph.outputs[0])
    names = POSITIONS if kind == "mask" else ("score", *POSITIONS)
    return Generated(_function(kind, names, [*writer.lines, f"return {result}"]), tuple(writer.numbers))


@lru_cache(maxsize=1024)
def _vjp_function(vjp: Vjp, text: str) -> Generated:
    outputs = vjp.graph.outputs
    writer = Writer(vjp.graph, Writer(vjp.score))
    results = [writer.block(outputs[0])]
    for read in vjp.captured:
        results.append(writer.block(outputs[read.output]))
        for dim, index in enumerate(read.indices):
            if isinstance(index, Ref):
                results.append(writer.place("place", outputs[index.index], read.slot, dim))
    lines = [*writer.lines, f"return ({', '.join(results)},)"]
    return Generated(_function("score_vjp", ("grad", "score", *POSITIONS), lines), tuple(writer.numbers))


def _function(kind: str, names: Sequence[str], lines: Sequence[str]) -> Any:
    body = "".join(f"    {line}\n" for line in lines)
    with _one_at_a_time:
        return _compiled(kind, f"({', '.join(names)}, numbers, buffers, sizes):\n{body}")


_one_at_a_time = threading.Lock()  # two threads must not make two functions of one text


@lru_cache(maxsize=1024)
def _compiled(kind: str, text: str) -> Any:
    # Triton tells the functions of a kernel apart by name
    name = f"{kind}_{hashlib.sha256(text.encode()).hexdigest()[:10]}"
    source, file = f"@triton.jit\ndef {name}{text}", f"<cpflex {name}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    scope: dict[str, Any] = {"triton": triton, "tl": tl, "__name__": __name__}
    scope |= {word: function for word, function in vars(triton_math).items() if hasattr(function, "fn")}
    exec(compile(source, file, "exec"), scope)
    return scope[name]
