"""The step: attention of some new tokens to all pages, on one screen.

    partials = attend_pages(q, pool)      of this rank's pages, in splits
    mine     = combine(partials)          one for each token
    all      = exchange(mine)
    out, lse = combine(all)               of all ranks, in their order

Keys that a rank has no page for are not known to it: it sends -inf, and its part counts for nothing. Where ranks have
different tokens, queries go to keys before that, or keys come to queries instead: `divided`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cpflex.kernels import (
    Call,
    Partials,
    attend_pages,
    combine,
    partials_of,
    prepare_pages,
    require_support,
)
from cpflex.paging.decode_plan import DecodePlan
from cpflex.paging.divided import attend_divided, longest_first
from cpflex.paging.gathered import gathered, num_bytes
from cpflex.paging.pool import PagePool
from cpflex.paging.reading import read
from cpflex.paging.together import HEADER_BYTES, Meeting

# N new tokens of all ranks, n of this one; Hq query heads in all, h of this rank; P ranks


def decode(
    q: Tensor,  # [1, h, n, D]
    pool: PagePool,
    plan: DecodePlan,
    call: Call,
    facts: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """out [1, h, n, Dv] in q's dtype and lse [1, h, n] fp32."""
    steps = plan.steps
    num_heads = q.shape[1] * (steps.pages.world_size if steps.rows.by_head else 1)
    require_support(q, pool.v.shape[3], call)
    work = plan.work(q.device)
    whole = q if steps.rows.is_everyone else q.new_empty(1, num_heads, steps.num_tokens, q.shape[3])
    prepare_pages(whole, pool.k, pool.v, work, call, home_heads=q.shape[1])
    if steps.pages.links is None or steps.pages.world_size == 1:
        partials = attend_pages(q, pool.k, pool.v, work, call)
        return _as_asked(combine(partials, plan.parts(q.device), q.dtype, backend=call.backend))
    if steps.rows.is_everyone:
        return _to_everyone(q, pool, plan, call, facts)
    if not steps.rows.by_head:
        meeting = Meeting(steps, facts, q.device, longest_first(q, pool, plan))
        return _as_asked(attend_divided(q, pool, plan, call, meeting))
    meeting = Meeting(steps, facts, q.device, num_bytes(q, pool))
    mine = torch.empty(steps.num_tokens, num_heads * (pool.v.shape[3] + 1), dtype=torch.float32, device=q.device)
    whole = gathered(q, pool, plan, meeting)
    read(whole, pool.k, pool.v, plan, call, partials_of(mine, num_heads))
    arrived = _sent_home(mine, num_heads, plan, meeting)  # [P, N, h * (Dv + 1)]
    tokens = arrived.shape[1]
    theirs = partials_of(arrived.flatten(0, 1), q.shape[1])
    return _as_asked(combine(theirs, _rows(plan, tokens, 1, tokens, arrived), q.dtype, backend=call.backend))


def _to_everyone(
    q: Tensor, pool: PagePool, plan: DecodePlan, call: Call, facts: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Each rank's partials to all others: one message, which begins with a header."""
    pages, num_tokens, num_heads, v_dim = plan.steps.pages, plan.steps.num_tokens, q.shape[1], pool.v.shape[3]
    room, row = HEADER_BYTES // 4, num_heads * (v_dim + 1)
    message = room + num_tokens * row
    meeting = Meeting(plan.steps, facts, q.device, 4 * message)
    memory = torch.empty(pages.world_size, message, dtype=torch.float32, device=q.device)
    mine = memory[pages.rank]
    read(q, pool.k, pool.v, plan, call, partials_of(mine[room:].view(num_tokens, row), num_heads))
    meeting.exchange_first([mine] * len(memory), list(memory))
    unit = math.gcd(room, row)  # of where rows begin
    rows = memory.as_strided(((memory.numel() - row) // unit + 1, row), (unit, 1))
    parts = _rows(plan, num_tokens, row // unit, message // unit, q, first=room // unit)
    return _as_asked(combine(partials_of(rows, num_heads), parts, q.dtype, backend=call.backend))


def _sent_home(
    mine: Tensor,  # fp32 [N, Hq * (Dv + 1)]
    num_heads: int,
    plan: DecodePlan,
    meeting: Meeting,
) -> Tensor:
    """Each rank's heads to it: one message to each other rank. What arrived, fp32 [P, N, h * (Dv + 1)]."""
    world_size, rank = plan.steps.pages.world_size, plan.steps.pages.rank
    both = (x.unflatten(1, (world_size, -1)).movedim(1, 0).flatten(2) for x in partials_of(mine, num_heads))
    sent = list(torch.cat([*both], dim=2))
    arrived = mine.new_empty(world_size, *sent[rank].shape)
    arrived[rank] = sent[rank]
    meeting.exchange(sent, list(arrived))
    return arrived


def _rows(plan: DecodePlan, count: int, stride: int, between_ranks: int, like: Tensor, first: int = 0) -> Tensor:
    """The parts of each token, one of every rank, int32 [N, 3]; ``stride`` lies between tokens."""
    kind = "rows", count, stride, between_ranks, first, like.device
    if kind not in plan.steps.made:
        rows = first + stride * torch.arange(count, dtype=torch.int32, device=like.device)
        others = (between_ranks, plan.steps.pages.world_size)
        plan.steps.made[kind] = torch.stack([rows, *(torch.full_like(rows, number) for number in others)], dim=1)
    return plan.steps.made[kind]


def _as_asked(partials: Partials) -> tuple[Tensor, Tensor]:
    """[N, Hq, Dv] and [N, Hq] as attention gives them."""
    return partials.out.movedim(0, 1).unsqueeze(0), partials.lse.movedim(0, 1).unsqueeze(0)
