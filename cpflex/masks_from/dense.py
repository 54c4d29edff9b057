"""Dense masks: transformers' four-dimensional ones, and plain matrices, of sequences that are short enough for them."""

from __future__ import annotations

import torch
from torch import Tensor

from cpflex.masks import MaskMod
from cpflex.masks_from.checked import by_head
from cpflex.masks_from.tables import Blocks, of_table

HIDDEN = float(torch.finfo(torch.float16).min)
"""A number in an additive mask that hides: at or below it no score matters beside a visible one."""


@torch.inference_mode(False)
def dense(
    mask: Tensor,  # [Q, K] or [B or 1, H or 1, Q, K]; bool: True is seen; floats: 0 is seen, -65504 and less is not
    *,
    num_heads: int | None = None,
) -> MaskMod:
    """A mask that is written out: that of `torch.nn.functional.scaled_dot_product_attention`, or the four-dimensional
    ``attention_mask`` of transformers' eager and SDPA attention, bool or additive.

    Row i is query i and column j key j, whatever the two lengths. Where every row is a few runs of keys the mask is
    kept as those, else whole. A query that sees no key gives 0; with an additive mask of finite numbers it would
    average all values instead.

    Args:
        num_heads: query heads, if the mask has those of the keys.

    Raises:
        ValueError: another dtype or shape, an additive mask with other numbers: a bias, to be written as a score_mod.
        NotImplementedError: an irregular mask of more than 2**26 elements.
    """
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4) or 0 in mask.shape:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask must be a tensor [Q, K] or [B, H, Q, K]; got {shape}")
    if mask.is_floating_point():
        seen = mask == 0
        if not (seen | (mask <= HIDDEN)).all():
            raise ValueError(
                f"an additive mask must be 0 where a key is seen and at most {HIDDEN:.0f} where it is not; other "
                "numbers are a bias: pass score_mod=lambda score, b, h, q, k: score + bias[b, h, q, k]"
            )
        mask = seen
    elif mask.dtype != torch.bool:
        raise ValueError(
            f"mask must be bool, or additive floats; got {mask.dtype} - compare it, for instance mask != 0"
        )
    table = by_head(mask.detach().view(*[1] * (4 - mask.ndim), *mask.shape), num_heads, "mask")
    return of_table(table, Blocks(table.shape[2], 1), Blocks(table.shape[3], 1), "dense", small=0)
