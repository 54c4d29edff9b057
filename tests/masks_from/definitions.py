"""The mask formats of other libraries, written out densely from their definitions; and masks turned into each format."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor

# -- what a format means: bool [B, H, Q, K] or [Q, K]


def dense_varlen(
    cu_q: Sequence[int],
    cu_k: Sequence[int],
    causal: bool,
    window: tuple[int, int],
    used: Sequence[int] | None = None,
) -> Tensor:
    """flash-attn: query i of a sequence sees the keys from i + Sk - Sq - left to i + Sk - Sq + right, its own sequence's;
    causal is a right of 0, and -1 no bound. Where only some keys are used, Sk is their number.
    """
    used = [k1 - k0 for k0, k1 in itertools.pairwise(cu_k)] if used is None else used
    seen = torch.zeros(cu_q[-1], cu_k[-1], dtype=torch.bool)
    for q0, q1, k0, keys in zip(cu_q, cu_q[1:], cu_k, used, strict=False):
        shift = keys - (q1 - q0)
        for i in range(q1 - q0):
            for j in range(keys):
                after = 0 if causal else window[1]
                above = window[0] < 0 or j >= i + shift - window[0]
                below = after < 0 or j <= i + shift + after
                seen[q0 + i, k0 + j] = above and below
    return seen


def dense_flashmask(columns: Tensor, causal: bool, q_len: int) -> Tensor:
    """arXiv:2410.01359, section 4.1: rows of each column that are hidden; causal is aligned at the last row and column."""
    batch, heads, kv_len, forms = columns.shape
    seen = torch.ones(batch, heads, q_len, kv_len, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            for j in range(kv_len):
                rows, column = columns[b, h, j].tolist(), seen[b, h, :, j]
                if forms == 4:
                    column[rows[0] : rows[1]] = False
                    column[rows[2] : rows[3]] = False
                elif not causal:
                    column[rows[0] :] = False
                    column[: rows[1]] = False
                else:
                    column[rows[0] : rows[1] if forms == 2 else q_len] = False
                if causal:
                    column[: max(0, j - (kv_len - q_len))] = False
    return seen


def dense_ranges(
    q_ranges: Sequence[Sequence[int]], k_ranges: Sequence[Sequence[int]], types: Sequence[int], q_len: int, kv_len: int
) -> Tensor:
    """MagiAttention: causal slices are lower triangles of the last query and key, inverse causal ones upper triangles of
    the first; bi-causal is both.
    """
    seen = torch.zeros(q_len, kv_len, dtype=torch.bool)
    for (q0, q1), (k0, k1), kind in zip(q_ranges, k_ranges, types, strict=True):
        part = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool)
        if kind in (1, 3):
            part = part.tril((k1 - k0) - (q1 - q0))
        if kind in (2, 3):
            part = part.triu()
        seen[q0:q1, k0:k1] |= part
    return seen


def dense_intervals(mask_func: Tensor, q_len: Sequence[int], kv_len: Sequence[int]) -> Tensor:
    """cuDNN: [0, F0) and [F1, F2) and so on of the keys of the query's own sequence. bool [H, total_q, total_k]."""
    heads, ends, total = mask_func.shape
    seen = torch.zeros(heads, total, sum(kv_len), dtype=torch.bool)
    for h in range(heads):
        row = first = 0
        for queries, keys in zip(q_len, kv_len, strict=True):
            for i in range(row, row + queries):
                bounds = [0, *mask_func[h, :, i].tolist()]
                for j in range(0, ends + 1, 2):
                    seen[h, i, first + bounds[j] : first + bounds[j + 1]] = True
            row, first = row + queries, first + keys
    return seen


def dense_blocks(table: Tensor, q_sizes: Sequence[int], kv_sizes: Sequence[int]) -> Tensor:
    """Every block of the table blown up to the sizes of its row and column."""
    return table.repeat_interleave(torch.tensor(q_sizes), dim=-2).repeat_interleave(torch.tensor(kv_sizes), dim=-1)


def dense_bsr(indptr: Sequence[int], indices: Sequence[int], mask: Tensor, q_len: int, kv_len: int) -> Tensor:
    """FlashInfer: block n of the indices, in row i of blocks, shows what ``mask[n]`` says, bool [N, R, C]."""
    rows, cols = mask.shape[1:]
    seen = torch.zeros((len(indptr) - 1) * rows, -(-kv_len // cols) * cols, dtype=torch.bool)
    for i in range(len(indptr) - 1):
        for n in range(indptr[i], indptr[i + 1]):
            seen[i * rows : (i + 1) * rows, indices[n] * cols : (indices[n] + 1) * cols] = mask[n]
    return seen[:q_len, :kv_len]


def packed_as_flashinfer(mask: Tensor, indptr: Sequence[int]) -> Tensor:
    """Of each row of blocks the bits of its rows, one row through all its blocks; eight a byte, the first the lowest."""
    packed = []
    for first, last in itertools.pairwise(indptr):
        bits = mask[first:last].transpose(0, 1).flatten().tolist()
        bits += [False] * (-len(bits) % 8)
        packed += [sum(bit << i for i, bit in enumerate(bits[at : at + 8])) for at in range(0, len(bits), 8)]
    return torch.tensor(packed, dtype=torch.uint8)


# -- a mask in a format: bool [B, H, Q, K] -> what the reader takes


def runs(row: Sequence[bool]) -> list[tuple[int, int]]:
    edges = [i for i in range(len(row) + 1) if (i > 0 and row[i - 1]) != (i < len(row) and row[i])]
    return list(zip(edges[::2], edges[1::2], strict=True))


def as_intervals(seen: Tensor) -> Tensor:
    """[H, Q, K] -> mask_func [H, n, Q]."""
    rows = [[runs(row) for row in head] for head in seen.tolist()]
    most = max(len(row) for head in rows for row in head)
    last = seen.shape[2]

    def ends_of(row: list[tuple[int, int]]) -> list[int]:
        bounds = [x for run in row for x in run]
        bounds = bounds[1:] if bounds and bounds[0] == 0 else [0, *bounds]
        return bounds + [bounds[-1] if bounds else last] * (2 * most + 1 - len(bounds))

    return torch.tensor([[ends_of(row) for row in head] for head in rows]).transpose(1, 2).int()


def as_columns(seen: Tensor) -> Tensor | None:
    """[B, H, Q, K] -> startend_row_indices of four columns, if two hidden intervals a key are enough."""
    hidden = [[[runs(col) for col in head] for head in batch] for batch in (~seen).transpose(2, 3).tolist()]
    if max(len(col) for batch in hidden for head in batch for col in head) > 2:
        return None
    padded = [
        [[[x for run in [*col, (3, 3), (5, 2)][:2] for x in run] for col in head] for head in batch] for batch in hidden
    ]
    return torch.tensor(padded).clamp(max=seen.shape[2]).int()


def as_ranges(seen: Tensor, rng: Random) -> tuple[list[tuple[int, int]], list[tuple[int, int]], list[int]]:
    """[Q, K] -> slices in any order; rows that are alike become one."""
    rows = [runs(row) for row in seen.tolist()]
    slices: list[Any] = []
    begin = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] != rows[begin] or rng.random() < 0.2:
            slices += [
                ((begin, i), run, rng.choice([0, 1, 2, 3]) if run[1] - run[0] == i - begin == 1 else 0)
                for run in rows[begin]
            ]
            begin = i
    rng.shuffle(slices)
    return [s[0] for s in slices], [s[1] for s in slices], [s[2] for s in slices]


def as_bsr(table: Tensor) -> tuple[Tensor, Tensor]:
    """bool [B, H, Q, K] of blocks -> indptr [B, H, Q + 1], indices [N]."""
    ends = table.flatten().view(-1, table.shape[3]).sum(1).cumsum(0).view(table.shape[:3])
    first = torch.cat([torch.zeros(1, dtype=torch.int64), ends[..., -1].flatten()[:-1]]).view(*table.shape[:2], 1)
    return torch.cat([first, ends], dim=2).int(), table.nonzero()[:, 3].int()


def as_selected(table: Tensor, rng: Random) -> Tensor:
    """bool [B, H, Q, K] of blocks -> indices [B, H, Q, n], in any order, -1 where there are fewer."""
    most = max(1, int(table.sum(-1).max()))

    def listed(row: list[bool]) -> list[int]:
        chosen = [i for i, x in enumerate(row) if x]
        chosen += [-1] * (most - len(chosen))
        rng.shuffle(chosen)
        return chosen

    return torch.tensor([[[listed(row) for row in head] for head in batch] for batch in table.tolist()])
