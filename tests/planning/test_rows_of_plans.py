"""Row bounds of plans against brute force: of a rank's queries, at global positions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import cpflex
from cases import MASKS, Problem

S, B, H = 96, 2, 4
BEGIN = 64


def _whole(mask: Callable[..., Tensor], **options: int) -> cpflex.Plan:
    return cpflex.make_plan(mask, S, layout=cpflex.zigzag, **options)


def _chunk(mask: Callable[..., Tensor], **options: int) -> cpflex.Plan:
    first = cpflex.make_plan(cpflex.cached(mask, []), BEGIN, layout=cpflex.striped, **options)
    return cpflex.make_plan(cpflex.cached(mask, [first]), S - BEGIN, layout=cpflex.zigzag, **options)


def _within(mask: Callable[..., Tensor], **options: int) -> cpflex.Plan:
    return cpflex.make_plan(mask, S - BEGIN, start=BEGIN, **options)


def _crossed(mask: Callable[..., Tensor], **options: int) -> cpflex.Plan:
    keys = cpflex.make_plan(cpflex.full(), S, layout=cpflex.striped, **options)
    return cpflex.make_plan(cpflex.cross(mask, keys), S, **options)


PLANS = {"whole": _whole, "chunk": _chunk, "within a chunk": _within, "crossed": _crossed}


@pytest.mark.by_day(8)
@pytest.mark.parametrize("of", PLANS)
@pytest.mark.parametrize("name", MASKS)
def test_row_bounds_of_a_plan_are_what_its_queries_see(name: str, of: str):
    mask = Problem(mask=name, seq_len=S, batch_size=B, heads="gqa").mask_mod
    whole = cpflex.make_plan(mask, S, batch_size=B, num_heads=H)
    for rank in range(2):
        plan = PLANS[of](mask, rank=rank, world_size=2, batch_size=B, num_heads=H)
        first_key = BEGIN if of == "within a chunk" else 0
        q, k = plan.positions.clamp(max=S - 1), torch.arange(first_key, S)
        seen = torch.stack([  # one batch and head at a time: masks index tables by them, shift[b][h]
            mask(torch.tensor(b), torch.tensor(h), q[:, None], k).expand(len(q), len(k))
            for b in range(B) for h in range(H)
        ]).view(B, H, len(q), len(k)) & (plan.positions < S)[:, None]  # fmt: skip
        if plan.row_bounds is None:
            assert whole.row_bounds is None, "a part of the queries or keys has bounds where all have"
            continue
        first, end = plan.row_bounds
        assert first.dtype == end.dtype == torch.int32
        assert first.shape[-1] == plan.local_len
        found = (k >= first[..., None]) & (k < end[..., None])
        assert torch.equal(*(x.expand(B, H, len(q), len(k)) for x in (found, seen)))
        stored = cpflex.Plan.from_bytes(plan.to_bytes()).row_bounds
        assert stored is not None
        assert torch.equal(stored[0], first)
        assert torch.equal(stored[1], end)


def test_rows_that_exchange_heads_have_bounds_of_their_outer_shard():
    plan = cpflex.make_plan(cpflex.causal(), 100, rank=3, world_size=4, ulysses_size=2)
    assert plan.row_bounds is not None
    first, end = plan.row_bounds
    positions = torch.from_numpy(plan.outer.positions(1))
    assert not first.any()
    assert end[0, 0].tolist() == torch.where(positions < 100, positions + 1, 0).tolist()


def test_a_plan_of_several_kinds_is_indexed_first():
    plan = cpflex.make_plan({"full": cpflex.causal(), "sinks": lambda b, h, q, k: (k < 4) | (k == q)}, 64)
    with pytest.raises(TypeError, match="index it first"):
        _ = plan.row_bounds
    assert plan["full"].row_bounds is not None
    assert plan["sinks"].row_bounds is None
