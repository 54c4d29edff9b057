"""What the Gluon kernels of sm_90 have in common: tensor descriptors, launches, and rings of buffers that one warpgroup
fills by TMA and others empty.
"""

# Gluon's stubs speak of values, device code of what the compiler makes of them
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from cpflex.kernels import fitting
from cpflex.kernels.call import OR_PORTABLE, Call, with_whole_rows
from cpflex.kernels.launch import FUSED, Decided, Heads, Mods, padded

# B batch, Hq query heads, H heads of keys and values, S local queries, K visiting keys, D and Dv head dims

ROWS = gl.constexpr(64)
"""Queries, or keys, of a consumer: what one wgmma has."""
CONSUMERS = gl.constexpr(2)

copy_in = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # from Triton 3.8 on; before
barrier: Any = getattr(gl, "barrier", None) or vars(gl)["thread_barrier"]  # from 3.7 on; before


@builtin
def _add_out(target: Any, at: Any, source: Any, _semantic: Any = None) -> None:
    at = _semantic._convert_to_ir_values(at, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, target.handle, at, source.handle)


add_out: Any = getattr(tma, "async_atomic_add", None) or _add_out
"""Add a block in shared memory to a tensor, by TMA: before Triton 3.8 Gluon has no name for what its compiler has."""


def decide(which: str, q: Tensor, k: Tensor, v: Tensor, call: Call, config: Any, dims: Sequence[str]) -> Decided:
    """What the launches have in common, step by step and call by call.

    Args:
        which: the pass, by its name in `tuning.GLUON`.
        dims: the constexprs of the kernel, of those that head dims decide.
    """
    shapes = (f"hopper {which}", q.shape, k.shape, v.shape[3], q.dtype)
    if (known := call.decided.get(shapes)) is None:
        mods = Mods.of(call, q.device, backward=which != "forward")
        kind = fitting.Kind(which, q.device, q.shape[3], v.shape[3], q.dtype, mods.functions)
        sizes = {"HEAD_DIM": q.shape[3], "V_DIM": v.shape[3]}
        sizes |= {"DIM_COLS": padded(q.shape[3]), "V_COLS": padded(v.shape[3])}
        options = {name: sizes[name] for name in dims} | config.options | FUSED
        heads = Heads.of(q, k, v, walk="keys" if config.blocks[0] == "query" else "queries")
        known = call.decided[shapes] = Decided(kind, config, heads, (float(call.scale), *mods), options)
    return known


def start(kernel: Any, num_programs: int, arguments: tuple[Any, ...], decided: Decided) -> None:
    """Launch a kernel on the device of its tensors; or, where `fitting` looks for a row, compile it only.

    Raises:
        NotImplementedError: it needs more shared memory than the GPU has.
    """
    if not fitting.is_looking():
        if num_programs:
            kernel[(num_programs,)](*arguments, **decided.options)
        return
    needed = kernel.warmup(*arguments, grid=(1,), **decided.options).metadata.shared
    if needed > (limit := fitting.shared_memory()):
        raise NotImplementedError(
            f"backend 'gluon': with these mods the kernel of head dims {decided.kind.head_dim} and "
            f"{decided.kind.v_dim} needs {needed >> 10} KiB of shared memory; {decided.kind.device} has "
            f"{limit >> 10}{OR_PORTABLE}"
        )


def with_strides(x: Tensor) -> Tensor:
    """x, copied where a tensor descriptor could not have its strides."""
    x = with_whole_rows(x)
    return x.contiguous() if any(n > 1 and stride <= 0 for n, stride in zip(x.shape, x.stride(), strict=True)) else x


def blocks_of(x: Tensor, rows: int, cols: int | None = None) -> TensorDescriptor:
    """A tensor descriptor of blocks of rows, of all columns or of ``cols``; zeros beyond the last row and the last
    column.
    """
    cols, unit = cols or padded(x.shape[3]), 16 // x.element_size()
    strides = [stride if size > 1 else unit for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * x.element_size(), rank=4)
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, cols], layout)


# -- on the device


@gluon.jit
def turned(at, phase, SIZE: gl.constexpr):
    """(buffer, phase of its barriers) after a turn of a ring of SIZE buffers."""
    at += 1
    phase = gl.where(at == SIZE, phase ^ 1, phase)
    return gl.where(at == SIZE, 0, at), phase


@gluon.jit
def copied(blocks, b, h, first, arrived, buffer):
    mbarrier.expect(arrived, blocks.block_type.nbytes)
    copy_in(blocks, [b, h, first, 0], arrived, buffer)
