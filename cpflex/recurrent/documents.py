"""Documents of a recurrence: how far each token is from the start of its own."""

from __future__ import annotations

import torch
from torch import Tensor

# B batch (or 1, if all rows are alike), S tokens of the whole sequence


def ages(
    seq_len: int, doc_ids: Tensor | None, position_ids: Tensor | None, padding_mask: Tensor | None
) -> Tensor:  # int64 [B, S] on the CPU
    """Place of each token within its document, -1 for padding.

    Raises:
        ValueError: see `cpflex.recurrent.make_chain`.
    """
    if doc_ids is not None and position_ids is not None:
        raise ValueError("pass doc_ids or position_ids, not both")
    name, given = ("doc_ids", doc_ids) if position_ids is None else ("position_ids", position_ids)
    ids = torch.zeros(1, seq_len) if given is None else _rows(given, name, seq_len)
    real = torch.ones(1, seq_len) if padding_mask is None else _rows(padding_mask, "padding_mask", seq_len)
    if len(ids) != len(real) and 1 not in (len(ids), len(real)):
        raise ValueError(f"{name} has {len(ids)} rows and padding_mask {len(real)}; they must be of one batch")
    ids, real = torch.broadcast_tensors(ids, real != 0)
    starts = _jumps(ids) if position_ids is not None else _changes(ids, real)
    after_padding = torch.cat([torch.ones_like(real[:, :1]), ~real[:, :-1]], dim=1) & real
    seen = real.cumsum(dim=1) - real.long()
    if (torn := after_padding & (seen > 0) & ~starts).any():
        row, token = torn.nonzero()[0].tolist()
        raise ValueError(
            f"padding must lie between documents; row {row} has padding inside of one, before token {token} - pack "
            "the tokens without it, or say by doc_ids or position_ids that another document starts there"
        )
    places = torch.arange(seq_len)
    start_of = torch.where(starts | after_padding, places, 0).cummax(dim=1).values
    return torch.where(real, places - start_of, -1)


def _rows(x: Tensor, name: str, seq_len: int) -> Tensor:
    """[S] or [rows, S], on the CPU, as [rows, S]."""
    if not isinstance(x, Tensor) or x.ndim not in (1, 2) or x.shape[-1] != seq_len or x.is_floating_point():
        came = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} must be integers [S] or [B, S] of seq_len={seq_len} tokens, not sharded; got {came}")
    return x.detach().cpu().long().view(-1, seq_len)


def _jumps(position_ids: Tensor) -> Tensor:
    """Where positions do not rise by one, bool [B, S]."""
    starts = torch.zeros_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return starts


def _changes(ids: Tensor, real: Tensor) -> Tensor:
    """Where another document than that of the last real token starts, bool [B, S]."""
    starts = torch.zeros_like(real)
    for row in range(len(ids)):
        places = real[row].nonzero().squeeze(1)
        found = ids[row, places]
        changes = found[1:] != found[:-1]
        starts[row, places[1:][changes]] = True
        pieces = found[torch.cat([torch.ones(min(len(found), 1), dtype=torch.bool), changes])]
        if len(pieces.unique()) < len(pieces):
            raise ValueError(
                f"a document must be one run of tokens for a recurrence; row {row} of doc_ids has one in pieces"
            )
    return starts
