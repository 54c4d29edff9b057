"""Divided: each rank has some of the step's new tokens. Of each sequence queries travel to the keys, or keys to them.

first message   queries; new keys, to the owners of their pages; rows of pages that are fetched
own             partials over the pages that this rank keeps: of queries that came, and of its own
fetched         partials of its own queries over what came, wave by wave
last message    partials of queries that came, sent home
out, lse      = combine(all), in the order of ranks; or what was kept, then what was fetched
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cpflex.kernels import Call, Partials, combine, partials_of
from cpflex.paging.decode_plan import DecodePlan
from cpflex.paging.parcels import Parcels, Returns
from cpflex.paging.pool import PagePool
from cpflex.paging.reading import read
from cpflex.paging.together import HEADER_BYTES, Meeting

# n new tokens of this rank, nq of them whose queries travel, nk to which keys do; C tokens that it computes, F rows
# that are fetched at once, W = Hq * (Dv + 1) numbers of a partial, P ranks

Fetched = tuple[Tensor, Tensor]
"""k [1, H, F, D] and v [1, H, F, Dv]."""


def attend_divided(
    q: Tensor,  # [1, Hq, n, D]
    pool: PagePool,
    plan: DecodePlan,
    call: Call,
    meeting: Meeting,
) -> Partials:
    """One partial of each of this rank's tokens, out in q's dtype."""
    traffic, returns, num_heads = plan.traffic, plan.returns(q.device), q.shape[1]
    parcels = plan.parcels(q.device, new_ones_travel=pool.pending is not None)
    fetched = _room_for_fetched(pool, plan)
    came = _first_exchange(q, pool, fetched, parcels, meeting, plan)
    width, num_asked, num_by_keys = num_heads * (pool.v.shape[3] + 1), returns.num_asked, returns.num_by_keys
    asked = plan.pages.world_size * num_asked
    memory = torch.empty(asked + returns.slots * num_by_keys, width, dtype=torch.float32, device=q.device)
    by_rank = memory[:asked].view(plan.pages.world_size, num_asked, width)
    by_keys = memory[asked:].view(returns.slots, num_by_keys, width)
    is_alone = came.shape[2] == num_by_keys
    computed = by_keys[0] if is_alone else memory.new_empty(came.shape[2], width)  # [C, W]
    read(came, pool.k, pool.v, plan, call, partials_of(computed, num_heads))
    if not is_alone:
        by_keys[0].copy_(computed.index_select(0, returns.by_keys_computed))
    mine = q if num_by_keys == q.shape[2] else q.index_select(2, returns.by_keys)
    for wave in range(traffic.num_waves):
        if wave:
            _fetch(wave, pool, fetched, parcels, meeting)
        into = partials_of(by_keys[min(wave + 1, 2)], num_heads)
        read(mine, *fetched, plan, call, into, wave)
        if wave:  # a row is read before it is written
            carried = partials_of(by_keys[1], num_heads)
            combine(partials_of(memory, num_heads), returns.pairs, into=carried, backend=call.backend)
    if traffic.returns:
        _send_home(computed, by_rank, returns, meeting, num_heads)
    return combine(partials_of(memory, num_heads), returns.parts, q.dtype, backend=call.backend)


def _first_exchange(
    q: Tensor,  # [1, Hq, n, D]
    pool: PagePool,
    fetched: Fetched,
    parcels: Parcels,
    meeting: Meeting,
    plan: DecodePlan,
) -> Tensor:
    """q [1, Hq, C, D] of the tokens that this rank computes; new keys and fetched ones are where they belong then."""
    rank, (_, num_heads, _, dim) = plan.pages.rank, q.shape
    (kv_heads, v_dim), new = (pool.k.shape[1], pool.v.shape[3]), pool.pending or (pool.k[:, :, :0], pool.v[:, :, :0])
    header, sent = q.new_empty(HEADER_BYTES // q.element_size()), []
    for peer, (of_queries, of_new, of_old) in enumerate(zip(parcels.queries, parcels.new, parcels.old[0], strict=True)):
        if peer == rank:
            sent.append(header)
            continue
        rows = [
            torch.cat([x[0].index_select(1, of_new), kept[0].index_select(1, of_old)], dim=1)
            for x, kept in zip(new, (pool.k, pool.v), strict=True)
        ]
        parts = [header, q[0].index_select(1, of_queries), *rows]
        sent.append(torch.cat([x.flatten() for x in parts]))
    lengths = _first_bytes(q, pool, plan)[:, rank] // q.element_size()
    received = [header if peer == rank else q.new_empty(length) for peer, length in enumerate(lengths.tolist())]
    meeting.exchange_first(sent, received, functools.partial(_first_sizes, q, pool, plan))
    queries, fresh = [], []
    for peer, whole in enumerate(received):
        message = whole[len(header) :]
        if peer == rank:
            is_whole = len(parcels.queries[rank]) == q.shape[2]
            queries.append(q if is_whole else q.index_select(2, parcels.queries[rank]))
            fresh.append([x[0].index_select(1, parcels.new[rank]) for x in new])
            continue
        begin, count = int(parcels.first_queries[peer, rank]) * num_heads * dim, parcels.num_new[peer]
        queries.append(message[:begin].view(1, num_heads, -1, dim))
        k, v = _keys_of(message[begin:], kv_heads, dim, v_dim)
        fresh.append([k[:, :count], v[:, :count]])
        _put(fetched, (k[:, count:], v[:, count:]), parcels.fetched[0][peer])
    k, v = (torch.cat(parts, dim=1) for parts in zip(*fresh, strict=True))
    if pool.pending is not None:
        pool.keep(k.unsqueeze(0), v.unsqueeze(0), parcels.kept, parcels.kept_rows)
        _put(fetched, [x.index_select(1, parcels.met) for x in (k, v)], parcels.met_rows)
    is_alone = all(x.shape[2] == 0 for peer, x in enumerate(queries) if peer != rank)
    return queries[rank] if is_alone else torch.cat(queries, dim=2)


def longest_first(q: Tensor, pool: PagePool, plan: DecodePlan) -> int:
    """Bytes, at most, of the first messages of all ranks in all steps of the plan, with their headers."""
    shape = q.shape[1], pool.k.shape[1], pool.k.shape[3], pool.v.shape[3], pool.pending is None
    kind, made = ("longest first", plan.one_kind, *shape), plan.steps.made
    if kind not in made:
        queries, keys = plan.traffic.most_first(plan.pages.page_size, new_ones_travel=pool.pending is not None)
        row = pool.k.shape[1] * (pool.k.shape[3] + pool.v.shape[3])
        whole = queries * q.shape[1] * q.shape[3] + keys * row
        made[kind] = HEADER_BYTES + int(whole.max()) * q.element_size()
    return made[kind]


def _first_bytes(q: Tensor, pool: PagePool, plan: DecodePlan) -> np.ndarray:
    """Of the first messages of this step, with their headers: from each rank to each, int64 [P, P]."""
    parcels = plan.parcels(q.device, new_ones_travel=pool.pending is not None)
    row = pool.k.shape[1] * (pool.k.shape[3] + pool.v.shape[3])
    whole = parcels.first_queries * q.shape[1] * q.shape[3] + parcels.first_keys * row
    return HEADER_BYTES + whole * q.element_size()


def _first_sizes(q: Tensor, pool: PagePool, plan: DecodePlan) -> tuple[list[int], list[int]]:
    between, rank = _first_bytes(q, pool, plan), plan.pages.rank
    return between[rank].tolist(), between[:, rank].tolist()


def _fetch(wave: int, pool: PagePool, fetched: Fetched, parcels: Parcels, meeting: Meeting) -> None:
    """Rows of a later wave: new ones are where their pages lie by then."""
    dims = pool.k.shape[1], pool.k.shape[3], pool.v.shape[3]
    sent = [torch.cat([x[0].index_select(1, rows).flatten() for x in (pool.k, pool.v)]) for rows in parcels.old[wave]]
    received = [pool.k.new_empty(len(rows) * dims[0] * (dims[1] + dims[2])) for rows in parcels.fetched[wave]]
    meeting.exchange(sent, received)
    for message, rows in zip(received, parcels.fetched[wave], strict=True):
        _put(fetched, _keys_of(message, *dims), rows)


def _keys_of(message: Tensor, num_heads: int, dim: int, v_dim: int) -> Fetched:
    """k [H, rows, D] and v [H, rows, Dv], one after the other."""
    count = len(message) // (num_heads * (dim + v_dim))
    k, v = message.split([count * num_heads * dim, count * num_heads * v_dim])
    return k.view(num_heads, count, dim), v.view(num_heads, count, v_dim)


def _put(fetched: Fetched, keys: Sequence[Tensor], rows: Tensor) -> None:
    for memory, x in zip(fetched, keys, strict=True):
        if len(rows):
            memory[0].index_copy_(1, rows, x)


def _room_for_fetched(pool: PagePool, plan: DecodePlan) -> Fetched:
    """Memory for the rows of one wave, which layers take in turn; zeroed once, as a pool is."""
    rows, made = plan.traffic.most_pages(plan.pages.rank) * plan.pages.page_size, plan.steps.made
    shapes = [(1, x.shape[1], rows, x.shape[3]) for x in (pool.k, pool.v)]
    kind = "fetched", *shapes, pool.k.dtype, pool.k.device
    if kind not in made:
        with torch.inference_mode(False):
            made[kind] = tuple(pool.k.new_zeros(shape) for shape in shapes)
    return made[kind]


def _send_home(
    computed: Tensor,  # [C, W]
    by_rank: Tensor,  # [P, nq, W]
    returns: Returns,
    meeting: Meeting,
    num_heads: int,
) -> None:
    """The partials of other ranks' queries to them; those of this rank's come to lie in ``by_rank``."""
    rank = meeting.links.rank
    sent = [computed[rows] for rows in returns.sent]
    received = [
        memory if rows is None else memory.new_empty(len(rows), memory.shape[1])
        for memory, rows in zip(by_rank, returns.arrived, strict=True)
    ]
    meeting.exchange(sent, received)
    received[rank] = computed.index_select(0, returns.own_computed)
    for memory, rows, message in zip(by_rank, returns.arrived, received, strict=True):
        if rows is not None:  # the rest saw no key there
            partials_of(memory, num_heads).lse.fill_(-torch.inf)
            memory.index_copy_(0, rows, message)
        elif message is not memory:
            memory.copy_(message)
