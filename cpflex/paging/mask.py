"""TracedMask: a mask_mod that was traced once, for many plans."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch

from cpflex.masks import MaskFn, MaskMod, is_count
from cpflex.mods.graph import Mod, table_sizes
from cpflex.mods.intervals import TileClassifier
from cpflex.mods.trace import trace_mask_mod


class TracedMask(MaskMod):
    """A mask_mod with its graph; the tensors that it captured are copied when it is made."""

    def __init__(self, fn: MaskFn, num_heads: int | None = None) -> None:
        if not callable(fn):
            raise TypeError(f"mask must be a mask_mod (b, h, q_idx, kv_idx) -> bool Tensor; got {type(fn).__name__}")
        lengths = fn.lengths if isinstance(fn, MaskMod) else ()
        super().__init__(fn.fn if isinstance(fn, MaskMod) else fn, getattr(fn, "__name__", type(fn).__name__), lengths)
        self.mod: Mod = trace_mask_mod(fn).map_captured(lambda x: x.detach().to("cpu", copy=True))
        self.num_heads = num_heads
        self._on: dict[torch.device, Mod] = {}
        self._keys: dict[int, str] = {}

    @cached_property
    def classifier(self) -> TileClassifier:
        return TileClassifier(self.mod)

    @cached_property
    def content_key(self) -> str:
        return self.mod.content_key

    @cached_property
    def table_len(self) -> int | None:
        """Positions that every table of the mask covers."""
        return min(table_sizes(self.mod, ("q_idx", "kv_idx")), default=None)

    def on(self, device: torch.device) -> Mod:
        """The graph with its tensors on a device; brought there once."""
        if device not in self._on:
            self._on[device] = self.mod.map_captured(lambda x: x.to(device))
        return self._on[device]

    def key(self, place: int) -> str:
        """Of what it says about the sequence at a place of a plan."""
        if place not in self._keys:
            at = f" b={place}" if self.mod.uses("b") else ""
            heads = f" of {self.num_heads} heads" if self.mod.uses("h") else ""
            self._keys[place] = self.content_key + at + heads
        return self._keys[place]

    def classify(
        self, q_lo: Any, q_hi: Any, kv_lo: np.ndarray, kv_hi: np.ndarray, *, b: tuple[Any, Any] = (0, 0)
    ) -> np.ndarray:
        """Verdicts on tiles, over all heads, as `TileClassifier` gives them."""
        return self.classifier(q_lo, q_hi, kv_lo, kv_hi, b=b, h=(0, (self.num_heads or 1) - 1))


def mask_mod(fn: MaskFn, num_heads: int | None = None) -> TracedMask:
    """Trace ``fn(b, h, q_idx, kv_idx) -> bool Tensor`` once and for all, for many plans: tracing takes longer than
    planning a step. Tensors that it captures are copied now: what is written to them later is not seen.

    Args:
        num_heads: query heads, if the mask depends on ``h``.

    >>> mask = cpflex.mask_mod(cpflex.causal() & cpflex.sliding_window(4096))

    Raises:
        UnsupportedMod: ``fn`` is not pointwise, or its result is not bool; the error names what.
        ValueError: it depends on ``h``, and nothing says how many heads there are.
    """
    if isinstance(fn, TracedMask) and num_heads in (None, fn.num_heads):
        return fn
    if num_heads is not None and not is_count(num_heads, 1):
        raise ValueError(f"num_heads must be an integer of at least 1; got {num_heads!r}")
    with torch.inference_mode(False):
        made = TracedMask(fn, num_heads)
    if made.mod.uses("h"):
        if num_heads is None:
            raise ValueError(f"mask {made.__name__!r} depends on h; pass num_heads=")
        _require_tables(made, "h", num_heads, "num_heads")
    return made


def traced_masks(mask: MaskFn | Mapping[str, MaskFn], num_heads: int | None = None) -> dict[str, TracedMask]:
    """Each mask kind traced; a single one is called "mask"."""
    if isinstance(mask, TracedMask) and num_heads in (None, mask.num_heads):
        return {"mask": mask}  # at each step
    masks = dict(mask) if isinstance(mask, Mapping) else {"mask": mask}
    if not masks or not all(isinstance(kind, str) for kind in masks):
        raise ValueError(f"mask must name at least one mask kind, by strings; got {masks or 'an empty dict'}")
    return {kind: mask_mod(one, num_heads) for kind, one in masks.items()}


def require_tables(mask: TracedMask, num_sequences: int, last: int) -> None:
    """Raise if a captured tensor is too short for so many sequences, or for positions below ``last``."""
    _require_tables(mask, "b", num_sequences, "the number of sequences")
    if mask.table_len is not None and mask.table_len < last:
        raise ValueError(
            f"mask {mask.__name__!r} indexes a captured tensor of {mask.table_len} elements with a position, and the "
            f"plan reaches {last} tokens; give it a table for all that is reserved, or a shorter horizon"
        )


def _require_tables(mask: TracedMask, name: str, size: int, what: str) -> None:
    for table_len in table_sizes(mask.mod, [name]):
        if table_len < size:
            raise ValueError(
                f"mask {mask.__name__!r} indexes a captured tensor of {table_len} elements with {name}; {what} is "
                f"{size}"
            )
