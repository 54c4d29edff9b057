"""flash-attn's masks of packed sequences, which torch's varlen_attn has too."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cpflex.masks import MaskMod, document, sliding_window
from cpflex.masks import causal as diagonal
from cpflex.masks_from.checked import cu_seqlens, integers


@torch.inference_mode(False)
def varlen(
    cu_seqlens_q: Tensor | Sequence[int],
    cu_seqlens_k: Tensor | Sequence[int] | None = None,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    seqused_k: Tensor | Sequence[int] | None = None,
    block_table: object = None,
) -> MaskMod:
    """The mask of ``flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, ...)`` and of torch's ``varlen_attn``.

    A query sees keys of its own sequence only; in it, query i sees keys from ``i + shift - left`` to ``i + shift +
    right``, where ``shift`` is the number of keys less the number of queries of that sequence: the last query is
    aligned with the last key, as flash-attn does since 2.1. 3 queries of 5 keys, causal, then 4 of 2:

        111....
        1111...
        11111..
        .......
        .......
        .....1.
        .....11

    Args:
        cu_seqlens_k: as ``cu_seqlens_q`` if None.
        causal: the same as 0 to the right.
        window_size: (left, right), the query's own place not counted; -1: no bound. torch's (-1, 0) is causal.
        seqused_k: of each sequence, how many of its keys count, integers [num_seqs]: the first ones. Those after them
            are seen by nobody, and the last query is aligned with the last key that counts.
        block_table: of paged keys; not supported.

    Raises:
        ValueError: cu_seqlens that do not start at 0 or fall, or are not of equally many sequences; a window below -1;
            more keys used than there are.
        NotImplementedError: a block_table.
    """
    if block_table is not None:
        raise NotImplementedError(
            "block_table: keys that lie in pages are not supported - pass them one after another, with cu_seqlens_k "
            "and, where their last page is not full, seqused_k"
        )
    q_bounds = cu_seqlens(cu_seqlens_q, "cu_seqlens_q")
    k_bounds = q_bounds if cu_seqlens_k is None else cu_seqlens(cu_seqlens_k, "cu_seqlens_k").to(q_bounds.device)
    if len(q_bounds) != len(k_bounds):
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must be of equally many sequences; got "
            f"{len(q_bounds) - 1} and {len(k_bounds) - 1}"
        )
    left, right = _window(window_size)
    right = 0 if causal else right
    if seqused_k is None and torch.equal(q_bounds, k_bounds):
        own = document(cu_seqlens=q_bounds)
        return own if max(left, right) < 0 else own & _band(left, right)
    lengths = {(int(q_bounds[-1]), int(k_bounds[-1]))}
    q_ids, k_ids, shift = _tables(q_bounds, k_bounds, seqused_k)
    mask = MaskMod(lambda b, h, q, k: q_ids[q] == k_ids[k], "varlen", lengths)
    if right >= 0:
        after = torch.tensor(right)
        mask = mask & MaskMod(lambda b, h, q, k: k - q <= shift[q] + after.to(q.device), f"to {right} after")
    if left >= 0:
        before = torch.tensor(left)
        mask = mask & MaskMod(lambda b, h, q, k: k - q >= shift[q] - before.to(q.device), f"from {left} before")
    return mask


def _tables(
    q_bounds: Tensor, k_bounds: Tensor, seqused_k: Tensor | Sequence[int] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers of the sequences, of queries and of keys; and of each query, by how much the key that it is aligned with
    lies after it. int32 [Q], [K], [Q].
    """
    lengths = k_bounds.diff()
    used = lengths if seqused_k is None else _used(seqused_k, lengths)
    numbers = torch.arange(len(lengths), dtype=torch.int32, device=q_bounds.device)
    shift = (k_bounds[:-1] + used - q_bounds[1:]).int()
    q_ids, shift = (torch.repeat_interleave(values, q_bounds.diff()) for values in (numbers, shift))
    k_ids = torch.repeat_interleave(numbers, lengths)
    if seqused_k is None:
        return q_ids, k_ids, shift
    # keys that do not count have numbers of their own, between the others: along the keys they still rise
    place = torch.arange(len(k_ids), device=k_ids.device) - k_bounds[k_ids.long()]
    return 2 * q_ids, 2 * k_ids + (place >= used[k_ids.long()]).int(), shift


def _used(seqused_k: Tensor | Sequence[int], lengths: Tensor) -> Tensor:
    """int64 [num_seqs]."""
    used = integers(seqused_k, "seqused_k", "[num_seqs]").long().to(lengths.device)
    if used.shape != lengths.shape:
        raise ValueError(f"seqused_k must be a number for each of {len(lengths)} sequences; got {len(used)}")
    wrong = ((used < 0) | (used > lengths)).nonzero()
    if len(wrong):
        one = int(wrong[0])
        raise ValueError(
            "seqused_k must be from 0 to the number of keys of each sequence; "
            f"got {used[one]} of {lengths[one]} for sequence {one}"
        )
    return used


def _window(window_size: object) -> tuple[int, int]:
    sides = tuple(window_size) if isinstance(window_size, tuple | list) else ()
    if len(sides) != 2 or not all(type(side) is int and side >= -1 for side in sides):
        raise ValueError(f"window_size must be (left, right), integers of at least -1; got {window_size!r}")
    return sides


def _band(left: int, right: int) -> MaskMod:
    """Around the diagonal of a square; -1: no bound, of one side at most."""
    if right < 0:
        return sliding_window(left + 1)
    if right == 0:
        return diagonal() if left < 0 else diagonal() & sliding_window(left + 1)
    if left >= 0:
        return sliding_window(left, right)
    after = torch.tensor(right)
    return MaskMod(lambda b, h, q, k: k <= q + after.to(q.device), f"to {right} after")
