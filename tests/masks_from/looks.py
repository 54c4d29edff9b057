"""What a mask that was read says, by each of the ways in which it is asked."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpflex.mods.evaluate import evaluate
from cpflex.mods.intervals import EMPTY, FULL, PARTIAL, TileClassifier
from cpflex.mods.trace import trace_mask_mod


def look(mask: Any, shape: tuple[int, int, int, int]) -> Tensor:
    """bool [B, H, Q, K]: called as torch calls it, position by position."""
    q, k = torch.arange(shape[2])[:, None], torch.arange(shape[3])
    heads = [[mask(torch.tensor(b), torch.tensor(h), q, k) for h in range(shape[1])] for b in range(shape[0])]
    return torch.stack([torch.stack([seen.expand(shape[2:]) for seen in batch]) for batch in heads])


def assert_is(mask: Any, expected: Tensor, tile: int | None = 8) -> None:
    """The mask is ``expected``, bool [Q, K], [H, Q, K] or [B, H, Q, K]: called, traced, and in bounds of tiles, which are
    never wrong and, with a ``tile``, decide every tile of that side.
    """
    expected = expected.view(*[1] * (4 - expected.ndim), *expected.shape)
    shape: tuple[int, int, int, int] = tuple(expected.shape)  # type: ignore[assignment]
    assert torch.equal(look(mask, shape), expected), "called"
    mod = trace_mask_mod(mask)
    b, h, q, k = (torch.arange(size).view(-1, *[1] * (3 - dim)) for dim, size in enumerate(shape))
    seen = evaluate(mod.graph, mod.captured, {"b": b, "h": h, "q_idx": q, "kv_idx": k})[0]
    assert torch.equal(seen.broadcast_to(shape), expected), "traced"
    assert mask.lengths >= {(shape[2], shape[3])}, "made for these lengths"
    assert undecided(mask, expected, 3 if tile is None else tile) == 0 or tile is None, "a tile is not decided"


def undecided(mask: Any, expected: Tensor, tile: int) -> int:
    """Tiles that are all true or all false and not proven to be; those that are proven, are."""
    batch, heads, q_len, kv_len = expected.shape
    q_lo, kv_lo = (np.arange(0, size, tile) for size in (q_len, kv_len))
    q_hi, kv_hi = (np.minimum(lo + tile, size) - 1 for lo, size in ((q_lo, q_len), (kv_lo, kv_len)))
    classify = TileClassifier(trace_mask_mod(mask))
    verdicts = classify(q_lo[:, None], q_hi[:, None], kv_lo, kv_hi, b=(0, batch - 1), h=(0, heads - 1))
    padded = [
        torch.nn.functional.pad(expected.float(), (0, -kv_len % tile, 0, -q_len % tile), value=x) for x in (0.0, 1.0)
    ]
    parts = [x.unfold(2, tile, tile).unfold(3, tile, tile).movedim((0, 1), (2, 3)).flatten(2) for x in padded]
    any_true, all_true = parts[0].amax(2).numpy() > 0, parts[1].amin(2).numpy() > 0
    assert not (any_true & (verdicts == EMPTY)).any(), "false EMPTY"
    assert not (~all_true & (verdicts == FULL)).any(), "false FULL"
    return int(((verdicts == PARTIAL) & (all_true | ~any_true)).sum())
