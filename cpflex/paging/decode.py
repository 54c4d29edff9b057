"""The step: attention of some new tokens to all pages, on one screen.

    partials = attend_pages(q, pool)      of this rank's pages, in splits
    mine     = combine(partials)          one for each token
    all      = exchange(mine)
    out, lse = combine(all)               of all ranks, in their order

Keys that a rank has no page for are not known to it: it sends -inf, and its part counts for nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cpflex.kernels import (
    Call,
    PageWork,
    Partials,
    attend_pages,
    combine,
    empty_partials,
    partials_of,
    prepare_pages,
    require_support,
)
from cpflex.paging.decode_plan import DecodePlan
from cpflex.paging.gathered import gathered
from cpflex.paging.pool import PagePool
from cpflex.paging.together import Meeting

# N new tokens of all ranks, n of this one; Hq query heads in all, h of this rank; P ranks


def decode(
    q: Tensor,  # [1, h, n, D]
    pool: PagePool,
    plan: DecodePlan,
    call: Call,
    facts: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """out [1, h, n, Dv] in q's dtype and lse [1, h, n] fp32."""
    steps, v_dim = plan.steps, pool.v.shape[3]
    num_heads = q.shape[1] * (steps.pages.world_size if steps.rows.by_head else 1)
    require_support(q, v_dim, call)
    work = plan.work(q.device)
    prepare_pages(q, pool.k, pool.v, work, call)
    if steps.pages.links is None or steps.pages.world_size == 1:
        partials = attend_pages(q, pool.k, pool.v, work, call)
        return _as_asked(combine(partials, plan.parts(q.device), q.dtype, backend=call.backend))
    meeting = Meeting(steps, facts, q.device)
    if steps.rows.is_everyone:
        room = meeting.room(4 * num_heads * (v_dim + 1))
        shape = steps.pages.world_size, room + steps.num_tokens, num_heads * (v_dim + 1)
        memory, rank = torch.empty(shape, dtype=torch.float32, device=q.device), steps.pages.rank
        _own(q, pool, plan, work, call, partials_of(memory[rank, room:], num_heads))
        meeting.exchange([memory[rank]] * len(memory), list(memory), is_first=True)
        parts = _rows(plan, steps.num_tokens, memory.shape[1], len(memory), q, room)
        return _as_asked(combine(partials_of(memory.flatten(0, 1), num_heads), parts, q.dtype, backend=call.backend))
    q = gathered(q, pool, plan, meeting)
    mine = _own(q, pool, plan, work, call)
    return _sent_home(mine, plan, call, meeting, q.dtype)


def _own(
    q: Tensor, pool: PagePool, plan: DecodePlan, work: PageWork, call: Call, into: Partials | None = None
) -> Partials:
    """This rank's partial of each token, over its own pages."""
    tables = plan.tables
    if into is None:
        into = empty_partials(plan.steps.num_tokens, q.shape[1], pool.v.shape[3], q.device)
    if tables.is_idle:
        into.lse.fill_(-torch.inf)
        into.out.zero_()
        return into
    if tables.is_whole:
        return attend_pages(q, pool.k, pool.v, work, call, into)
    return combine(attend_pages(q, pool.k, pool.v, work, call), plan.parts(q.device), into=into, backend=call.backend)


def _sent_home(
    mine: Partials, plan: DecodePlan, call: Call, meeting: Meeting, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Each rank's rows, or heads, to it: one message to each other rank."""
    steps, v_dim = plan.steps, mine.out.shape[2]
    world_size, rank = steps.pages.world_size, steps.pages.rank
    both = torch.cat([mine.out, mine.lse.unsqueeze(-1)], dim=-1)  # [N, Hq, Dv + 1]
    if steps.rows.by_head:
        sent = [x.contiguous() for x in both.chunk(world_size, dim=1)]
    else:
        sent = list(both.split(steps.counts))
    arrived = both.new_empty(world_size, *sent[rank].shape)
    arrived[rank] = sent[rank]
    meeting.exchange(sent, list(arrived), is_first=False)
    tokens = arrived.shape[1]
    theirs = Partials(*(x.flatten(0, 1).contiguous() for x in (arrived[..., :v_dim], arrived[..., v_dim])))
    return _as_asked(combine(theirs, _rows(plan, tokens, tokens, world_size, arrived), dtype, backend=call.backend))


def _rows(plan: DecodePlan, count: int, stride: int, ranks: int, like: Tensor, first: int = 0) -> Tensor:
    """The parts of each token: one of every rank, int32 [N, 3]."""
    kind = "rows", count, stride, ranks, first, like.device
    if kind not in plan.steps.made:
        rows = torch.arange(first, first + count, dtype=torch.int32, device=like.device)
        plan.steps.made[kind] = torch.stack([rows, torch.full_like(rows, stride), torch.full_like(rows, ranks)], dim=1)
    return plan.steps.made[kind]


def _as_asked(partials: Partials) -> tuple[Tensor, Tensor]:
    """[N, Hq, Dv] and [N, Hq] as attention gives them."""
    return partials.out.movedim(0, 1).unsqueeze(0), partials.lse.movedim(0, 1).unsqueeze(0)
