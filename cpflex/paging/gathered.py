"""Gathered: the query heads of all ranks on each, with those keys and values of the step that others have."""

from __future__ import annotations

import torch
from torch import Tensor

from cpflex.paging.decode_plan import DecodePlan
from cpflex.paging.pool import PagePool
from cpflex.paging.together import HEADER_BYTES, Meeting


def gathered(
    q: Tensor,  # [1, h, N, D]
    pool: PagePool,
    plan: DecodePlan,
    meeting: Meeting,
) -> Tensor:
    """q [1, Hq, N, D] of all heads; keys that wait in the pool come in the same message and are written."""
    rank, world_size = plan.steps.pages.rank, plan.steps.pages.world_size
    mine = _brought(q, pool)
    room = torch.empty(HEADER_BYTES, dtype=torch.uint8, device=q.device)
    message = torch.cat([_bytes(x) for x in (room, *mine)])
    arrived = [message if peer == rank else torch.empty_like(message) for peer in range(world_size)]
    meeting.exchange_first([message] * world_size, arrived)
    whole, begin = [], HEADER_BYTES
    for x in mine:
        end = begin + _num_bytes(x)
        parts = [data[begin:end].clone().view(x.dtype).view(x.shape) for data in arrived]  # aligned
        whole.append(torch.cat(parts, dim=1))
        begin = end
    if pool.pending is not None:
        pool.write(whole[1], whole[2], plan)
    return whole[0]


def num_bytes(q: Tensor, pool: PagePool) -> int:
    """Of the message of a rank, with its header."""
    return HEADER_BYTES + sum(map(_num_bytes, _brought(q, pool)))


def _brought(q: Tensor, pool: PagePool) -> list[Tensor]:
    return [q] if pool.pending is None else [q, *pool.pending]


def _bytes(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(-1).view(torch.uint8)


def _num_bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
