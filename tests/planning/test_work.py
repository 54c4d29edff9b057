"""Work and needs of chunks: tile by tile, at any length."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import cpflex
from cpflex.mods.trace import trace_mask_mod
from cpflex.planning.mask_kind import KindWork
from cpflex.planning.needs import chunk_needs, classifier, whole_mask
from cpflex.planning.squares import classify_squares
from cpflex.sharding.layout import ChunkNeeds, aligned_chunk_len
from cpflex.tile_mask import Tiles

SEQ_LEN = 3000
CU = [0, 700, 701, 1900, 3000]
MASKS = {
    "full": cpflex.full(),
    "causal": cpflex.causal(),
    "documents": cpflex.causal() & cpflex.document(cu_seqlens=CU),
    "window": cpflex.causal() & cpflex.sliding_window(300),
    "prefix": cpflex.prefix_lm(1000),
    "nothing": lambda b, h, q, k: (q < 0) & (k >= 0),
}


def work_of(mask: str, seq_len: int) -> KindWork:
    """As `make_plan` makes it: the mask is false at pads."""
    mask_mod = MASKS[mask]
    inside = trace_mask_mod(lambda b, h, q, k: mask_mod(b, h, q, k) & (q < seq_len) & (k < seq_len))
    return KindWork({"mask": inside}, {"mask": 1.0}, 1, 1)


def brute_force(mask: str, tiles: Tiles, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs in tiles with any True in them, by chunk; and whether a block of keys is in any of them."""
    token = torch.arange(SEQ_LEN)
    size = tiles.num_chunks * tiles.chunk_len
    dense = np.zeros((size, size), dtype=bool)
    dense[:SEQ_LEN, :SEQ_LEN] = MASKS[mask](torch.tensor(0), torch.tensor(0), token[:, None], token)
    seen = np.logical_or.reduceat(np.logical_or.reduceat(dense, tiles.lo, axis=0), tiles.lo, axis=1)
    pairs = seen * tiles.length[:, None] * tiles.length
    work = np.array([pairs[tiles.chunk == chunk].sum() for chunk in range(tiles.num_chunks)])
    sees = np.array([seen[tiles.chunk == chunk].any(axis=0) for chunk in range(tiles.num_chunks)])
    return work, np.logical_or.reduceat(sees, blocks, axis=1)


def check(needs: ChunkNeeds, mask: str, tiles: Tiles) -> None:
    block_start = np.cumsum(needs.block_len) - needs.block_len
    work, sees = brute_force(mask, tiles, np.searchsorted(tiles.lo, block_start))
    np.testing.assert_array_equal(needs.work, work)
    np.testing.assert_array_equal(needs.sees, sees)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("num_chunks", [1, 6, 12, 23, 47])
def test_work_and_needs_are_those_of_a_table_of_all_pairs(mask: str, num_chunks: int):
    """Chunks of whole tiles share one classification; others are cut on their own."""
    work, chunk_len = work_of(mask, SEQ_LEN), aligned_chunk_len(SEQ_LEN, num_chunks)
    for length, count in ((128, 24), (chunk_len, num_chunks), (512, 6)):
        check(work(length, count)["mask"], mask, Tiles(length, count))


@pytest.mark.parametrize("mask", MASKS)
def test_needs_are_counted_in_larger_blocks_where_there_are_many(mask: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cpflex.planning.needs.MAX_BLOCKS", 6)
    monkeypatch.setattr("cpflex.planning.needs.SLAB_CELLS", 1)
    needs = work_of(mask, SEQ_LEN)(768, 4)["mask"]
    assert needs.block_len.tolist() == [768] * 4
    check(needs, mask, Tiles(768, 4))


def test_work_is_counted_by_tile_in_a_sequence_of_a_million_tokens():
    """Two tiles in each row of tiles but the first: blocks of S / 4096 would count three times as much."""
    seq_len, window = 1 << 20, 128
    plan = cpflex.make_plan(cpflex.causal() & cpflex.sliding_window(window), seq_len, rank=0, world_size=64)
    assert sum(plan.stats["work"]) == (2 * seq_len // 128 - 1) * 128 * 128


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("most", [1, 20, 100])
def test_a_mask_with_too_long_a_boundary_is_counted_in_coarser_squares_never_too_little(mask: str, most: int):
    tiles = Tiles(128, 24)
    classify = work_of(mask, SEQ_LEN).classifiers["mask"]
    exact, coarse = (chunk_needs(classify_squares(classify, tiles, most=m), tiles) for m in (None, most))
    assert (coarse.work >= exact.work).all() and (coarse.sees >= exact.sees).all()
    assert coarse.work.sum() <= (128 * 24) ** 2
    np.testing.assert_array_equal(chunk_needs(whole_mask(classify, tiles), tiles).work, exact.work)


def test_squares_are_cut_no_further_where_they_would_be_too_many():
    looked_at = []
    classify = classifier(trace_mask_mod(cpflex.causal()), 1, 1)

    def counted(q_lo, *others):
        looked_at.append(len(q_lo))
        return classify(q_lo, *others)

    classify_squares(counted, Tiles(128, 1024), most=100)
    assert max(looked_at) <= 100
