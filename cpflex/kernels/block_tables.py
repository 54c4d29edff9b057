"""A tile mask as lists of blocks, as kernels of other libraries take it: both axes cut into blocks of one size from the
first token on, and of each row of blocks those whose mask is evaluated and those without any.

Blocks need not begin where tiles do. One that lies in FULL tiles alone is full; one that no listed tile reaches is left
out; the others are partial: the mask says the same of tiles that were left out.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cpflex.kernels.tables import copy_at_once
from cpflex.tile_mask import Runs, Siblings, TileMask

# R rows of blocks, N the most blocks that a row lists


class BlockTables(NamedTuple):
    """Blocks of columns of each row of blocks, rising; entries past the count of a row are 0."""

    partial_count: Tensor  # int32 [1, 1, R]
    partial_index: Tensor  # int32 [1, 1, R, N]
    full_count: Tensor  # int32 [1, 1, R]
    full_index: Tensor  # int32 [1, 1, R, N]


def block_tables(tile_mask: TileMask, block_q: int, block_kv: int, rows_are: str = "query") -> BlockTables:
    """The lists of one step, on the device of the tile mask; made for all steps of a plan at once, and kept.

    Args:
        rows_are: "query", each with the blocks of keys that it sees; or "key", each with those of queries that see it.
    """
    siblings, key = tile_mask.siblings or Siblings((tile_mask,)), ("blocks", rows_are, block_q, block_kv)
    if key not in siblings.works:
        made = [_tables(mask, block_q, block_kv, rows_are) for mask in siblings.masks]
        moved = iter(copy_at_once([table for tables in made for table in tables], tile_mask.device, siblings))
        siblings.works[key] = [BlockTables(*(next(moved) for _ in tables)) for tables in made]
    return siblings.works[key][tile_mask.index]


def _tables(tile_mask: TileMask, block_q: int, block_kv: int, rows_are: str) -> BlockTables:
    verdicts = _verdicts(tile_mask)
    reached = _reduced(verdicts, tile_mask, block_q, block_kv, np.maximum) > 0
    full = _reduced(verdicts, tile_mask, block_q, block_kv, np.minimum) == 2
    if rows_are == "key":
        reached, full = reached.T, full.T
    return BlockTables(*_listed(reached & ~full), *_listed(full))


def _verdicts(tile_mask: TileMask) -> np.ndarray:
    """Of each tile, int8 [q_tiles, kv_tiles]: 2 if FULL, 1 if PARTIAL, 0 if it is not listed."""
    shape = len(tile_mask.q_first), len(tile_mask.kv_first)
    return 2 * _marked(tile_mask.full, shape) + _marked(tile_mask.partial, shape)


def _marked(runs: Runs, shape: tuple[int, int]) -> np.ndarray:
    edges = np.zeros((shape[0], shape[1] + 1), dtype=np.int8)
    row = np.repeat(np.arange(shape[0]), runs.offsets.diff().numpy())
    first, count = runs.first.numpy(), runs.count.numpy()
    np.add.at(edges, (row, first), 1)
    np.add.at(edges, (row, first + count), -1)
    return edges.cumsum(axis=1, dtype=np.int8)[:, :-1]


def _reduced(verdicts: np.ndarray, tile_mask: TileMask, block_q: int, block_kv: int, extremum: np.ufunc) -> np.ndarray:
    """The largest or the smallest verdict of the tiles that each block meets."""
    for axis, (starts, block) in enumerate(((tile_mask.q_starts, block_q), (tile_mask.kv_starts, block_kv))):
        at = starts.numpy()
        begins = np.arange(0, at[-1], block)
        first = np.searchsorted(at, begins, side="right") - 1
        end = np.searchsorted(at, np.minimum(begins + block, at[-1]), side="left")
        # reduceat takes the ranges between neighbours; every second one is a block's
        pairs = np.stack([first, end], axis=1).reshape(-1)
        # an end may lie one past the last tile
        padded = np.pad(verdicts, [(0, int(dim == axis)) for dim in range(2)])
        verdicts = extremum.reduceat(padded, pairs, axis=axis).take(np.arange(0, len(pairs), 2), axis=axis)
    return verdicts


def _listed(marked: np.ndarray) -> tuple[Tensor, Tensor]:
    """(count [1, 1, R], index [1, 1, R, N]) of the marked columns of each row."""
    count = marked.sum(axis=1)
    index = np.zeros((len(marked), max(1, count.max(initial=0))), dtype=np.int32)
    row, column = marked.nonzero()
    nth = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    index[row, nth] = column
    return torch.from_numpy(count.astype(np.int32))[None, None], torch.from_numpy(index)[None, None]
