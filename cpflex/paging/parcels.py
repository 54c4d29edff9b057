"""Parcels: which rows a rank sends in one step where ranks have different tokens, and where those that arrive go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from cpflex.paging.steps import Steps
from cpflex.paging.traffic import Traffic

Rows = list[Tensor]
"""Indices by rank, int64, on a device."""


@dataclass(frozen=True)
class Parcels:
    """Of one rank, in one step of one mask kind."""

    queries: Rows
    """To each rank: of this rank's tokens. To itself: those that meet its own pages."""
    new: Rows
    """New keys to each rank: of this rank's tokens. To itself: those that it keeps or fetches."""
    num_new: list[int]
    """From each rank."""
    first_queries: np.ndarray
    """In the first message from each rank to each: queries, int64 [P, P],"""
    first_keys: np.ndarray
    """and rows of keys, new ones and those of the first wave."""
    kept: Tensor
    """Of all new keys that it has then, in the order of tokens: those that it owns,"""
    kept_rows: Tensor
    """and their rows of the pool."""
    met: Tensor
    """Those of pages that it fetches,"""
    met_rows: Tensor
    """and their rows of what is fetched."""
    old: list[Rows]
    """By wave, to each rank: rows of the pool."""
    fetched: list[Rows]
    """By wave, from each rank: rows of what is fetched."""


@dataclass(frozen=True)
class Returns:
    """Of one rank and one mask kind, while a plan lasts: where the partials of its tokens lie, and go.

    Those of a token whose queries travel are rows of [P, num_asked], those of one to which keys travel of [slots,
    num_by_keys] behind them: of what is kept, of what was fetched, and room for the next wave.
    """

    num_asked: int
    num_by_keys: int
    slots: int
    by_keys: Tensor
    """Of this rank's tokens, those to which keys travel."""
    by_keys_computed: Tensor
    """The same, of those that it computes."""
    own_computed: Tensor
    """Of those that it computes, its own whose queries travel."""
    sent: list[slice]
    """To each rank: of the tokens that this one computes."""
    arrived: list[Tensor | None]
    """From each rank, itself too: of its tokens whose queries travel; None for all of them."""
    parts: Tensor
    """Of each of its tokens, int32 [n, 3], as `combine` takes them."""
    pairs: Tensor
    """Of each token to which keys travel, those of the second and third slot, int32 [num_by_keys, 3]."""


def returns_of(traffic: Traffic, rank: int, device: torch.device) -> Returns:
    ranks, (first, end) = range(len(traffic.bounds) - 1), traffic.bounds[rank : rank + 2]
    own, computed = traffic.own(rank), traffic.computed[rank]
    by_keys = traffic.by_keys[own]
    asked = own[~by_keys]
    came = [
        np.searchsorted(asked, one[~traffic.by_keys[one]])
        for one in (_between(x, first, end) for x in traffic.computed)
    ]
    is_own = (computed >= first) & (computed < end)
    of_computed = traffic.by_keys[computed]
    slots, num_by_keys = 1 + min(2, traffic.num_waves), len(own) - len(asked)
    parts = np.empty((len(own), 3), np.int32)
    parts[~by_keys] = _parts(0, len(asked), len(ranks))
    parts[by_keys] = _parts(len(ranks) * len(asked), num_by_keys, min(slots, 2))
    arrays = [
        np.flatnonzero(by_keys),
        np.flatnonzero(is_own & of_computed),
        np.flatnonzero(is_own & ~of_computed),
        *came,
    ]
    edges = [np.searchsorted(computed, traffic.bounds[r : r + 2]).tolist() for r in ranks]
    by_keys_at, by_keys_computed, own_computed, *arrived = _brought(arrays, device)
    return Returns(
        num_asked=len(asked),
        num_by_keys=num_by_keys,
        slots=slots,
        by_keys=by_keys_at,
        by_keys_computed=by_keys_computed,
        own_computed=own_computed,
        sent=[slice(*edge) if r != rank else slice(0, 0) for r, edge in enumerate(edges)],
        arrived=[None if len(rows) == len(asked) else rows for rows in arrived],
        parts=torch.from_numpy(parts).to(device),
        pairs=torch.from_numpy(_parts(len(ranks) * len(asked) + num_by_keys, num_by_keys, 2)).to(device),
    )


def _parts(begin: int, count: int, each: int) -> np.ndarray:
    """Of ``count`` tokens, ``each`` of them as far apart as there are tokens, int32 [count, 3]."""
    rows = np.arange(begin, begin + count)
    return np.stack([rows, np.full(count, count), np.full(count, each)], axis=1).astype(np.int32)


def parcels_of(traffic: Traffic, steps: Steps, device: torch.device, *, new_ones_travel: bool) -> Parcels:
    """
    Args:
        new_ones_travel: the step's keys are with the ranks that computed them; else where their pages lie.
    """
    rank, ranks, page_size = steps.pages.rank, range(steps.pages.world_size), steps.pages.page_size
    pages, (first, end) = traffic.pages, traffic.bounds[steps.pages.rank : steps.pages.rank + 2]
    page = pages.at(steps.place, steps.positions // page_size)
    met = [_found(page, traffic.fetched[0][r]) for r in ranks]
    wanted = [np.flatnonzero((steps.owner == r) | (met[r] >= 0)) if new_ones_travel else page[:0] for r in ranks]
    mine = wanted[rank]
    kept, there = np.flatnonzero(steps.owner[mine] == rank), met[rank][mine]
    fresh = np.flatnonzero(there >= 0)
    arrays = [_between(traffic.computed[r], first, end) - first for r in ranks]
    arrays += [_between(wanted[r], first, end) - first for r in ranks]
    arrays += [kept, steps.row[mine[kept]], fresh, there[fresh] * page_size + steps.positions[mine[fresh]] % page_size]
    rows = [  # of each page, by wave
        pages.rows_below(steps.lengths + (0 if new_ones_travel and wave == 0 else steps.counts_of_new), page_size)
        for wave in range(len(traffic.fetched))
    ]
    for counts, lists in zip(rows, traffic.fetched, strict=True):
        for r in ranks:
            own = lists[r][pages.owner[lists[r]] == rank] if r != rank else lists[r][:0]
            arrays.append(_rows(pages.slot[own] * page_size, counts[own]))
        for r in ranks:
            at = np.flatnonzero(pages.owner[lists[rank]] == r)
            arrays.append(_rows(at * page_size, counts[lists[rank][at]]))
    home = np.searchsorted(traffic.bounds, np.arange(steps.num_tokens), side="right") - 1
    queries, new, old = (  # in the first message from each rank to each
        np.stack([np.bincount(by, how_many, len(ranks)) for by, how_many in lists], axis=1).astype(np.int64)
        for lists in (
            [(home[tokens], None) for tokens in traffic.computed],
            [(home[tokens], None) for tokens in wanted],
            [(pages.owner[fetched], rows[0][fetched]) for fetched in traffic.fetched[0]],
        )
    )
    found, size = _brought(arrays, device), len(ranks)
    kept_at, kept_rows, met_at, met_rows, *rest = found[2 * size :]
    by_wave = [rest[begin : begin + size] for begin in range(0, len(rest), size)]
    return Parcels(
        queries=found[:size],
        new=found[size : 2 * size],
        num_new=new[:, rank].tolist(),
        first_queries=queries * ~np.eye(len(ranks), dtype=bool),
        first_keys=(new + old) * ~np.eye(len(ranks), dtype=bool),
        kept=kept_at,
        kept_rows=kept_rows,
        met=met_at,
        met_rows=met_rows,
        old=by_wave[::2],
        fetched=by_wave[1::2],
    )


def _found(page: np.ndarray, fetched: np.ndarray) -> np.ndarray:
    """Where pages lie among those that are fetched; -1 of others."""
    if not len(fetched):
        return np.full(len(page), -1)
    at = np.minimum(np.searchsorted(fetched, page), len(fetched) - 1)
    return np.where(fetched[at] == page, at, -1)


def _between(tokens: np.ndarray, first: int, end: int) -> np.ndarray:
    """Of ascending tokens, those of one rank."""
    return tokens[slice(*np.searchsorted(tokens, (first, end)))]


def _rows(begins: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """``counts`` rows from each of ``begins`` on."""
    return np.repeat(begins - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())


def _brought(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """All at once."""
    whole = torch.from_numpy(np.concatenate(arrays).astype(np.int64)).to(device)
    return [whole[begin:end] for begin, end in pairwise(accumulate(map(len, arrays), initial=0))]
