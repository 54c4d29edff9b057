"""Call: what all kernel launches of one attention call share."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from cpflex.mods.graph import Graph, Mod
from cpflex.mods.vjp import Vjp, vjp

BACKENDS = ("triton", "reference")
OTHERWISE = '; pass kernel_options={"backend": "reference"}'
"""What to do where the fused kernels cannot."""


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
    packed_mask: Any = None
    """The mask's captured tensors as fused kernels take them, where a plan has them ready."""
    decided: dict[Any, Any] = field(default_factory=dict, init=False, compare=False, repr=False)
    """What kernels decided for tensors of certain shapes: the same for all steps."""

    @cached_property
    def score_vjp(self) -> Vjp | None:
        return None if self.score_graph is None else vjp(self.score_graph, self.wanted)


def with_whole_rows(x: Tensor) -> Tensor:
    """x [B, H, S, D] of any strides, copied only if the elements of a row are not adjacent."""
    return x if x.stride(-1) == 1 else x.contiguous()
