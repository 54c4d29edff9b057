"""Lists of blocks against brute force over the pairs of tiles."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import cpflex
from cases import LAYOUTS, MASKS, Problem
from cpflex.kernels.block_tables import BlockTables, block_tables
from cpflex.tile_mask import Runs, TileMask

SIZES = [(128, 128), (192, 128), (128, 96), (256, 128), (128, 64), (128, 256)]
CASES = [
    ("causal", 1000, "zigzag", 2),
    ("doc_causal", 1111, "balanced", 3),
    ("sliding128", 900, "striped", 2),
    ("full", 640, "contiguous", 1),
    ("nothing", 300, "contiguous", 2),
    ("global_sliding", 1500, "zigzag", 4),
]


def verdicts(tile_mask: TileMask) -> Tensor:
    """Of every pair, int [S, K]: 2 in a FULL tile, 1 in a PARTIAL one, 0 in none."""
    q_starts, kv_starts = tile_mask.q_starts.tolist(), tile_mask.kv_starts.tolist()
    found = torch.zeros(q_starts[-1], kv_starts[-1], dtype=torch.int32)

    def fill(runs: Runs, verdict: int) -> None:
        for row in range(len(q_starts) - 1):
            for first, count in runs.row(row):
                found[q_starts[row] : q_starts[row + 1], kv_starts[first] : kv_starts[first + count]] = verdict

    fill(tile_mask.full, 2)
    fill(tile_mask.partial, 1)
    return found


def brute_force(pairs: Tensor, block_q: int, block_kv: int, rows_are: str) -> tuple[list[list[int]], list[list[int]]]:
    """Blocks that each row lists, partial and full."""
    if rows_are == "key":
        pairs, block_q, block_kv = pairs.T, block_kv, block_q
    partial, full = [], []
    for row in pairs.split(block_q):
        blocks = row.split(block_kv, dim=1)
        full.append([i for i, block in enumerate(blocks) if (block == 2).all()])
        partial.append([i for i, block in enumerate(blocks) if block.any() and not (block == 2).all()])
    return partial, full


def listed(tables: BlockTables) -> tuple[list[list[int]], ...]:
    pairs = (tables.partial_count, tables.partial_index), (tables.full_count, tables.full_index)
    return tuple(
        [index[0, 0, row, :n].tolist() for row, n in enumerate(count[0, 0].tolist())] for count, index in pairs
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_a_block_is_full_in_full_tiles_and_left_out_where_no_tile_is(case: tuple[str, int, str, int]):
    mask, seq_len, layout, world_size = case
    problem = Problem(mask=mask, seq_len=seq_len)
    for rank in range(world_size):
        plan = cpflex.make_plan(
            MASKS[mask](problem),
            seq_len,
            rank=rank,
            world_size=world_size,
            layout=LAYOUTS[layout],
            schedule=cpflex.ring,
        )
        for step in plan.kinds["mask"].steps:
            pairs = verdicts(step.tile_mask)
            for block_q, block_kv in SIZES:
                for rows_are in ("query", "key"):
                    found = block_tables(step.tile_mask, block_q, block_kv, rows_are)
                    assert all(x.dtype == torch.int32 and x.ndim in (3, 4) for x in found)
                    assert listed(found) == brute_force(pairs, block_q, block_kv, rows_are)


def test_the_lists_of_all_steps_are_made_once():
    plan = cpflex.make_plan(cpflex.causal(), 600, rank=1, world_size=2, layout=cpflex.zigzag)
    tile_mask = plan.kinds["mask"].steps[0].tile_mask
    assert tile_mask.siblings is None
    from cpflex.kernels.tables import bring
    from cpflex.tile_mask import CPU, Idle

    kind = plan.kinds["mask"]
    none = torch.zeros(0, dtype=torch.bool)
    tables = bring(kind.mask, [step.tile_mask for step in kind.steps], Idle(none, none), CPU, with_work=False)
    first, second = (block_tables(tables.tile_masks[0], 128, 128) for _ in range(2))
    assert first is second
    assert len(tables.siblings.works["blocks", "query", 128, 128]) == len(kind.steps)
