"""What every launch of a fused kernel passes: tensors whose rows are whole, the mods as device functions, the heads and
their order.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cpflex.kernels import fitting, tuning
from cpflex.kernels.call import Call
from cpflex.kernels.scores import identity
from cpflex.mods import triton_source
from cpflex.mods.triton_source import Generated
from cpflex.tile_mask import TILE

STRIDES = [f"{x}_stride_{axis}" for x in ("q", "k", "v", "grad_out") for axis in "bhs"]
NOT_SPECIALIZED = [
    *("q_len", "kv_len", "num_items", "num_heads", "num_kv_heads", "heads_at_once", "group_size"),
    *STRIDES,
]
"""Arguments whose value, 1 or a multiple of 16 or not, must not compile another variant."""

INTERPRETED = not isinstance(identity, triton.JITFunction)
"""TRITON_INTERPRET was set when the kernels were imported: they run on the CPU, slowly, for tests."""


FUSED = {"enable_fp_fusion": True}
"""Multiply-adds are fused, by all kernels and with all releases of Triton: 3.10 will not do so unless told."""


class Mods(NamedTuple):
    """In the order of the kernels' arguments."""

    mask_mod: Any
    mask_numbers: tuple[int | float, ...]
    mask_buffers: tuple[Tensor, ...]
    mask_sizes: Tensor
    score_mod: Any
    score_numbers: tuple[int | float, ...]
    score_vjp: Any
    score_buffers: tuple[Tensor, ...]
    score_sizes: Tensor

    @classmethod
    def of(cls, call: Call, device: torch.device, *, backward: bool) -> Mods:
        mask_mod, score_mod, score_vjp = generated(call, backward=backward)
        packed_mask = call.packed_mask or triton_source.pack_captured(call.mask.captured, device)
        packed_score = triton_source.pack_captured(call.captured, device)
        numbers = score_vjp.numbers or score_mod.numbers
        return cls(*mask_mod, *packed_mask, score_mod.function, numbers, score_vjp.function, *packed_score)

    @property
    def functions(self) -> tuple[Any, Any, Any]:
        return self.mask_mod, self.score_mod, self.score_vjp


def generated(call: Call, *, backward: bool) -> tuple[Generated, Generated, Generated]:
    """The mask_mod, the score_mod and its vjp as device functions; of None where a pass needs none."""
    score_mod = score_vjp = Generated(None)
    if call.score_graph is not None:
        score_mod = triton_source.score_function(call.score_graph)
    elif call.scale <= 0 and not backward:
        score_mod = Generated(identity)  # without a score_mod the maximum of a block is taken before it is scaled
    if backward and call.score_vjp is not None:
        score_vjp = triton_source.vjp_function(call.score_vjp)
    return triton_source.mask_function(call.mask.graph), score_mod, score_vjp


class Heads(NamedTuple):
    """In the order of the kernels' arguments."""

    num_heads: int  # Hq
    num_kv_heads: int  # B * H
    heads_at_once: int  # of keys and values: those whose walked rows fit the L2 cache run to their end, then the next
    group_size: int  # Hq / H

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, *, walk: str) -> Heads:
        """``walk``: over "keys", which a group of query heads shares, or over the "queries" of a group."""
        group_size, num_kv_heads = q.shape[1] // k.shape[1], k.shape[0] * k.shape[1]
        rows = k.shape[2] if walk == "keys" else q.shape[2] * group_size
        fit = tuning.l2_bytes(q.device) // max(1, rows * (k.shape[3] + v.shape[3]) * k.element_size())
        return cls(q.shape[1], num_kv_heads, min(max(1, fit), num_kv_heads), group_size)


def strides_of(*tensors: Tensor) -> list[int]:
    """Strides of batch, head and row of each; 0 where there is only one."""
    found: list[int] = []
    for x in tensors:
        shape, strides = x.shape[:3], x.stride()[:3]
        found += (
            [0 if size == 1 else stride for size, stride in zip(shape, strides, strict=True)] if 1 in shape else strides
        )
    return found


def strides_in_units(*tensors: Tensor) -> list[int]:
    """`strides_of` tensors `with_whole_rows` of one dtype in units of the last number: the elements in 16 bytes, if all
    head dims are multiples of them, else 1.

    A kernel multiplies by the unit, a constexpr. So it knows that it may load 16 bytes at a time for any head dim that
    is a multiple of 8; Triton by itself sees multiples of 16 elements only, and compiles another variant for them.
    """
    strides, unit = strides_of(*tensors), 16 // tensors[0].element_size()
    for x in tensors:
        if x.shape[3] % unit:
            return [*strides, 1]
    return [*[stride // unit for stride in strides], unit]


def rows_are_near(*tensors: Tensor) -> bool:
    """Whether the elements of a tile of rows of each tensor are less than 2**31 apart: offsets within a block, which is
    no more, are int32 then. The block itself may be anywhere.
    """
    return all(x.shape[2] == 1 or x.stride(2) * (TILE - 1) + padded(x.shape[3]) <= 1 << 31 for x in tensors)


def described(config: tuning.KernelConfig, rows: int, *tensors: Tensor) -> list[TensorDescriptor | None]:
    """Tensor descriptors (TMA) of blocks of ``rows`` rows; None if the row does not ask for them, if rows come in
    pieces, or do not begin at multiples of 16 bytes.
    """
    return [_descriptor(x, rows, columns(x.shape[3], config)) if config.tma else None for x in tensors]


def _descriptor(x: Tensor, rows: int, cols: tuple[int, ...]) -> TensorDescriptor | None:
    unit = 16 // x.element_size()
    strides = [x.stride(dim) if x.shape[dim] > 1 else unit for dim in range(3)]
    if len(cols) > 1 or x.numel() == 0 or x.data_ptr() % 16 or any(stride % unit or stride <= 0 for stride in strides):
        return None
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, *cols])


def columns(dim: int, config: tuning.KernelConfig) -> tuple[int, ...]:
    """Columns of the pieces of a block of rows: powers of two, as all of Triton's blocks have, and 16 at least, for
    tensor cores. Two where the row of `tuning` wants it, and they are fewer together than one would have.
    """
    whole = padded(dim)
    pieces = whole // 2, padded(dim - whole // 2)
    return pieces if config.pieces and dim > 64 and sum(pieces) < whole else (whole,)


@lru_cache
def padded(dim: int) -> int:
    """The columns of one block that holds ``dim``."""
    return max(16, triton.next_power_of_2(dim))


class Decided(NamedTuple):
    """What the launches of one kernel have in common, step by step and call by call."""

    kind: fitting.Kind
    config: Any
    """The row of `tuning`."""
    heads: Heads
    mods: tuple[Any, ...]
    """The scale and `Mods`."""
    options: dict[str, Any]


def decide(which: str, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Decided:
    """The row of `tuning` and the arguments that are not tensors of the step.

    Args:
        which: one of tuning.PASSES or PAGE_PASSES.
    """
    shapes = (which, q.shape, k.shape, v.shape[3], q.dtype)
    if (known := call.decided.get(shapes)) is None:
        mods = Mods.of(call, q.device, backward=which not in ("forward", *tuning.PAGE_PASSES))
        kind = fitting.Kind(which, q.device, q.shape[3], v.shape[3], q.dtype, mods.functions)
        config = fitting.row(kind, tuning.lookup(which, q, v))
        heads = Heads.of(q, k, v, walk="queries" if which == "dkdv" else "keys")
        options = shape_options(q, v, config) | config.options
        known = call.decided[shapes] = Decided(kind, config, heads, (float(call.scale), *mods), options)
    return known


def start(kernel: Any, num_programs: int, arguments: Sequence[Any], decided: Decided, **constexprs: Any) -> None:
    """Launch a kernel on the device of its tensors; or, where `fitting` looks for a row, compile it only."""
    if fitting.is_looking():
        compiled = kernel.warmup(*arguments, grid=(1,), **constexprs, **decided.options)
        fitting.found(kernel, decided.kind, decided.config, compiled.metadata.shared)
    elif num_programs:
        kernel[(num_programs,)](*arguments, **constexprs, **decided.options)


def shape_options(q: Tensor, v: Tensor, config: tuning.KernelConfig) -> dict[str, Any]:
    """The constexprs that all kernels have, and what their compiler is told."""
    dims = {"HEAD_DIM": q.shape[3], "V_DIM": v.shape[3]}
    cols = {"DIM_COLS": columns(q.shape[3], config), "V_COLS": columns(v.shape[3], config)}
    return dims | cols | {"INTERPRETED": INTERPRETED} | FUSED


_one_at_a_time = threading.Lock()  # the interpreter knows one launch; ranks may be threads


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current CUDA device."""
    if INTERPRETED:
        return _one_at_a_time
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
