"""Keywords of flash attention that tell of packed documents, as ``DataCollatorWithFlattening`` with
``return_flash_attn_kwargs=True`` and TRL's collators add them.

The plan is made of positions, and says the same: the keywords are compared with them and taken out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cpflex.integrations.transformers.masks import documents_of

# B batch, S tokens of the whole sequence

KEYWORDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""Sums of lengths from 0, int32 [num_docs + 1]; the longest; the document of each token, int32 [1, S]."""


def without_flash_keywords(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch without `KEYWORDS`, and with the ``position_ids`` of their documents if it has none.

    Raises:
        ValueError: keywords that tell of other documents than one another or than ``position_ids``.
    """
    told = {name: batch[name] for name in KEYWORDS if batch.get(name) is not None}
    rest = {name: x for name, x in batch.items() if name not in KEYWORDS}
    if not told:
        return rest
    tokens = batch["input_ids"] if batch.get("input_ids") is not None else batch["inputs_embeds"]
    if len(tokens) != 1:
        raise ValueError(f"{sorted(told)} are for one row of packed documents; got {len(tokens)} rows")
    starts = {name: _starts(name, x, tokens.shape[1]) for name, x in told.items() if not name.startswith("max_")}
    positions = batch.get("position_ids")
    if positions is not None:
        starts["position_ids"] = _changes(documents_of(positions.reshape(1, -1).cpu())[0])
    if not starts:
        raise ValueError(f"{sorted(told)} tell of no documents without cu_seq_lens_q")
    (first, expected), *others = starts.items()
    for name, found in others:
        if not torch.equal(found, expected):
            raise ValueError(
                f"{first} and {name} must tell of the same documents; got {len(expected)} that start at "
                f"{expected.tolist()[:8]} and {len(found)} at {found.tolist()[:8]}"
            )
    lengths = torch.cat([expected, torch.tensor([tokens.shape[1]])]).diff()
    for name in ("max_length_q", "max_length_k"):
        if name in told and int(told[name]) != lengths.max():
            raise ValueError(f"{name} must be the longest document, {int(lengths.max())}; got {int(told[name])}")
    if positions is None:
        made = torch.cat([torch.arange(int(length)) for length in lengths])
        rest["position_ids"] = made[None].to(tokens.device)
    return rest


def _starts(name: str, value: Tensor, seq_len: int) -> Tensor:
    """Where documents that are not empty start, int64 [num_docs]."""
    value = value.cpu().long()
    if name == "seq_idx":
        if value.shape != (1, seq_len):
            raise ValueError(f"seq_idx must be [1, {seq_len}]; got {tuple(value.shape)}")
        return _changes(value[0])
    if value.ndim != 1 or len(value) < 2 or value[0] != 0 or value[-1] != seq_len or (value.diff() < 0).any():
        raise ValueError(f"{name} must rise from 0 to the {seq_len} tokens of the batch; got {value.tolist()[:8]}")
    return value[:-1][value.diff() > 0]


def _changes(documents: Tensor) -> Tensor:  # [S]
    return torch.cat([torch.zeros(1, dtype=torch.int64), 1 + documents.diff().nonzero().flatten()])
