"""Masks by blocks: a table says which blocks of keys a block of queries sees."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cpflex.masks import MaskMod, is_count
from cpflex.masks_from.checked import by_head, integers, length
from cpflex.masks_from.rows import MAX_INTERVALS, by_rows, element_of, runs_of_pairs, runs_of_table

MAX_TABLE = 1 << 26
"""Elements of a table that is kept whole, if a row of it has more than `MAX_RUNS` runs; a larger one may have as many
as a mask by rows."""

MAX_RUNS = 4
"""Runs of blocks in a row up to which intervals of keys are cheaper than the table: to plan, and to compute."""

SMALL_TABLE = 1 << 22
"""Elements of a table that is kept whole if its heads or batches differ: intervals of several heads prove less."""

BlockSize = int | Tensor


@dataclass(frozen=True)
class Blocks:
    """One axis cut in blocks: of one size, the last perhaps shorter, or of the sizes in a tensor."""

    length: int
    size: BlockSize

    @property
    def count(self) -> int:
        return -(-self.length // self.size) if isinstance(self.size, int) else self.size.numel()

    @cached_property
    def _cells(self) -> Tensor:
        assert isinstance(self.size, Tensor), "blocks of one size need no table"
        numbers = torch.arange(self.size.numel(), dtype=torch.int32, device=self.size.device)
        return torch.repeat_interleave(numbers, self.size)

    def of(self, position: Tensor) -> Tensor:
        """The block of a position."""
        if isinstance(self.size, int):
            return position if self.size == 1 else position // self.size
        return self._cells[position]

    def start(self, block: Tensor) -> Tensor:
        """The first position of a block; the length for the block after the last."""
        if isinstance(self.size, int):
            return (block * self.size).clamp(max=self.length)
        return torch.cat([self.size.new_zeros(1), self.size.cumsum(0)]).to(block.device)[block]


def axis_of(size: object, seq_len: int | None, num_blocks: int, name: str) -> Blocks:
    """``num_blocks`` blocks of a size, or of sizes, over ``seq_len`` tokens: all of them if None.

    Raises:
        ValueError: they do not cover that many tokens, or more than that.
    """
    if isinstance(size, Tensor) and size.ndim:
        sizes = integers(size, f"block_size of {name}", "[num_blocks]").long()
        total = int(sizes.sum())
        if len(sizes) != num_blocks or (sizes < 0).any() or total != (seq_len or total) or not total:
            raise ValueError(
                f"block sizes of {name} must be {num_blocks}, as many as the table's, none below 0, and add up to "
                f"{name}_len={seq_len}; got {len(sizes)} of {total} tokens in all"
            )
        return Blocks(total, sizes)
    if seq_len is None:
        return axis_of_one_size(size, num_blocks * size if is_count(size, 1) else 1, name)  # type: ignore[operator]
    blocks = axis_of_one_size(size, seq_len, name)
    if blocks.count != num_blocks:
        raise ValueError(
            f"the table has {num_blocks} blocks of {size} {name} tokens; {name}_len={seq_len} has {blocks.count}"
        )
    return blocks


def axis_of_one_size(size: object, seq_len: int, name: str) -> Blocks:
    """As many blocks as ``seq_len`` tokens need."""
    if not isinstance(size, int) or not is_count(size, 1):
        raise ValueError(f"block_size of {name} must be an integer of at least 1, or a tensor of sizes; got {size!r}")
    return Blocks(length(seq_len, f"{name}_len"), size)


def pair_of(block_size: object) -> tuple[object, object]:
    """(of queries, of keys) of a block_size that is one number, or two."""
    if isinstance(block_size, tuple | list) and len(block_size) == 2:
        return block_size[0], block_size[1]
    return block_size, block_size


@torch.inference_mode(False)
def blocks(
    table: Tensor,  # bool, or integers 0 and 1: [Q, K], [H, Q, K] or [B, H, Q, K] of blocks
    block_size: int | tuple[BlockSize, BlockSize],
    *,
    q_len: int | None = None,
    kv_len: int | None = None,
    num_heads: int | None = None,
) -> MaskMod:
    """A query sees the keys of the blocks that ``table`` marks for its own block.

    For instance FlashInfer's ``block_mask_map`` with ``block_row_sz`` and ``block_col_sz``, FlashMask's ``block_mask``,
    or what MoBA and NSA select. The two axes have blocks and lengths of their own; no alignment is implied.

    Args:
        block_size: tokens of a block, or (of queries, of keys); each an integer, or a tensor of the sizes of all
            blocks.
        q_len, kv_len: tokens, where the last block is shorter than the others.
        num_heads: query heads, if the table has those of the keys.

    Raises:
        ValueError: another dtype or shape, elements that are neither 0 nor 1, blocks that do not fit the lengths.
        NotImplementedError: an irregular table of more than 2**26 elements.
    """
    if not isinstance(table, Tensor) or table.is_floating_point() or table.ndim not in (2, 3, 4) or 0 in table.shape:
        raise ValueError(f"table must be bool or integers [Q, K], [H, Q, K] or [B, H, Q, K]; got {_kind(table)}")
    if table.dtype != torch.bool and ((table != 0) & (table != 1)).any():
        raise ValueError("table must be bool, or integers 0 and 1: whether a block is seen, not its number")
    table = by_head(table.detach().bool().view(*[1] * (4 - table.ndim), *table.shape), num_heads, "table")
    q_size, kv_size = pair_of(block_size)
    q_axis = axis_of(q_size, q_len, table.shape[2], "q")
    kv_axis = axis_of(kv_size, kv_len, table.shape[3], "kv")
    return of_table(table, q_axis, kv_axis, "blocks")


@torch.inference_mode(False)
def selected(
    indices: Tensor,  # integers [Q, n], [H, Q, n] or [B, H, Q, n]: blocks of keys; -1 where there is none
    block_size: int | tuple[int, int],
    *,
    q_len: int,
    kv_len: int | None = None,
    num_heads: int | None = None,
) -> MaskMod:
    """A query sees the blocks of keys listed for its own block of queries, as MoBA and NSA select them.

    A listed block is seen whole: combine with `causal` where a query may not see the end of its own block. A block
    that is listed twice is seen once.

    Args:
        block_size: tokens of a block, or (of queries, of keys): (1, 64) where every query has a selection of its own.
        kv_len: tokens of the keys; ``q_len`` if None.
        num_heads: query heads, if the list has those of the keys.

    Raises:
        ValueError: another dtype or shape, a number below -1 or beyond the last block.
        NotImplementedError: an irregular selection of more than 2**26 pairs of blocks.
    """
    indices = torch.as_tensor(indices)
    if indices.ndim in (2, 3):
        indices = indices.view(*[1] * (4 - indices.ndim), *indices.shape)
    indices = by_head(integers(indices, "indices", "[B, H, Q, n]").long(), num_heads, "indices")
    q_size, kv_size = pair_of(block_size)
    q_axis = axis_of(q_size, q_len, indices.shape[2], "q")
    kv_axis = axis_of_one_size(kv_size, q_len if kv_len is None else kv_len, "kv")
    if (indices < -1).any() or (indices >= kv_axis.count).any():
        raise ValueError(f"indices must be from 0 to {kv_axis.count - 1}, or -1 for none; got {range_of(indices)}")
    shape = indices.shape[0], indices.shape[1], indices.shape[2]
    row = torch.arange(shape[0] * shape[1] * shape[2], device=indices.device)[:, None]
    chosen = indices.reshape(len(row), -1)
    pairs = (row * kv_axis.count + chosen)[chosen >= 0].unique()
    return of_pairs(pairs // kv_axis.count, pairs % kv_axis.count, shape, q_axis, kv_axis, "selected")


def of_table(table: Tensor, q_axis: Blocks, kv_axis: Blocks, name: str, small: int = SMALL_TABLE) -> MaskMod:
    """The mask of a bool [B, H, Q, K] of blocks: by rows where these have few runs, else by the table."""
    runs = None if table.numel() <= small and _varies(table) else runs_of_table(table, _most_runs(table.shape))
    return _by_table(table, q_axis, kv_axis, name) if runs is None else _by_runs(*runs, q_axis, kv_axis, name)


def of_pairs(
    row: Tensor, col: Tensor, shape: tuple[int, int, int], q_axis: Blocks, kv_axis: Blocks, name: str
) -> MaskMod:
    """`of_table` of the table that is True at the pairs, rising, of which rows count through ``shape``: [B, H, Q]."""
    if torch.Size((*shape, kv_axis.count)).numel() <= SMALL_TABLE:
        return of_table(table_of(row, col, shape, kv_axis), q_axis, kv_axis, name)
    runs = runs_of_pairs(row, col, shape, _most_runs((*shape, kv_axis.count)))
    if runs is not None:
        return _by_runs(*runs, q_axis, kv_axis, name)
    return _by_table(table_of(row, col, shape, kv_axis), q_axis, kv_axis, name)


def table_of(row: Tensor, col: Tensor, shape: tuple[int, int, int], kv_axis: Blocks) -> Tensor:
    """bool [B, H, Q, K], True at the pairs."""
    check_size((*shape, kv_axis.count))
    table = torch.zeros(shape[0] * shape[1] * shape[2], kv_axis.count, dtype=torch.bool, device=row.device)
    table[row, col] = True
    return table.view(*shape, -1)


def _by_runs(starts: Tensor, ends: Tensor, q_axis: Blocks, kv_axis: Blocks, name: str) -> MaskMod:
    row_of = None if isinstance(q_axis.size, int) and q_axis.size == 1 else q_axis.of
    lengths = lengths_of(q_axis, kv_axis)
    return by_rows(kv_axis.start(starts), kv_axis.start(ends), kv_axis.length, name, lengths, row_of)


def _by_table(table: Tensor, q_axis: Blocks, kv_axis: Blocks, name: str) -> MaskMod:
    check_size(tuple(table.shape))
    seen = element_of(table)
    return MaskMod(lambda b, h, q, k: seen(b, h, q_axis.of(q), kv_axis.of(k)), name, lengths_of(q_axis, kv_axis))


def _varies(table: Tensor) -> bool:
    """Between batches or heads."""
    return not torch.equal(table, table[:1, :1].expand_as(table))


def lengths_of(q_axis: Blocks, kv_axis: Blocks) -> Collection[tuple[int, int]]:
    return {(q_axis.length, kv_axis.length)}


def _most_runs(shape: tuple[int, ...]) -> int:
    return MAX_RUNS if torch.Size(shape).numel() <= MAX_TABLE else MAX_INTERVALS


def check_size(shape: tuple[int, ...], why: str = f"whose rows have more than {MAX_INTERVALS} runs of blocks") -> None:
    if torch.Size(shape).numel() > MAX_TABLE:
        raise NotImplementedError(
            f"a table of {' x '.join(map(str, shape))} blocks, more than {MAX_TABLE:,}, {why} is not supported; use "
            "larger blocks, or write the mask as a mask_mod"
        )


def range_of(numbers: Tensor) -> str:
    return f"{int(numbers.min())} .. {int(numbers.max())}"


def _kind(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
