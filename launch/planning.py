"""The plan of each sequence, made where it is read: in a worker of the data loader, without a process group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

import cpflex
from cpflex.sharding.layout import LayoutFn
from data import Corpus, Sample

LAYOUTS: dict[str, LayoutFn] = {
    "balanced": cpflex.balanced,
    "zigzag": cpflex.zigzag,
    "striped": cpflex.striped,
    "contiguous": cpflex.contiguous,
}


def layer_masks(cu_seqlens: Tensor, window: int) -> dict[str, cpflex.MaskMod]:
    """The mask of each kind of layer: causal within a document, over all of it or over its latest ``window`` tokens."""
    full = cpflex.causal() & cpflex.document(cu_seqlens=cu_seqlens)
    return {"full": full, "sliding": full & cpflex.sliding_window(window)}


def plan_layers(cu_seqlens: Tensor, window: int, kinds: Sequence[str], **where: Any) -> cpflex.Plan:
    """One plan for all layers.

    Args:
        kinds: the mask kind of each layer.
        where: ``group``, or ``rank`` and ``world_size``, and ``layout``, as for `cpflex.make_plan`.
    """
    masks, weights = layer_masks(cu_seqlens, window), Counter(kinds)
    return cpflex.make_plan(
        {kind: masks[kind] for kind in sorted(weights)}, int(cu_seqlens[-1]), weights=weights, **where
    )


@dataclass(frozen=True)
class PlannedSamples(Dataset[tuple[Sample, cpflex.Plan]]):
    """Sequence ``index`` and this rank's plan for it, to be bound to the group.

    Args:
        planner: ``(cu_seqlens, rank=, world_size=, layout=)``: the plan of all layers; pickles.
    """

    corpus: Corpus
    planner: Callable[..., cpflex.Plan]
    layout: LayoutFn
    rank: int
    world_size: int

    def __getitem__(self, index: int) -> tuple[Sample, cpflex.Plan]:
        sample = self.corpus[index]
        where = {"rank": self.rank, "world_size": self.world_size, "layout": self.layout}
        return sample, self.planner(sample.cu_seqlens, **where)
