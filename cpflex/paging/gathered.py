"""Gathered: the queries of all ranks on each, with those keys and values of the step that others keep."""

from __future__ import annotations

import torch
from torch import Tensor

from cpflex.paging.decode_plan import DecodePlan
from cpflex.paging.pool import PagePool
from cpflex.paging.together import HEADER, Meeting


def gathered(
    q: Tensor,  # [1, h, n, D]
    pool: PagePool,
    plan: DecodePlan,
    meeting: Meeting,
) -> Tensor:
    """q [1, Hq, N, D] of all tokens and heads; keys that wait in the pool come in the same message and are written."""
    steps = plan.steps
    by_head, counts = steps.rows.by_head, steps.counts
    mine = [q] if pool.pending is None else [q, *pool.pending]
    room = HEADER * 8 if meeting.rides else 0
    message = torch.cat([_bytes(x) for x in (torch.zeros(room, dtype=torch.uint8, device=q.device), *mine)])
    shapes = [[_shape(x, None if by_head else count) for x in mine] for count in counts]
    sizes = [room + sum(_num_bytes(shape, q) for shape in each) for each in shapes]
    arrived = [torch.empty(size, dtype=torch.uint8, device=q.device) for size in sizes]
    arrived[steps.pages.rank] = message
    meeting.exchange([message] * len(counts), arrived, is_first=True)
    dim = 1 if by_head else 2
    whole = []
    for place in range(len(mine)):
        parts = []
        for data, each in zip(arrived, shapes, strict=True):
            begin = room + sum(_num_bytes(shape, q) for shape in each[:place])
            part = data[begin : begin + _num_bytes(each[place], q)].clone()  # aligned
            parts.append(part.view(q.dtype).view(each[place]))
        whole.append(torch.cat(parts, dim=dim))
    if pool.pending is not None:
        pool.write(whole[1], whole[2], plan)
    return whole[0]


def _bytes(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(-1).view(torch.uint8)


def _shape(x: Tensor, num_tokens: int | None) -> tuple[int, ...]:
    return tuple(x.shape) if num_tokens is None else (*x.shape[:2], num_tokens, x.shape[3])


def _num_bytes(shape: tuple[int, ...], like: Tensor) -> int:
    return torch.Size(shape).numel() * like.element_size()
