"""Layouts: who holds which tokens."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import cpflex
from cases import LAYOUTS
from cpflex.sharding.layout import ALIGNMENT, STRIPE, aligned_chunk_len

WORLDS = (1, 2, 3, 4, 8, 16)
LENGTHS = (1, 5, 16, 127, 128, 1000, 4096, 4097)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("seq_len", "world_size"), [*itertools.product(LENGTHS, WORLDS)])
def test_every_token_is_held_once_and_every_rank_holds_equally_many(name: str, seq_len: int, world_size: int):
    layout = LAYOUTS[name](seq_len, world_size)
    assert (layout.seq_len, layout.world_size) == (seq_len, world_size)
    positions = [layout.positions(rank) for rank in range(world_size)]
    assert {len(held) for held in positions} == {layout.local_len}
    np.testing.assert_array_equal(np.sort(np.concatenate(positions)), np.arange(world_size * layout.local_len))
    for rank, held in enumerate(positions):
        assert held.dtype == np.int64
        assert set(layout.owner[held // layout.chunk_len]) == {rank}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("seq_len", "world_size"), [*itertools.product(LENGTHS, WORLDS)])
def test_fragments_are_the_runs_of_tokens_in_the_order_in_which_a_rank_holds_them(
    name: str, seq_len: int, world_size: int
):
    layout = LAYOUTS[name](seq_len, world_size)
    assert len(layout.fragments) == world_size
    for rank, fragments in enumerate(layout.fragments):
        tokens = [position for start, stop in fragments for position in range(start, stop)]
        assert tokens == [position for position in layout.positions(rank).tolist() if position < seq_len]
        assert all(stop < start for (_, stop), (start, _) in itertools.pairwise(fragments)), "runs that touch are one"
    every = sorted(fragment for fragments in layout.fragments for fragment in fragments)
    assert [0, *(stop for _, stop in every)] == [*(start for start, _ in every), seq_len], "each token once"


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("seq_len", "world_size"), [*itertools.product(LENGTHS, WORLDS)])
def test_chunks_are_aligned_and_little_is_padded(name: str, seq_len: int, world_size: int):
    layout = LAYOUTS[name](seq_len, world_size)
    assert layout.chunk_len % ALIGNMENT == 0
    num_pads = layout.world_size * layout.local_len - seq_len
    assert 0 <= num_pads < max(layout.num_chunks * ALIGNMENT, world_size * STRIPE)


@pytest.mark.parametrize(
    ("seq_len", "world_size"),
    [
        (1, 1),
        (300, 2),
        (1000, 4),
        (8192, 8),
        (1, 8),
        (64, 2),
        (1000, 8),
        (4097, 8),
    ],
)
def test_balanced_pads_no_more_than_four_chunks_a_rank_would(seq_len: int, world_size: int):
    plan = cpflex.make_plan(cpflex.causal(), seq_len, rank=0, world_size=world_size)
    assert plan.local_len <= 4 * aligned_chunk_len(seq_len, 4 * world_size)


def held(layout: cpflex.Layout) -> list[tuple[int, ...]]:
    return list(layout.chunks)


def test_contiguous_deals_one_piece_to_each_rank():
    assert held(cpflex.contiguous(4096, 4)) == [(0,), (1,), (2,), (3,)]


def test_zigzag_pairs_head_and_tail():
    assert held(cpflex.zigzag(4096, 4)) == [(0, 7), (1, 6), (2, 5), (3, 4)]


def test_striped_deals_stripes_in_turn():
    layout = cpflex.striped(2048, 4)
    assert layout.chunk_len == STRIPE
    assert held(layout) == [(0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)]


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_zigzag_balances_a_causal_mask_exactly(world_size: int):
    plan = cpflex.make_plan(cpflex.causal(), 2048 * world_size, rank=0, world_size=world_size, layout=cpflex.zigzag)
    assert plan.stats["imbalance"] == 1.0


MASKS = {
    "full": cpflex.full(),
    "causal": cpflex.causal(),
    "window": cpflex.causal() & cpflex.sliding_window(300),
    "documents": cpflex.causal() & cpflex.document(cu_seqlens=[0, 3000, 3500, 7000, 8000]),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_balanced_is_at_least_as_even_as_the_fixed_layouts(mask: str, world_size: int):
    def busiest(layout) -> float:
        plan = cpflex.make_plan(MASKS[mask], 8000, rank=0, world_size=world_size, layout=layout)
        return max(plan.stats["work"])

    fixed = min(busiest(layout) for layout in (cpflex.contiguous, cpflex.zigzag, cpflex.striped))
    assert busiest(cpflex.balanced) <= 1.05 * fixed


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_rank_computes_the_same_layout(name: str):
    mask = {"documents": MASKS["documents"], "window": MASKS["window"]}
    tables = [
        cpflex.make_plan(
            mask, 8000, rank=rank, world_size=4, layout=LAYOUTS[name], weights={"documents": 1, "window": 5}
        )
        for rank in range(4)
    ]
    assert len({table.layout.key for table in tables}) == 1


BROKEN = {
    "a chunk twice": (lambda: cpflex.Layout(64, 16, ((0, 1), (1, 2)), "mine"), "every chunk to exactly one rank"),
    "a chunk missing": (lambda: cpflex.Layout(64, 16, ((0, 1), (2, 4)), "mine"), "every chunk to exactly one rank"),
    "unequal ranks": (lambda: cpflex.Layout(64, 16, ((0, 1), (2,)), "mine"), "equally many"),
    "too few chunks": (lambda: cpflex.Layout(65, 16, ((0, 1), (2, 3)), "mine"), "do not hold seq_len=65"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_table_that_is_no_layout_is_refused(name: str):
    make, message = BROKEN[name]
    with pytest.raises(ValueError, match=message):
        make()


def test_a_layout_function_of_ones_own_is_taken():
    def backwards(seq_len, world_size, work=None):
        there = cpflex.contiguous(seq_len, world_size)
        return cpflex.Layout(seq_len, there.chunk_len, there.chunks[::-1], "backwards")

    plan = cpflex.make_plan(cpflex.causal(), 64, rank=0, world_size=2, layout=backwards)
    assert plan.positions.tolist() == list(range(32, 64))


def test_a_layout_function_that_returns_something_else_is_refused():
    with pytest.raises(ValueError, match="layout must return a Layout of seq_len=64 for 2 ranks"):
        cpflex.make_plan(cpflex.causal(), 64, rank=0, world_size=2, layout=lambda *_: cpflex.contiguous(64, 4))
