"""The calls of a plan: what kernels decide for an attention of some kind is kept with the plan, for all its steps."""

from __future__ import annotations

import torch
from torch import Tensor

from cpflex.kernels import Call
from cpflex.mods.graph import Graph
from cpflex.paging.decode_plan import DecodePlan


def call_of(
    plan: DecodePlan,
    score_key: str,
    score_graph: Graph | None,
    captured: list[Tensor],
    scale: float,
    backend: str,
    device: torch.device,
) -> Call:
    """The mods of a layer's attention on the device of its queries: one object for all steps of the plan.

    Args:
        score_key: by which score_mods are told apart; "" of none.
        captured: by the score_mod. Kernels read them where they lie, so that what is written to them is seen; if one is
            elsewhere, or begins at no multiple of 16 bytes, it is copied at each call, and none is kept.
    """
    memory = tuple((id(x), x.data_ptr(), x.shape, x.stride()) for x in captured)
    kind = "call", plan.one_kind, score_key, memory, scale, backend, device
    if (call := plan.steps.made.get(kind)) is None:
        brought = tuple(x.to(device) for x in captured)
        call = Call(plan.mask.on(device), scale, score_graph, brought, backend=backend or None)
        if all(x is there and x.data_ptr() % 16 == 0 for x, there in zip(captured, brought, strict=True)):
            plan.steps.made[kind] = call
    return call
