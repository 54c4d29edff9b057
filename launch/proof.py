"""The proof before the run: loss and gradients of one step on all ranks, and on one rank, against dense fp64 attention.

The budget is derived, not tuned: twice the error of dense attention of the run's precision, plus one rounding of that
precision and two of fp32, in which losses are summed over tokens and ranks. Dense attention shares nothing with cpflex
but, for the built-in model, the masks; so a mistake of cpflex cannot widen its own budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cpflex.sharding.layout import LayoutFn
from data import Corpus
from step import loss_and_gradients
from trainee import Results, Trainee, results_of

PROOF_LEN = 1021
"""Tokens of the proof's sequence: dense fp64 attention stays cheap, and being prime it needs pads."""


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
    rounding = torch.finfo(dtype).eps + 2 * torch.finfo(torch.float32).eps
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
    trainee: Trainee,
    files: Sequence[Path],
    seq_len: int,
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
    trainee = trainee.for_proof(longest)
    sample = Corpus(files, proof_len, seed=0, longest=longest)[0]
    plan = trainee.planner(sample.cu_seqlens, group=group, layout=layout)
    found = results_of(trainee.model, loss_and_gradients(trainee, sample, plan, group, device))
    answer: list[Any] = [None]
    if group.rank() == 0:
        whole = trainee.planner(sample.cu_seqlens)
        one_rank = results_of(trainee.model, loss_and_gradients(trainee, sample, whole, None, device))
        dense, exact = (trainee.dense_results(sample, in_fp64=in_fp64) for in_fp64 in (False, True))
        answer = [compare(found, one_rank, dense, exact, trainee.dtype)]
    dist.broadcast_object_list(answer, group_src=0, group=group, device=device)
    trainee.model.zero_grad()
    return answer[0]


def describe(comparisons: Sequence[Comparison], world_size: int) -> str:
    """The loss, and the gradients that failed, or were nearest to it."""
    loss, *gradients = comparisons
    nearest = sorted(gradients, key=lambda c: max(c.error, c.one_rank_error) / c.budget, reverse=True)[:3]
    shown = [loss, *([c for c in gradients if not c.passed] or nearest)]
    width = max(34, *(len(c.name) for c in shown))
    header = f"  {'errors relative to fp64':{width}} {f'{world_size} ranks':>9} {'one rank':>9} {'budget':>9}"
    rows = [
        f"  {c.name:{width}} {c.error:9.1e} {c.one_rank_error:9.1e} {c.budget:9.1e}  {'ok' if c.passed else 'FAILED'}"
        for c in shown
    ]
    num_passed = sum(c.passed for c in comparisons)
    verdict = f"  {num_passed} of {len(comparisons)} within budget: the loss and {len(gradients)} gradients"
    return "\n".join(["proof: one step", header, *rows, verdict])
