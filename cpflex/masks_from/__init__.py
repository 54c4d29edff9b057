"""Masks of other libraries, read as ordinary mask_mods: exact, planned tile by tile like any other.

Each reader takes what the other library's call takes and returns a `MaskMod` on (b, h, q_idx, kv_idx), to be planned,
combined with ``&``, ``|`` and ``~``, or given to torch's own flex_attention::

    mask = cpflex.masks_from.varlen(cu_seqlens_q, cu_seqlens_k, causal=True, window_size=(1023, 0))
    plan = cpflex.make_plan(mask, seq_len, group)

`make_plan` and `flex_attention` take a torch BlockMask as it is. What a format can say and we cannot is refused by
name.
"""

from cpflex.masks_from.block_mask import as_mask, block_mask
from cpflex.masks_from.bsr import bsr
from cpflex.masks_from.columns import flashmask
from cpflex.masks_from.dense import dense
from cpflex.masks_from.intervals import intervals
from cpflex.masks_from.ranges import ranges
from cpflex.masks_from.tables import blocks, selected
from cpflex.masks_from.varlen import varlen

__all__ = ["as_mask", "block_mask", "blocks", "bsr", "dense", "flashmask", "intervals", "ranges", "selected", "varlen"]
