"""MagiAttention's masks: rectangles of queries and keys, each full or cut along a diagonal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpflex.masks import MaskMod
from cpflex.masks_from.checked import length
from cpflex.masks_from.rows import MAX_INTERVALS, by_rows
from cpflex.masks_from.tables import Blocks, of_table

TYPES = ("full", "causal", "inv_causal", "bi_causal")
"""By MagiAttention's numbers, 0 to 3."""

Ranges = Tensor | Sequence[Any]


@torch.inference_mode(False)
def ranges(
    q_ranges: Ranges,  # integers [N, 2], ends exclusive
    k_ranges: Ranges,
    types: Ranges | str | int = "full",
    *,
    q_len: int,
    kv_len: int | None = None,
) -> MaskMod:
    """The mask of MagiAttention's ``magi_attn_flex_key(q_ranges, k_ranges, attn_mask_type, ...)`` and
    ``flex_flash_attn_func(q, k, v, q_ranges, k_ranges, attn_type_map)``: together, the slices ``q_ranges[i]`` x
    ``k_ranges[i]``, of 3 queries and 5 keys

        full (0)   causal (1)   inv_causal (2)   bi_causal (3)
        11111      111..        11111            111..
        11111      1111.        .1111            .111.
        11111      11111        ..111            ..111

    Causal slices are aligned at their last query and key, inverse causal ones at their first; bi-causal is both. A
    causal slice of more queries than keys leaves its first queries without any, an inverse causal one its last.

    Args:
        q_ranges, k_ranges: a tensor, pairs, or what has ``start`` and ``end``, as ``AttnRanges`` yields.
        types: one of all slices, or one each: a number, a name, or a member of ``AttnMaskType``.
        kv_len: tokens of the keys; ``q_len`` if None.

    Raises:
        ValueError: ranges that are no ranges or leave the sequence, types that do not exist; slices that overlap: a
            pair of query and key that two slices see would be counted twice.
        NotImplementedError: more than 16 intervals of keys per query, unless all slices are full.
    """
    q_len = length(q_len, "q_len")
    kv_len = q_len if kv_len is None else length(kv_len, "kv_len")
    q = _pairs(q_ranges, "q_ranges", q_len)
    k = _pairs(k_ranges, "k_ranges", kv_len)
    kinds = _kinds(types, len(q))
    if len(k) != len(q):
        raise ValueError(f"q_ranges and k_ranges must be equally many; got {len(q)} and {len(k)}")
    some = (q[:, 1] > q[:, 0]) & (k[:, 1] > k[:, 0])
    q, k, kinds = q[some], k[some], kinds[some]
    if _deepest(q, q_len) > MAX_INTERVALS:
        if kinds.any():
            raise NotImplementedError(
                f"{_deepest(q, q_len)} ranges of keys for one query, of which some are not full; {MAX_INTERVALS} are "
                "supported - write the mask as a mask_mod, or its full ranges as masks_from.blocks"
            )
        return _of_full(q, k, q_len, kv_len)
    return _of_rows(q, k, kinds, q_len, kv_len)


def _pairs(given: Ranges, name: str, seq_len: int) -> np.ndarray:
    """int64 [N, 2]."""
    if not isinstance(given, Tensor | np.ndarray):
        given = [(x.start, x.end) if hasattr(x, "end") else tuple(x) for x in given]
    pairs = np.asarray(torch.as_tensor(given).cpu()).reshape(-1, 2) if len(given) else np.zeros((0, 2), np.int64)
    if not np.issubdtype(pairs.dtype, np.integer):
        raise ValueError(f"{name} must be integers [N, 2]; got {pairs.dtype}")
    bad = (pairs[:, 0] < 0) | (pairs[:, 1] < pairs[:, 0]) | (pairs[:, 1] > seq_len)
    if bad.any():
        raise ValueError(f"{name} must be from start to end within 0 .. {seq_len}; got {pairs[bad][0].tolist()}")
    return pairs.astype(np.int64)


def _kinds(types: Any, count: int) -> np.ndarray:
    """Numbers of the types, int64 [N]."""
    several = (
        isinstance(types, Iterable)
        and not isinstance(types, str)
        and not (isinstance(types, Tensor) and types.ndim == 0)
    )
    given = (types.tolist() if isinstance(types, Tensor) else list(types)) if several else [types] * count
    if len(given) != count:
        raise ValueError(f"types must be one for all slices, or one each: {count}; got {len(given)}")
    numbers = []
    for kind in given:
        value = kind.item() if isinstance(kind, Tensor | np.generic) else getattr(kind, "value", kind)
        name = value.lower() if isinstance(value, str) else value
        if name not in (*TYPES, *range(len(TYPES))) or isinstance(name, bool):
            raise ValueError(f"a type must be one of {TYPES}, or its number; got {kind!r}")
        numbers.append(TYPES.index(name) if isinstance(name, str) else name)
    return np.asarray(numbers, np.int64)


def _deepest(q: np.ndarray, q_len: int) -> int:
    """Ranges at the query that is in most."""
    depth = np.zeros(q_len + 1, np.int64)
    np.add.at(depth, q[:, 0], 1)
    np.add.at(depth, q[:, 1], -1)
    return int(depth.cumsum().max())


def _of_rows(q: np.ndarray, k: np.ndarray, kinds: np.ndarray, q_len: int, kv_len: int) -> MaskMod:
    """Each slice gives each of its queries one interval of keys."""
    counts = q[:, 1] - q[:, 0]
    piece = np.repeat(np.arange(len(q)), counts)
    row = np.arange(len(piece)) - np.repeat(np.cumsum(counts) - counts - q[:, 0], counts)
    start, end = k[piece, 0], k[piece, 1]
    is_causal, is_inverse = (kinds == 1) | (kinds == 3), (kinds == 2) | (kinds == 3)
    if is_causal.any():
        end = np.where(is_causal[piece], np.minimum(end, row + 1 + (k[:, 1] - q[:, 1])[piece]), end)
    if is_inverse.any():
        start = np.where(is_inverse[piece], np.maximum(start, row + (k[:, 0] - q[:, 0])[piece]), start)
    some = end > start
    if not some.all():
        row, start, end = row[some], start[some], end[some]
    slot = np.zeros_like(row)
    if len(row) > 1 and _deepest(q, q_len) > 1:
        order = np.lexsort((start, row))
        row, start, end = row[order], start[order], end[order]
        again = row[1:] == row[:-1]
        overlap = again & (start[1:] < end[:-1])
        if overlap.any():
            at = int(np.flatnonzero(overlap)[0])
            raise ValueError(
                f"slices overlap: query {row[at]} sees key {start[at + 1]} in two of them, which would count it twice; "
                "make them disjoint"
            )
        first = np.flatnonzero(np.append(True, ~again))
        slot = np.arange(len(row)) - np.repeat(first, np.diff(np.append(first, len(row))))
    shape = 1, 1, int(slot.max(initial=0)) + 1, q_len
    starts, ends = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    starts[0, 0, slot, row], ends[0, 0, slot, row] = start, end
    return by_rows(torch.from_numpy(starts), torch.from_numpy(ends), kv_len, "ranges", {(q_len, kv_len)})


def _of_full(q: np.ndarray, k: np.ndarray, q_len: int, kv_len: int) -> MaskMod:
    """Full slices: a table of the cells between all their bounds."""
    q_edges, k_edges = (np.unique(np.append(x, [0, n])) for x, n in ((q, q_len), (k, kv_len)))
    count = np.zeros((len(q_edges), len(k_edges)), np.int64)
    (q0, q1), (k0, k1) = (np.searchsorted(edges, x).T for edges, x in ((q_edges, q), (k_edges, k)))
    for rows, cols, sign in ((q0, k0, 1), (q1, k1, 1), (q0, k1, -1), (q1, k0, -1)):
        np.add.at(count, (rows, cols), sign)
    count = count.cumsum(0).cumsum(1)[:-1, :-1]
    if (count > 1).any():
        row, col = np.argwhere(count > 1)[0]
        raise ValueError(
            f"slices overlap: query {q_edges[row]} sees key {k_edges[col]} in two of them, which would count it twice; "
            "make them disjoint"
        )
    q_axis, k_axis = (Blocks(int(edges[-1]), torch.from_numpy(np.diff(edges))) for edges in (q_edges, k_edges))
    return of_table(torch.from_numpy(count > 0)[None, None], q_axis, k_axis, "ranges")
