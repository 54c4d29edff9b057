"""torch's BlockMask: a mask_mod, and a table of the blocks in which it is asked."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from cpflex.masks import MaskMod
from cpflex.masks_from.checked import integers
from cpflex.masks_from.tables import Blocks, axis_of, of_pairs
from cpflex.mods.graph import Mod
from cpflex.mods.intervals import EMPTY, FULL, TileClassifier
from cpflex.mods.trace import trace_mask_mod

# B batch, H heads of the table (1 of either: the same for all), Q and K blocks


class _Listed(NamedTuple):
    """Blocks that a table lists: pairs, rising; a row counts through [B, H, Q]."""

    row: Tensor
    col: Tensor


def as_mask(mask: Any) -> Any:
    """A BlockMask as a mask_mod; anything else as it is."""
    return block_mask(mask) if isinstance(mask, BlockMask) else mask


@torch.inference_mode(False)
def block_mask(mask: BlockMask) -> MaskMod:
    """The mask of a torch BlockMask: its ``mask_mod`` in the blocks that it lists as partial, everything in those that
    it lists as full, nothing in others.

    So a table that hides more than the mask_mod is honoured, as by torch's kernels (its eager path looks at the
    mask_mod alone). Where the intervals of the mask_mod prove that the table says the same, as it does after
    ``create_block_mask``, it is left out. Blocks are counted from the first query and the first key; lengths are those
    of the BlockMask.

    Raises:
        ValueError: a table that does not fit the lengths, lists a block that does not exist, or one twice.
        UnsupportedMod: the mask_mod is not a pointwise bool function.
        RuntimeError: a BlockMask that was sliced has lost its mask_mod; give it back first, as torch says.
    """
    shape, q_axis, kv_axis = _axes(mask)
    partial = _listed(mask.kv_num_blocks, mask.kv_indices, shape, kv_axis, "kv_indices")
    full = _Listed(partial.row[:0], partial.col[:0])
    if mask.full_kv_num_blocks is not None:
        full = _listed(mask.full_kv_num_blocks, mask.full_kv_indices, shape, kv_axis, "full_kv_indices")
    keys = torch.cat([listed.row * kv_axis.count + listed.col for listed in (partial, full)]).sort().values
    if (keys.diff() == 0).any():
        raise ValueError("the BlockMask lists a block twice, which torch's kernels would count twice; list it once")
    both = _Listed(keys // kv_axis.count, keys % kv_axis.count)

    mask_mod, lengths = mask.mask_mod, {(q_axis.length, kv_axis.length)}
    name = f"BlockMask of {getattr(mask_mod, '__name__', type(mask_mod).__name__)}"
    if isinstance(mask_mod, MaskMod):
        mask_mod, lengths = mask_mod.fn, lengths | mask_mod.lengths
    mod = trace_mask_mod(mask_mod)

    def of(listed: _Listed) -> MaskMod:
        return of_pairs(*listed, shape, q_axis, kv_axis, "its table")

    output = mod.graph.nodes[mod.graph.outputs[0].index]
    if output.op == "const" and output.args[0] is True:
        return MaskMod(of(both).fn, name, lengths)
    proofs = _Proofs(mod, shape, q_axis, kv_axis)
    full_is_full = proofs.all_are(FULL, full)
    if full_is_full and proofs.all_are(EMPTY, _others(both, shape, kv_axis.count)):
        return MaskMod(mask_mod, name, lengths)
    if full_is_full:
        return MaskMod((of(both) & mask_mod).fn, name, lengths)
    return MaskMod((of(full) | (of(partial) & mask_mod)).fn, name, lengths)


def _axes(mask: BlockMask) -> tuple[tuple[int, int, int], Blocks, Blocks]:
    """[B, H, Q] of the table, and the two axes."""
    *batch, num_rows, _ = mask.kv_indices.shape
    if len(batch) not in (0, 2):
        raise ValueError(f"a BlockMask must be [B, H, Q, K] or [Q, K] blocks; got {tuple(mask.kv_indices.shape)}")
    q_len, kv_len = mask.seq_lengths
    q_size, kv_size = mask.BLOCK_SIZE
    q_axis = axis_of(q_size, q_len, num_rows, "q")
    kv_axis = axis_of(kv_size, kv_len, -(-kv_len // kv_size), "kv")
    b, h = batch or (1, 1)
    return (b, h, num_rows), q_axis, kv_axis


def _listed(count: Tensor, indices: Tensor | None, shape: tuple[int, int, int], kv_axis: Blocks, name: str) -> _Listed:
    assert indices is not None, "torch makes both or neither"
    rows = shape[0] * shape[1] * shape[2]
    count = integers(count.reshape(-1), name, "[rows]").long()
    indices = integers(indices.reshape(rows, -1), name, "[rows, n]")
    if len(count) != rows or (count < 0).any() or (count > indices.shape[1]).any():
        raise ValueError(
            f"{name} must list as many blocks in each row as its num_blocks says, {indices.shape[1]} at most"
        )
    row = torch.repeat_interleave(torch.arange(rows, device=count.device), count)
    nth = torch.arange(len(row), device=count.device) - (count.cumsum(0) - count)[row]
    col = indices[row, nth].long()
    if len(col) and (col.min() < 0 or col.max() >= kv_axis.count):
        raise ValueError(
            f"{name} must be from 0 to {kv_axis.count - 1}, the blocks of {kv_axis.length} keys; got "
            f"{int(col.min())} .. {int(col.max())}"
        )
    keys = (row * kv_axis.count + col).sort().values
    return _Listed(keys // kv_axis.count, keys % kv_axis.count)


def _others(listed: _Listed, shape: tuple[int, int, int], num_cols: int) -> tuple[Tensor, Tensor, Tensor]:
    """Runs of blocks that are not listed: (row, first, end)."""
    rows = shape[0] * shape[1] * shape[2]
    device = listed.row.device
    edge = torch.arange(rows, device=device)
    row = torch.cat([edge, listed.row, edge])
    col = torch.cat([torch.full_like(edge, -1), listed.col, torch.full_like(edge, num_cols)])
    order = (row * (num_cols + 2) + col + 1).argsort()
    row, col = row[order], col[order]
    gap = (row[1:] == row[:-1]) & (col[1:] > col[:-1] + 1)
    return row[1:][gap], col[:-1][gap] + 1, col[1:][gap]


class _Proofs:
    """What the intervals of a mask_mod prove about blocks."""

    def __init__(self, mod: Mod, shape: tuple[int, int, int], q_axis: Blocks, kv_axis: Blocks) -> None:
        self._mod, self._shape, self._axes = mod, shape, (q_axis, kv_axis)
        # a table for all batches (or heads) says nothing about how many there are
        self._impossible = any(mod.uses(name) and size == 1 for name, size in zip("bh", shape, strict=False))

    def all_are(self, verdict: int, listed: _Listed | tuple[Tensor, Tensor, Tensor]) -> bool:
        row, first, *end = listed
        if not len(row):
            return True
        if self._impossible:
            return False
        boxes = np.stack([x.cpu().numpy() for x in (row, first, end[0] if end else first + 1)])
        if not (self._mod.uses("b") or self._mod.uses("h")):
            boxes[0] %= self._shape[2]
            return self._holds(verdict, np.unique(boxes, axis=1), 0)
        heads = boxes[0] // self._shape[2]
        return all(self._holds(verdict, boxes[:, heads == head], int(head)) for head in np.unique(heads))

    def _holds(self, verdict: int, boxes: np.ndarray, head: int) -> bool:
        b, h = divmod(head, self._shape[1])
        row, first, end = boxes
        q, k = self._axes
        assert isinstance(q.size, int), "a BlockMask has blocks of one size"
        assert isinstance(k.size, int), "a BlockMask has blocks of one size"
        row = row % self._shape[2]
        q_lo, q_hi = row * q.size, np.minimum((row + 1) * q.size, q.length) - 1
        kv_lo, kv_hi = first * k.size, np.minimum(end * k.size, k.length) - 1
        return bool((TileClassifier(self._mod)(q_lo, q_hi, kv_lo, kv_hi, b=(b, b), h=(h, h)) == verdict).all())
