"""What the ranks of a recurrence send one another: summaries of fragments to all, tokens before fragments to whom they
concern; backward the other way, summed in rank order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from cpflex.links import protocol
from cpflex.planning.plan import Plan
from cpflex.recurrent.chain import Chain

# B batch, F fragments of the sequence, F_local of this rank, X numbers of a summary

Facts = dict[str, Any]
"""A call in words: what all ranks must have in common."""


@torch._disable_dynamo  # type: ignore[attr-defined]
def agree(layer: str, chain: Chain, tensors: Mapping[str, Tensor | None], check: Callable[[], None]) -> Facts:
    """Compare a call with the other ranks', before anything is exchanged. What ``check`` raises, all ranks raise."""
    named = {name: x for name, x in tensors.items() if x is not None}
    try:
        if not isinstance(chain, Chain):
            raise TypeError(f"chain must be made by cpflex.recurrent.make_chain; got {type(chain).__name__}")
        _check_tensors(named)
        check()
        if chain.plan.world_size > 1 and chain.plan._links is None:
            raise RuntimeError("the plan of this chain has no group; call chain = chain.bind(group) first")
    except (ValueError, TypeError, RuntimeError) as error:
        if isinstance(chain, Chain):
            chain.plan.refuse(error)
        raise
    wanted = [name for name, x in named.items() if x.requires_grad] if torch.is_grad_enabled() else []
    kinds = {name: f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}" for name, x in named.items()}
    device = next(iter(named.values())).device
    facts = {
        "direction": "forward",
        "layer": layer,
        **chain.facts,
        **kinds,
        "device": device.type,
        "gradients": ", ".join(wanted),
    }
    chain.plan.agree(facts, device)
    return facts


def _check_tensors(named: Mapping[str, Tensor]) -> None:
    for name, x in named.items():
        if not isinstance(x, Tensor) or isinstance(x, DTensor):
            raise TypeError(f"{name} must be a local Tensor; got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"{name} must be floating; got {x.dtype}")
    if len(devices := {x.device for x in named.values()}) > 1:
        raise ValueError(f"the tensors must lie on one device; got {sorted(map(str, devices))}")


def again(facts: Facts, chain: Chain, device: torch.device) -> None:
    """Compare the backward of a call that was agreed on."""
    chain.plan.agree({**facts, "direction": "backward"}, device)


def gather(
    mine: Tensor,  # [B, F_local, X]
    chain: Chain,
) -> Tensor:  # [B, F, X], rank by rank
    """All ranks' summaries."""
    plan = chain.plan
    mine = mine.contiguous()
    parts = [mine.new_empty(len(mine), count, mine.shape[2]) for count in _counts(chain)]
    parts[plan.rank] = mine
    swap([mine] * plan.world_size, parts, plan)
    return torch.cat(parts, dim=1)


def sum_of_asked(
    grad: Tensor,  # [B, F, X], rank by rank
    chain: Chain,
) -> Tensor:  # [B, F_local, X]
    """The adjoint of `gather`: what all ranks ask of this rank's summaries, added in rank order."""
    plan = chain.plan
    asked = [part.contiguous() for part in grad.split(_counts(chain), dim=1)]
    parts = [torch.empty_like(asked[plan.rank]) for _ in asked]
    parts[plan.rank] = asked[plan.rank]
    swap(asked, parts, plan)
    return torch.stack(parts).sum(dim=0)


def _counts(chain: Chain) -> list[int]:
    return [len(held) for held in chain.plan.fragments]


def swap(sent: Sequence[Tensor], received: Sequence[Tensor], plan: Plan) -> None:
    """`cpflex.links.protocol.swap` among the ranks of a plan."""
    if plan.world_size > 1:
        assert plan._links is not None, "a call is refused before, if the plan has no group"
        protocol.swap(sent, received, plan._links)
