"""What must hold before a step's keys are kept, and before an attention to pages; nothing is exchanged before."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from cpflex.mods.graph import Mod, table_sizes
from cpflex.paging.decode_plan import DecodePlan
from cpflex.paging.pool import PagePool

WITHOUT_GRADIENT = "there is no gradient through pages; call it under torch.no_grad(), or detach"


def require_plan(plan: object) -> None:
    if not isinstance(plan, DecodePlan):
        raise TypeError(f"plan must be one of cpflex.make_decode_plan; got {type(plan).__name__}")


def check_assigned(k: Tensor, v: Tensor, pool: PagePool, plan: DecodePlan) -> None:
    """For `PagePool.assign`."""
    _check_plan(plan)
    if plan.pages is not pool.pages:
        raise ValueError("the plan and the pool are of different pages; make both of one cpflex.Pages")
    for name, x, of_pool in (("k", k, pool.k), ("v", v, pool.v)):
        _check_tensor(name, x, of_pool)
        if x.shape[0] != 1 or x.shape[2:] != (plan.num_tokens, of_pool.shape[3]):
            raise ValueError(
                f"{name} must be [1, {of_pool.shape[1]}, {plan.num_tokens}, {of_pool.shape[3]}], this rank's new "
                f"tokens; got {tuple(x.shape)}"
            )
    heads, pool_heads = {k.shape[1], v.shape[1]}, pool.k.shape[1]
    divided = pool_heads / plan.pages.world_size if plan.steps.rows.by_head else pool_heads
    if heads != {pool_heads} and heads != {divided}:
        some = f", or {divided:g} of them" if divided != pool_heads else ""
        raise ValueError(f"keys must have the {pool_heads} heads of the pool{some}; got {k.shape[1]} and {v.shape[1]}")
    if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
        raise NotImplementedError(WITHOUT_GRADIENT)


def check_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: DecodePlan, enable_gqa: bool, captured: Sequence[Tensor]
) -> PagePool:
    """For `flex_attention`: the pool that key and value are of."""
    _check_plan(plan)
    plan.one_kind  # noqa: B018 - raises of several
    pool = plan.pages.pool_of(key, value)
    if pool is None:
        raise ValueError(
            "key and value must be pool.k and pool.v, the tensors themselves, of a pool of the plan's pages"
        )
    _check_tensor("query", query, pool.k)
    if query.ndim != 4 or query.shape[0] != 1 or query.shape[2:] != (plan.num_tokens, pool.k.shape[3]):
        raise ValueError(
            f"query must be [1, Hq, {plan.num_tokens}, {pool.k.shape[3]}], this rank's new tokens, packed; got "
            f"{tuple(query.shape)}"
        )
    world_size, by_head = plan.pages.world_size, plan.steps.rows.by_head
    num_heads, pool_heads = query.shape[1] * (world_size if by_head else 1), pool.k.shape[1]
    if num_heads != pool_heads and not enable_gqa:
        raise ValueError(
            f"query has {num_heads} heads and the pool {pool_heads}; pass enable_gqa=True for grouped queries"
        )
    if num_heads == 0 or num_heads % pool_heads:
        raise ValueError(
            f"the heads of query, on all ranks, must be a multiple of the pool's {pool_heads}; got {num_heads}"
            + (f", {query.shape[1]} on each of {world_size}" if by_head else "")
        )
    if plan.mask.mod.uses("h") and plan.mask.num_heads != num_heads:
        raise ValueError(f"the plan was made for num_heads={plan.mask.num_heads}; query has {num_heads} heads in all")
    if pool.assigned != plan.moment:
        raise ValueError("the pool does not have this step's keys; call pool.assign(k, v, plan) before its attention")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, *captured)):
        raise NotImplementedError(WITHOUT_GRADIENT)
    return pool


def check_tables(mod: Mod, plan: DecodePlan, num_heads: int) -> None:
    """Of a score_mod: captured tensors that are indexed by what goes beyond them."""
    steps = plan.steps
    sizes = {"q_idx": max(steps.limits), "kv_idx": max(steps.limits), "b": len(steps.new), "h": num_heads}
    for name, size in sizes.items():
        for table_len in table_sizes(mod, [name]):
            if table_len < size:
                raise ValueError(
                    f"the score_mod indexes a captured tensor of {table_len} elements with {name}; the plan has {size}"
                )


def _check_plan(plan: DecodePlan) -> None:
    if why := plan.why_over:
        raise RuntimeError(f"this decode plan is over: {why}; make another with cpflex.make_decode_plan")
    if plan.pages.links is None and plan.pages.world_size > 1:
        raise RuntimeError(
            "these pages were made with rank= and world_size=, for looking at; make them with the group of the ranks"
        )


def _check_tensor(name: str, x: Tensor, of_pool: Tensor) -> None:
    if isinstance(x, DTensor):
        raise TypeError(f"{name} is a DTensor; pass the local tensor, `{name}.to_local()`")
    if not isinstance(x, Tensor) or x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense Tensor; got {x.layout if isinstance(x, Tensor) else type(x).__name__}")
    if x.ndim != 4:
        raise ValueError(f"{name} must be [1, heads, tokens, head dim]; got {tuple(x.shape)}")
    if x.dtype != of_pool.dtype or x.device != of_pool.device:
        raise ValueError(
            f"{name} is {x.dtype} on {x.device}, the pool {of_pool.dtype} on {of_pool.device}; they must be alike"
        )
