"""Call: what all kernel launches of one attention call share."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from cpflex.mods.graph import Graph, Mod
from cpflex.mods.vjp import Vjp, vjp

SEATS = {"flash": "cpflex.kernels.flash", "cudnn": "cpflex.kernels.cudnn"}
"""Backends that call another library, and the modules that do."""
BACKENDS = ("triton", "gluon", *SEATS, "reference")
OTHERWISE = '; pass kernel_options={"backend": "reference"}'
"""What to do where the fused kernels cannot."""
OR_PORTABLE = '; pass kernel_options={"backend": "triton"}'
"""What to do where those of one architecture cannot."""


@dataclass(frozen=True)
class Call:
    """The mods, with their captured tensors on the device of q, and the scale."""

    mask: Mod
    scale: float
    score_graph: Graph | None = None
    captured: tuple[Tensor, ...] = ()
    """Captured by the score_mod."""
    wanted: tuple[int, ...] = ()
    """Slots of ``captured`` whose gradient is needed."""
    backend: str | None = None
    """One of BACKENDS; None: triton for CUDA tensors, reference for others."""
    wants_max: bool = False
    """The largest score of each query is wanted."""
    deterministic: bool = True
    """Sums have one order; False allows kernels that are faster for having none."""
    packed_mask: Any = None
    """The mask's captured tensors as fused kernels take them, where a plan has them ready."""
    decided: dict[Any, Any] = field(default_factory=dict, init=False, compare=False, repr=False)
    """What kernels decided for tensors of certain shapes: the same for all steps."""

    @cached_property
    def score_vjp(self) -> Vjp | None:
        return None if self.score_graph is None else vjp(self.score_graph, self.wanted)


def with_whole_rows(x: Tensor) -> Tensor:
    """x [B, H, S, D] of any strides, copied only if the elements of a row are not adjacent, or if it, or a row of a
    multiple of 16 bytes, does not begin at one: kernels load 16 bytes at a time, and no variant of theirs is compiled
    for fewer.
    """
    batch, head, row, element = x.stride()
    unit = 16 // x.element_size()  # a power of two: a look at all strides at once
    if element == 1 and x.data_ptr() % 16 == 0:
        if (batch | head | row) % unit == 0 or x.shape[3] % unit:
            return x
        if all(stride % unit == 0 or size == 1 for size, stride in zip(x.shape[:3], x.stride(), strict=False)):
            return x
    return x.clone(memory_format=torch.contiguous_format)
