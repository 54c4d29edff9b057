"""FlashMask's masks: of each key, which queries do not see it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cpflex.masks import MaskFn, MaskMod
from cpflex.masks_from.checked import by_head, integers, length
from cpflex.masks_from.rows import element_of


@torch.inference_mode(False)
def flashmask(
    startend_row_indices: Tensor,  # integers [B or 1, H or 1, kv_len, 1, 2 or 4]
    causal: bool,
    *,
    q_len: int | None = None,
    num_heads: int | None = None,
) -> MaskMod:
    """The mask of ``flashmask_attention(q, k, v, startend_row_indices, causal=...)`` (arXiv:2410.01359): key j is
    hidden from the queries of the row intervals in column j.

    | causal | last dim | hidden from queries |
    | --- | --- | --- |
    | yes | 1: start | start and after |
    | yes | 2: start, end | start to end - 1 |
    | no | 2: start, upper end | start and after; before upper end |
    | no | 4: start, end, upper start, upper end | start to end - 1; upper start to upper end - 1 |

    With ``causal`` also from the queries before the key; where lengths differ the last query is aligned with the last
    key, as in flash-attn.

    Args:
        q_len: queries; as many as keys if None.
        num_heads: query heads, if the indices have those of the keys.

    Raises:
        ValueError: another dtype, shape or number of columns, rows below 0 or beyond ``q_len``.
    """
    columns = integers(startend_row_indices, "startend_row_indices", "[B, H, kv_len, n]")
    forms = (1, 2) if causal else (2, 4)
    if columns.shape[3] not in forms or 0 in columns.shape:
        raise ValueError(
            f"startend_row_indices must be [B, H, kv_len, {forms[0]} or {forms[1]}] with causal={bool(causal)}; got "
            f"shape {tuple(columns.shape)}"
        )
    kv_len = columns.shape[2]
    q_len = length(kv_len if q_len is None else q_len, "q_len")
    if (columns < 0).any() or (columns > q_len).any():
        raise ValueError(f"rows must be from 0 to q_len={q_len}; got {int(columns.min())} .. {int(columns.max())}")
    columns = by_head(columns.int(), num_heads, "startend_row_indices")
    rules = [rule for start, end in _hidden(columns, q_len, causal) if (rule := _outside(start, end, q_len))]
    if causal:
        rules.append(_causal(kv_len - q_len))
    rules = rules or [lambda b, h, q, k: (q >= 0) & (k >= 0)]

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = rules[0](b, h, q, k)
        for rule in rules[1:]:
            seen = seen & rule(b, h, q, k)
        return seen

    return MaskMod(mask_mod, "flashmask", {(q_len, kv_len)})


def _hidden(columns: Tensor, q_len: int, causal: bool) -> list[tuple[Tensor, Tensor]]:
    """Rows that the columns hide: start, end [B, H, kv_len] of each interval."""
    column = columns.unbind(3)
    if len(column) == 4:
        return [(column[0], column[1]), (column[2], column[3])]
    first, last = torch.zeros_like(column[0]), torch.full_like(column[0], q_len)
    if not causal:
        return [(column[0], last), (first, column[1])]
    return [(column[0], last if len(column) == 1 else column[1])]


def _outside(start: Tensor, end: Tensor, q_len: int) -> MaskFn | None:
    """Queries that are not in the hidden rows of the key, [B, H, kv_len] each; None if there are none."""
    empty = start >= end
    if empty.all():
        return None
    # (q_len, 0) where empty: no bound of a range of keys is moved by it
    start, end = start.masked_fill(empty, q_len), end.masked_fill(empty, 0)
    if ((end == q_len) | empty).all():
        below = element_of(start)
        return lambda b, h, q, k: q < below(b, h, k)
    if ((start == 0) | empty).all():
        above = element_of(end)
        return lambda b, h, q, k: q >= above(b, h, k)
    low, high = element_of(start), element_of(end)
    return lambda b, h, q, k: (q < low(b, h, k)) | (q >= high(b, h, k))


def _causal(shift: int) -> Callable[..., Tensor]:
    if shift == 0:
        return lambda b, h, q, k: k <= q
    keys_before = torch.tensor(shift)
    return lambda b, h, q, k: k <= q + keys_before.to(q.device)
