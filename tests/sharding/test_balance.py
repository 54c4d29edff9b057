"""balanced: one layout has to suit every mask kind."""

from __future__ import annotations

import pytest

import cpflex
from cpflex.sharding.balance import SLACK_PERMILLE


def causal_within(lo: int, hi: int) -> cpflex.MaskMod:
    return cpflex.causal() & (lambda b, h, q, k: (q >= lo) & (q < hi) & (k >= lo))


@pytest.mark.parametrize("world_size", [4, 6, 8])
@pytest.mark.parametrize("cut", [4096, 2731])
def test_kinds_with_work_in_different_places_are_all_balanced(cut: int, world_size: int):
    """One kind works on the first part of the sequence, the other on the rest."""
    masks = {"first": causal_within(0, cut), "second": causal_within(cut, 8192)}
    stats = cpflex.make_plan(masks, 8192, rank=0, world_size=world_size).stats
    assert all(stats[kind]["imbalance"] <= 1 + SLACK_PERMILLE / 1000 for kind in masks)
