"""Tile masks of whole plans against the mask itself, drawn pair by pair."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch

import cpflex
from cases import FACTORS, MASKS, Problem, pairwise
from cpflex.mods.trace import trace_mask_mod
from cpflex.planning.needs import classifier
from cpflex.planning.squares import classify_squares
from cpflex.tile_mask import TILE, Runs, TileMask, Tiles

SAMPLE = [
    Problem(**row, heads="gqa")
    for row in pairwise(
        {name: FACTORS[name] for name in ("mask", "layout", "schedule")}
        | {"world_size": [1, 2, 3, 5], "seq_len": [1, 127, 321, 1000]}
    )
]


def brute_force(problem: Problem, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(some, every) over batch and heads, bool [length, length]; pads see and are seen by nobody."""
    position = torch.arange(length)
    at = position.clamp(max=problem.seq_len - 1)
    real = position < problem.seq_len
    seen = torch.stack(
        [
            problem.mask_mod(torch.tensor(b), torch.tensor(h), at[:, None], at[None, :]).expand(length, length)
            for b in range(problem.batch_size)
            for h in range(problem.num_heads)
        ]
    )
    seen = seen & real[:, None] & real[None, :]
    return seen.any(dim=0).numpy(), seen.all(dim=0).numpy()


def tiles_of(runs: Runs) -> Iterator[tuple[int, int]]:
    """(row, column) of every tile."""
    for row in range(len(runs.offsets) - 1):
        for first, count in runs.row(row):
            assert count > 0
            yield from ((row, column) for column in range(first, first + count))


def spans(tile_mask: TileMask, row: int, column: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the queries and keys of a tile."""
    q, kv = tile_mask.q_starts.tolist(), tile_mask.kv_starts.tolist()
    return (
        tile_mask.q_positions[q[row] : q[row + 1]].numpy(),
        tile_mask.kv_positions[kv[column] : kv[column + 1]].numpy(),
    )


def plans_of(problem: Problem) -> list[cpflex.Plan]:
    return [problem.plan(None, rank=rank, world_size=problem.world_size) for rank in range(problem.world_size)]


@pytest.mark.by_day(6)
@pytest.mark.parametrize("problem", SAMPLE, ids=str)
def test_over_all_ranks_each_visible_tile_is_computed_once_and_its_verdict_is_right(problem: Problem):
    plans = plans_of(problem)
    length = problem.world_size * plans[0].local_len
    some, every = brute_force(problem, length)
    computed = np.zeros((length, length), dtype=np.int64)
    for plan in plans:
        for step in plan.steps:
            unproven = step.tile_mask.num_unproven
            for runs, is_full in ((step.tile_mask.full, True), (step.tile_mask.partial, False)):
                for tile in tiles_of(runs):
                    q, kv = spans(step.tile_mask, *tile)
                    here = np.ix_(q, kv)
                    computed[here] += 1
                    assert some[here].any() or unproven, "an EMPTY tile is not listed"
                    assert every[here].all() if is_full else not every[here].all() or unproven
    assert computed.max() <= 1
    assert not (some & (computed == 0)).any(), "every visible pair is computed"


@pytest.mark.by_day(6)
@pytest.mark.parametrize("problem", SAMPLE, ids=str)
def test_runs_by_key_are_the_transpose_and_runs_are_as_long_as_can_be(problem: Problem):
    for plan in plans_of(problem):
        for step in plan.steps:
            mask = step.tile_mask
            for by_q, by_kv in ((mask.full, mask.full_by_kv), (mask.partial, mask.partial_by_kv)):
                tiles = list(tiles_of(by_q))
                assert sorted(tiles) == sorted((q, kv) for kv, q in tiles_of(by_kv))
                assert len(set(tiles)) == len(tiles) == by_q.num_tiles == by_kv.num_tiles
                assert (len(by_q.offsets), len(by_kv.offsets)) == (len(mask.q_starts), len(mask.kv_starts))
                for runs in (by_q, by_kv):
                    for row in range(len(runs.offsets) - 1):
                        ends = [(first, first + count) for first, count in runs.row(row)]
                        assert all(a[1] < b[0] for a, b in itertools.pairwise(ends)), "neighbours are joined"


@pytest.mark.by_day(6)
@pytest.mark.parametrize("problem", SAMPLE, ids=str)
def test_a_tile_is_consecutive_tokens_of_one_chunk(problem: Problem):
    for plan in plans_of(problem):
        chunk_len = plan.layout.chunk_len
        for step in plan.steps:
            mask = step.tile_mask
            for positions, starts in ((mask.q_positions, mask.q_starts), (mask.kv_positions, mask.kv_starts)):
                assert (positions.dtype, starts.dtype) == (torch.int32, torch.int32)
                assert starts[0] == 0
                assert starts[-1] == len(positions)
                for begin, end in zip(starts.tolist(), starts[1:].tolist(), strict=False):
                    tile = positions[begin:end]
                    assert 0 < len(tile) <= TILE
                    assert (tile.diff() == 1).all()
                    assert len(set((tile // chunk_len).tolist())) == 1
            torch.testing.assert_close(mask.q_positions.long(), plan.positions)


@pytest.mark.by_day(6)
@pytest.mark.parametrize("problem", SAMPLE, ids=str)
def test_the_keys_of_a_step_are_the_rows_of_its_sources(problem: Problem):
    for plan in plans_of(problem):
        for step in plan.steps:
            held = [
                plan.layout.positions(owner)[start:stop]
                for owner, rows in step.exchange.sources
                for start, stop in rows
            ]
            positions = np.concatenate(held) if held else np.zeros(0)
            np.testing.assert_array_equal(step.tile_mask.kv_positions.numpy(), positions)


@pytest.mark.parametrize("mask", MASKS)
def test_work_is_counted_by_tile(mask: str):
    """stats["work"]: the same from every rank, and never less than the pairs of the tiles computed."""
    problem = Problem(mask, seq_len=1000, world_size=3, heads="gqa")
    plans = plans_of(problem)
    stats = [plan.stats for plan in plans]
    assert all(s["work"] == stats[0]["work"] and s["needed_tokens"] == stats[0]["needed_tokens"] for s in stats)
    some, _ = brute_force(problem, 3 * plans[0].local_len)
    for rank, plan in enumerate(plans):
        tiles = [
            np.prod([len(x) for x in spans(step.tile_mask, *tile)])
            for step in plan.steps
            for runs in (step.tile_mask.full, step.tile_mask.partial)
            for tile in tiles_of(runs)
        ]
        assert stats[0]["work"][rank] >= sum(tiles) >= some[plan.positions.numpy()].sum()
        assert plan.stats["full_tiles"] + plan.stats["partial_tiles"] == len(tiles)


def test_tiles_beyond_the_budget_stay_partial_and_are_counted(monkeypatch: pytest.MonkeyPatch):
    """A mask that intervals cannot bound, full in truth."""

    def opaque(b, h, q, k):
        return torch.sin(q * 1.0) * torch.sin(k * 1.0) < 2.0

    proven = cpflex.make_plan(opaque, 1024)
    assert (proven.stats["full_tiles"], proven.stats["unproven_tiles"]) == (64, 0)
    large = cpflex.make_plan(opaque, 128 * 40)
    stats = large.stats
    assert stats["unproven_tiles"] == stats["partial_tiles"] > 0
    assert stats["full_tiles"] + stats["partial_tiles"] == 1600


NAMED = ["full", "causal", "doc_full", "doc_causal", "sliding17", "sliding1024", "doc_sliding_causal", "two_sided"]


@pytest.mark.parametrize("mask", [*NAMED, "prefix_lm", "other_documents_or_window"])
def test_named_masks_evaluate_hardly_more_tiles_at_16k_than_they_must(mask: str):
    problem = Problem(mask, seq_len=16384)
    plan = cpflex.make_plan(problem.mask_mod, problem.seq_len)
    tiles, kv = problem.seq_len // TILE, torch.arange(problem.seq_len)
    full = partial = 0
    for row in torch.arange(problem.seq_len).view(tiles, TILE, 1):
        seen = problem.mask_mod(torch.tensor(0), torch.tensor(0), row, kv).expand(TILE, -1).reshape(TILE, tiles, TILE)
        some, every = seen.any(dim=2).any(dim=0), seen.all(dim=2).all(dim=0)
        full += int(every.sum())
        partial += int((some & ~every).sum())
    assert plan.stats["full_tiles"] <= full
    assert plan.stats["partial_tiles"] <= 1.1 * partial
    assert plan.stats["full_tiles"] + plan.stats["partial_tiles"] >= full + partial


def squares_looked_at(problem: Problem) -> int:
    classify, looked_at = classifier(trace_mask_mod(problem.mask_mod), 1, 1), []

    def counted(*bounds):
        looked_at.append(len(bounds[0]))
        return classify(*bounds)

    classify_squares(counted, Tiles(problem.seq_len, 1))
    return sum(looked_at)


@pytest.mark.parametrize("mask", ["causal", "doc_sliding_causal", "block_diffusion", "prefix_lm"])
def test_the_planner_looks_along_the_boundary_and_not_at_the_area(mask: str):
    """Four times the tokens, four times the squares; all tiles are sixteen times as many."""
    short, long = (squares_looked_at(Problem(mask, seq_len=seq_len)) for seq_len in (1 << 15, 1 << 17))
    assert long <= 4.2 * short


def test_tables_that_would_not_fit_in_memory_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cpflex.planning.tables.MAX_RUNS", 100)
    with pytest.raises(NotImplementedError, match=r"made of [\d,]+ runs of tiles; 100 are supported"):
        cpflex.make_plan(cpflex.causal(), 1 << 16, rank=0, world_size=8)
