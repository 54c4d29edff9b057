"""cuDNN's masks: of each query, where the keys that it sees begin and end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cpflex.masks import MaskMod
from cpflex.masks_from.checked import cu_seqlens, integers, length
from cpflex.masks_from.rows import MAX_INTERVALS, by_rows


@torch.inference_mode(False)
def intervals(
    mask_func: Tensor,  # integers [H or 1, n, total_q], n odd
    kv_len: int | None = None,
    *,
    batch_size: int = 1,
    cu_seqlens_q: Tensor | Sequence[int] | None = None,
    cu_seqlens_k: Tensor | Sequence[int] | None = None,
) -> MaskMod:
    """The interval masks of ``cudnn.flex_attention``: query i sees the keys [0, F0) and [F1, F2) and [F3, F4) and so on
    of its own sequence, F = ``mask_func[head, :, i]``.

    Endpoints count from the first key of the query's own sequence; lengths of queries and keys are independent, no
    alignment is implied. With ``cu_seqlens_q`` and ``cu_seqlens_k`` the mask is that of the packed sequence.

    Args:
        kv_len: keys of each sequence, without cu_seqlens; as many as queries if None.
        batch_size: sequences of equal length that total_q runs through, without cu_seqlens.

    Raises:
        ValueError: another dtype or shape, endpoints that fall or leave their sequence, lengths that do not fit.
        NotImplementedError: more than 16 intervals.
    """
    mask_func = integers(mask_func, "mask_func", "[H, n, total_q]").long()
    heads, num_ends, total_q = mask_func.shape
    if num_ends % 2 == 0 or 0 in mask_func.shape:
        raise ValueError(f"mask_func must be [H, n, total_q] with an odd n; got shape {tuple(mask_func.shape)}")
    if num_ends // 2 >= MAX_INTERVALS:
        raise NotImplementedError(f"{num_ends // 2 + 1} intervals of keys per query; {MAX_INTERVALS} are supported")
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        raise ValueError("cu_seqlens_q and cu_seqlens_k go together: pass both, or neither")
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        if batch_size != 1 or kv_len is not None:
            raise ValueError("with cu_seqlens, leave batch_size and kv_len out: the sequences are packed")
        first, limit = _of_packed(cu_seqlens_q, cu_seqlens_k, total_q)
        kv_len, batch_size = int(torch.as_tensor(cu_seqlens_k)[-1]), 1
    else:
        if total_q % length(batch_size, "batch_size"):
            raise ValueError(f"mask_func has {total_q} queries, which batch_size={batch_size} does not divide")
        kv_len = length(total_q // batch_size if kv_len is None else kv_len, "kv_len")
        first, limit = torch.zeros(()), torch.tensor(kv_len)
    first, limit = (x.long().to(mask_func.device) for x in (first, limit))
    if (mask_func < 0).any() or (mask_func.diff(dim=1) < 0).any() or (mask_func > limit).any():
        raise ValueError("the endpoints of a query must rise from 0 or more, and not exceed the keys of its sequence")
    starts = torch.cat([torch.zeros_like(mask_func[:, :1]), mask_func[:, 1::2]], dim=1) + first
    ends = mask_func[:, 0::2] + first
    shape = heads, num_ends // 2 + 1, batch_size, total_q // batch_size
    starts, ends = (x.view(shape).permute(2, 0, 1, 3) for x in (starts, ends))
    return by_rows(starts, ends, kv_len, "intervals", {(shape[3], kv_len)})


def _of_packed(cu_q: Tensor | Sequence[int], cu_k: Tensor | Sequence[int], total_q: int) -> tuple[Tensor, Tensor]:
    """Of each query: the first key of its sequence, and its number of keys."""
    q_bounds, k_bounds = cu_seqlens(cu_q, "cu_seqlens_q"), cu_seqlens(cu_k, "cu_seqlens_k")
    if len(q_bounds) != len(k_bounds) or q_bounds[-1] != total_q:
        raise ValueError(
            f"cu_seqlens_q and cu_seqlens_k must have one sequence each for another, of {total_q} queries in all; got "
            f"{len(q_bounds) - 1} and {len(k_bounds) - 1} sequences, and {int(q_bounds[-1])} queries"
        )
    lengths = q_bounds.diff()
    return tuple(torch.repeat_interleave(x.to(lengths.device), lengths) for x in (k_bounds[:-1], k_bounds.diff()))  # type: ignore[return-value]
