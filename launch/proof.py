"""The proof before the run: loss and gradients of one step on all ranks, and on one rank, against dense fp64 attention.

The budget is derived, not tuned: twice the error of dense attention of the run's precision, plus one rounding. Dense
attention shares nothing with cpflex but the masks, so a mistake of cpflex cannot widen its own budget.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cpflex.sharding.layout import LayoutFn
from data import IGNORE, Corpus, Sample
from model import Transformer
from planning import layer_masks, plan_layers
from step import loss_and_gradients, summed_loss

PROOF_LEN = 1021
"""Tokens of the proof's sequence: dense fp64 attention stays cheap, and being prime it needs pads."""

Results = Mapping[str, Tensor]
"""The loss, and the gradient of each parameter, by name."""


@dataclass(frozen=True)
class Comparison:
    """How far one result is from fp64, and how far it may be: norm of the difference / norm of the fp64 result."""

    name: str
    error: float  # on all ranks
    one_rank_error: float
    budget: float

    @property
    def passed(self) -> bool:
        # written so that a NaN fails
        return math.isfinite(self.budget) and self.error <= self.budget and self.one_rank_error <= self.budget


def compare(found: Results, one_rank: Results, dense: Results, exact: Results, dtype: torch.dtype) -> list[Comparison]:
    """Compare what all ranks ``found``, and ``one_rank``, with fp64.

    Args:
        dense: of one device, without cpflex, in the precision of the first two.
        dtype: that precision.
    """
    rounding = torch.finfo(dtype).eps
    return [
        Comparison(
            name,
            relative_error(found[name], truth),
            relative_error(one_rank[name], truth),
            2 * relative_error(dense[name], truth) + rounding,
        )
        for name, truth in exact.items()
    ]


def relative_error(result: Tensor, truth: Tensor) -> float:
    distance, size = (result.double() - truth).norm().item(), truth.norm().item()
    return distance / size if size else distance


def prove(
    model: Transformer,
    files: Sequence[Path],
    seq_len: int,
    window: int,
    layout: LayoutFn,
    group: dist.ProcessGroup,
    device: torch.device,
) -> list[Comparison]:
    """The comparisons, equal on every rank; whether they passed is the caller's to judge.

    The sequence is shorter than the run's, and so are its documents and its window: several documents share it, and the
    window hides part of them.
    """
    proof_len = min(PROOF_LEN, seq_len)
    longest = max(1, proof_len // 3)
    window = min(window, max(1, longest // 4))
    sample = Corpus(files, proof_len, seed=0, longest=longest)[0]
    plan = plan_layers(sample.cu_seqlens, window, model.shape.kinds, group=group, layout=layout)
    found = _results(model, loss_and_gradients(model, sample, plan, group, device))
    answer: list[Any] = [None]
    if group.rank() == 0:
        whole = plan_layers(sample.cu_seqlens, window, model.shape.kinds)
        one_rank = _results(model, loss_and_gradients(model, sample, whole, None, device))
        dense = dense_results(model, sample, window)
        answer = [compare(found, one_rank, dense, exact_results(model, sample, window), model.shape.dtype)]
    dist.broadcast_object_list(answer, group_src=0, group=group, device=device)
    model.zero_grad()
    return answer[0]


def exact_results(model: Transformer, sample: Sample, window: int) -> Results:
    """In fp64: parameters, activations, attention and loss."""
    exact = Transformer(replace(model.shape, dtype=torch.float64)).double()
    exact.load_state_dict(model.state_dict())
    return dense_results(exact.to(model.head.weight.device), sample, window)


def dense_results(model: Transformer, sample: Sample, window: int) -> Results:
    """On one device, by plain torch: no plan, no ranks, no blocks. Attention sums in the dtype of the parameters."""
    sums = model.head.weight
    masks = layer_masks(sample.cu_seqlens.to(sums.device), window)
    positions = torch.arange(len(sample.tokens), device=sums.device)
    zero = torch.zeros_like(positions[:1])
    seen = {kind: mask(zero, zero, positions[:, None], positions) for kind, mask in masks.items()}

    def attend(q: Tensor, k: Tensor, v: Tensor, kind: str) -> Tensor:
        k, v = (x.to(sums.dtype).repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = q.to(sums.dtype) @ k.mT / math.sqrt(q.shape[-1])
        return (scores.masked_fill(~seen[kind], -math.inf).softmax(dim=-1) @ v).to(q.dtype)

    tokens, labels, position_ids = (x[None].to(sums.device) for x in sample[:3])
    model.zero_grad()
    loss = summed_loss(model, tokens, labels, position_ids, attend) / (labels != IGNORE).sum().clamp(min=1)
    loss.backward()
    return _results(model, loss.detach())


def describe(comparisons: Sequence[Comparison], world_size: int) -> str:
    """The loss, and the gradients that failed, or were nearest to it."""
    loss, *gradients = comparisons
    nearest = sorted(gradients, key=lambda c: max(c.error, c.one_rank_error) / c.budget, reverse=True)[:3]
    shown = [loss, *([c for c in gradients if not c.passed] or nearest)]
    header = f"  {'errors relative to fp64':34} {f'{world_size} ranks':>9} {'one rank':>9} {'budget':>9}"
    rows = [
        f"  {c.name:34} {c.error:9.1e} {c.one_rank_error:9.1e} {c.budget:9.1e}  {'ok' if c.passed else 'FAILED'}"
        for c in shown
    ]
    num_passed = sum(c.passed for c in comparisons)
    verdict = f"  {num_passed} of {len(comparisons)} within budget: the loss and {len(gradients)} gradients"
    return "\n".join(["proof: one step", header, *rows, verdict])


def _results(model: Transformer, loss: Tensor) -> Results:
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss, **gradients}
