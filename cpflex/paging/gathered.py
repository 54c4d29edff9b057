"""Gathered: the queries of all ranks on each, with those keys and values of the step that others keep."""

from __future__ import annotations

import torch
from torch import Tensor

from cpflex.paging.decode_plan import DecodePlan
from cpflex.paging.pool import PagePool
from cpflex.paging.together import HEADER_BYTES, Meeting


def gathered(
    q: Tensor,  # [1, h, n, D]
    pool: PagePool,
    plan: DecodePlan,
    meeting: Meeting,
) -> Tensor:
    """q [1, Hq, N, D] of all tokens and heads; keys that wait in the pool come in the same message and are written."""
    rank, by_head = plan.steps.pages.rank, plan.steps.rows.by_head
    mine = _brought(q, pool)
    room = torch.empty(HEADER_BYTES, dtype=torch.uint8, device=q.device)
    message = torch.cat([_bytes(x) for x in (room, *mine)])
    shapes = _shapes(q, pool, plan)
    sizes = [HEADER_BYTES + sum(_num_bytes(shape, q) for shape in each) for each in shapes]
    arrived = [message if r == rank else message.new_empty(size) for r, size in enumerate(sizes)]
    meeting.exchange_first([message] * len(arrived), arrived)
    whole = []
    for place in range(len(mine)):
        parts = []
        for data, each in zip(arrived, shapes, strict=True):
            begin = HEADER_BYTES + sum(_num_bytes(shape, q) for shape in each[:place])
            part = data[begin : begin + _num_bytes(each[place], q)].clone()  # aligned
            parts.append(part.view(q.dtype).view(each[place]))
        whole.append(torch.cat(parts, dim=1 if by_head else 2))
    if pool.pending is not None:
        pool.write(whole[1], whole[2], plan)
    return whole[0]


def num_bytes(q: Tensor, pool: PagePool, plan: DecodePlan) -> int:
    """Of the longest message of a rank, with its header."""
    return HEADER_BYTES + max(sum(_num_bytes(shape, q) for shape in each) for each in _shapes(q, pool, plan))


def _brought(q: Tensor, pool: PagePool) -> list[Tensor]:
    return [q] if pool.pending is None else [q, *pool.pending]


def _shapes(q: Tensor, pool: PagePool, plan: DecodePlan) -> list[list[tuple[int, ...]]]:
    """Of what each rank brings, by rank."""
    by_head = plan.steps.rows.by_head
    return [[_shape(x, None if by_head else count) for x in _brought(q, pool)] for count in plan.steps.counts]


def _bytes(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(-1).view(torch.uint8)


def _shape(x: Tensor, num_tokens: int | None) -> tuple[int, ...]:
    return tuple(x.shape) if num_tokens is None else (*x.shape[:2], num_tokens, x.shape[3])


def _num_bytes(shape: tuple[int, ...], like: Tensor) -> int:
    return torch.Size(shape).numel() * like.element_size()
