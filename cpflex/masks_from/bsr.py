"""Block-sparse rows: which blocks of keys a row of blocks sees, and which pairs inside of them."""

from __future__ import annotations

import functools
import operator

import numpy as np
import torch
from torch import Tensor

from cpflex.masks import MaskMod
from cpflex.masks_from.checked import by_head, integers
from cpflex.masks_from.rows import element_of, slots
from cpflex.masks_from.tables import (
    MAX_RUNS,
    Blocks,
    axis_of,
    axis_of_one_size,
    check_size,
    lengths_of,
    of_pairs,
    of_table,
    pair_of,
    range_of,
    table_of,
)


@torch.inference_mode(False)
def bsr(
    indptr: Tensor,  # integers [Q + 1], or [B, H, Q + 1] with rows of all batches and heads one after another
    indices: Tensor,  # integers [N]: blocks of keys
    block_size: int | tuple[int, int],
    *,
    q_len: int | None = None,
    kv_len: int,
    mask: Tensor | None = None,  # bool [N, R, C], or packed, uint8 [bytes]
    num_heads: int | None = None,
) -> MaskMod:
    """Block-sparse rows, as FlashInfer's ``BlockSparseAttentionWrapper`` and SciPy's ``bsr_matrix`` have them: block
    row i sees the blocks ``indices[indptr[i] : indptr[i + 1]]``: whole, or what ``mask`` says of each.

    ``q_len`` and ``kv_len`` are FlashInfer's M and N, ``block_size`` its (R, C).

    Args:
        mask: inside of the blocks, in the order of ``indices``; or FlashInfer's ``packed_mask`` of it, little-endian:
            the rows of a row of blocks one after another, each row of blocks from a byte on.

    Raises:
        ValueError: another dtype or shape, ``indptr`` that falls or does not end with ``indices``, a block that does
            not exist or stands twice in a row; a packed mask whose last row of blocks is shorter than the others.
        NotImplementedError: an irregular table, or one with a mask, of more than 2**26 blocks.
    """
    indptr = torch.as_tensor(indptr)
    indptr = integers(indptr.view(1, 1, -1) if indptr.ndim == 1 else indptr, "indptr", "[B, H, Q + 1]").long()
    indices = integers(indices, "indices", "[N]").long()
    q_size, kv_size = pair_of(block_size)
    q_axis = axis_of(q_size, q_len, indptr.shape[2] - 1, "q")
    kv_axis = axis_of_one_size(kv_size, kv_len, "kv")
    row, col, order = _pairs(indptr, indices, kv_axis)
    shape = indptr.shape[0], indptr.shape[1], indptr.shape[2] - 1
    if mask is None:
        return _whole(row, col, shape, q_axis, kv_axis, num_heads)
    inside = _inside(mask, indptr.diff(dim=2).reshape(-1), q_axis, kv_axis)[order.to(mask.device)].to(row.device)
    is_whole = inside.flatten(1).all(dim=1)
    is_part = inside.flatten(1).any(dim=1) & ~is_whole
    whole = _whole(row[is_whole], col[is_whole], shape, q_axis, kv_axis, num_heads)
    if not is_part.any():
        return whole
    return whole | _parts(inside[is_part], row[is_part], col[is_part], shape, q_axis, kv_axis, num_heads)


def _whole(
    row: Tensor, col: Tensor, shape: tuple[int, int, int], q_axis: Blocks, kv_axis: Blocks, num_heads: int | None
) -> MaskMod:
    if num_heads is not None and num_heads != shape[1]:
        table = by_head(table_of(row, col, shape, kv_axis), num_heads, "indptr")
        return of_table(table, q_axis, kv_axis, "bsr")
    return of_pairs(row, col, shape, q_axis, kv_axis, "bsr")


def _pairs(indptr: Tensor, indices: Tensor, kv_axis: Blocks) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of blocks, counted through all heads, and blocks of keys, rising; and where each stands in ``indices``."""
    count = indptr.diff(dim=2)
    ends = indptr[..., -1].reshape(-1)
    if indptr[0, 0, 0] != 0 or (count < 0).any() or (indptr[..., 0].reshape(-1)[1:] != ends[:-1]).any():
        raise ValueError("indptr must start at 0, never fall, and go on from one head to the next")
    if ends[-1] != len(indices):
        raise ValueError(f"indptr ends at {int(ends[-1])}; there are {len(indices)} indices")
    if len(indices) and (indices.min() < 0 or indices.max() >= kv_axis.count):
        raise ValueError(f"indices must be from 0 to {kv_axis.count - 1}; got {range_of(indices)}")
    per_row = count.reshape(-1)
    row = torch.repeat_interleave(torch.arange(len(per_row), device=per_row.device), per_row)
    pairs, order = (row * kv_axis.count + indices).sort()
    if (pairs.diff() == 0).any():
        raise ValueError("a block stands twice in a row of indices; it would be counted twice")
    return pairs // kv_axis.count, pairs % kv_axis.count, order


def _parts(
    inside: Tensor,  # bool [N, R, C]
    row: Tensor,
    col: Tensor,
    shape: tuple[int, int, int],
    q_axis: Blocks,
    kv_axis: Blocks,
    num_heads: int | None,
) -> MaskMod:
    """Blocks of which a part is seen. A row of few lists them; else a table says of every block which part it has."""
    parts, part_of = _once(inside)
    rows, cols = inside.shape[1:]
    count = torch.bincount(row, minlength=shape[0] * shape[1] * shape[2]).view(shape)
    if int(count.max()) > MAX_RUNS:
        check_size((*shape, kv_axis.count), "with masks inside of them,")
        table = torch.zeros(count.numel(), kv_axis.count, dtype=torch.int32, device=row.device)
        table[row, col] = part_of
        part = element_of(by_head(table.view(*shape, -1), num_heads, "indptr"))

        def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return parts[part(b, h, q // rows, k // cols), q % rows, k % cols]
    else:
        listed = slots(col.int() + 1, part_of, count)
        cells = [
            [element_of(by_head(x, num_heads, "indptr")) for x in pair]
            for pair in zip((listed[0] - 1).unbind(2), listed[1].unbind(2), strict=True)
        ]

        def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            shown = [
                (k // cols == at(b, h, q // rows)) & parts[part(b, h, q // rows), q % rows, k % cols]
                for at, part in cells
            ]
            return functools.reduce(operator.or_, shown)

    return MaskMod(seen, "parts of blocks", lengths_of(q_axis, kv_axis))


def _once(inside: Tensor) -> tuple[Tensor, Tensor]:
    """The parts that differ, the first of them nothing, bool [1 + n, R, C]; and which each block has, int32 [N]."""
    numbers: dict[bytes, int] = {}
    packed = np.packbits(inside.flatten(1).cpu().numpy(), axis=1)
    part_of = [numbers.setdefault(bits.tobytes(), 1 + len(numbers)) for bits in packed]
    block = torch.zeros(len(numbers), dtype=torch.int64)
    block[torch.tensor(part_of) - 1] = torch.arange(len(part_of))  # any one that has it
    parts = torch.cat([torch.zeros_like(inside[:1]), inside[block.to(inside.device)]])
    return parts, torch.tensor(part_of, dtype=torch.int32, device=inside.device)


def _inside(mask: Tensor, per_row: Tensor, q_axis: Blocks, kv_axis: Blocks) -> Tensor:
    """bool [N, R, C], in the order of the indices."""
    rows, cols, total = q_axis.size, kv_axis.size, int(per_row.sum())
    assert isinstance(rows, int), "blocks of one size"
    assert isinstance(cols, int), "blocks of one size"
    if mask.dtype == torch.uint8 and mask.ndim == 1:
        if q_axis.length % rows:
            raise ValueError(
                f"a packed mask needs whole rows of blocks; q_len={q_axis.length} has none of {rows} at its end"
            )
        return _unpacked(mask.detach(), per_row, rows, cols)
    if mask.dtype != torch.bool or mask.shape != (total, rows, cols):
        raise ValueError(
            f"mask must be bool {(total, rows, cols)}, one for each of the indices, or packed in uint8 [bytes]; got "
            f"{mask.dtype} {tuple(mask.shape)}"
        )
    return mask.detach()


def _unpacked(packed: Tensor, per_row: Tensor, rows: int, cols: int) -> Tensor:
    """From the bits of every row of blocks: its ``rows`` rows one after another, each through all of its blocks."""
    num_bytes = (per_row * rows * cols + 7) // 8
    if len(packed) != int(num_bytes.sum()):
        raise ValueError(f"a packed mask of these blocks has {int(num_bytes.sum())} bytes; got {len(packed)}")
    ends, read = num_bytes.cumsum(0).tolist(), []
    for begin, end, count in zip([0, *ends], ends, per_row.tolist(), strict=False):
        bits = np.unpackbits(packed[begin:end].cpu().numpy(), count=rows * count * cols, bitorder="little")
        read.append(bits.reshape(rows, count, cols).swapaxes(0, 1))
    return torch.from_numpy(np.concatenate(read)).bool().to(packed.device)
