"""What is trained: a model and what is particular to it. The rest of launch/ is the same for all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cpflex
from data import IGNORE, Sample
from model import Attend, Transformer
from planning import layer_masks, plan_layers

Planner = Callable[..., cpflex.Plan]
"""``(cu_seqlens, **where)``, with ``where`` as for `cpflex.make_plan`: one plan for all layers. Pickles, as a worker of
the data loader calls it.
"""

Results = Mapping[str, Tensor]
"""The loss, and the gradient of each parameter, by name."""


class Trainee(Protocol):
    @property
    def model(self) -> nn.Module: ...

    @property
    def dtype(self) -> torch.dtype:
        """Of matmuls and attention; parameters are fp32."""
        ...

    @property
    def identity(self) -> str:
        """What a run that resumes must have in common besides its options."""
        ...

    @property
    def remark(self) -> str:
        """What a run says of it, or nothing."""
        ...

    @property
    def planner(self) -> Planner: ...

    def share_of_loss(self, sample: Sample, plan: cpflex.Plan, device: torch.device) -> Tensor:
        """This rank's share of the mean cross entropy over all labels, []; the shares of all ranks sum to that mean.

        Without labels it is 0, and still has a graph: the exchanges of backward need every rank.
        """
        ...

    def for_proof(self, longest: int) -> Trainee:
        """The same weights, with windows that hide part of documents of ``longest`` tokens."""
        ...

    def dense_results(self, sample: Sample, *, in_fp64: bool) -> Results:
        """On one device, without plan, ranks or cpflex; in this precision, or all of it in fp64."""
        ...


@dataclass(frozen=True, eq=False)
class BuiltIn:
    """The transformer of model.py."""

    model: Transformer
    window: int
    """Tokens that sliding layers see."""

    @property
    def dtype(self) -> torch.dtype:
        return self.model.shape.dtype

    @property
    def identity(self) -> str:
        return "built in"

    @property
    def remark(self) -> str:
        return ""

    @property
    def planner(self) -> Planner:
        return partial(plan_layers, window=self.window, kinds=tuple(self.model.shape.kinds))

    def share_of_loss(self, sample: Sample, plan: cpflex.Plan, device: torch.device) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor, kind: str) -> Tensor:
            out = cpflex.flex_attention(q, k, v, block_mask=plan[kind], enable_gqa=True)
            assert isinstance(out, Tensor)
            return out

        plan.require_same(tokens=sample.tokens, labels=sample.labels)
        tokens, labels, position_ids = (
            plan.shard(x, dim=0, pad_value=pad_value)[None].to(device)
            for x, pad_value in ((sample.tokens, 0), (sample.labels, IGNORE), (sample.position_ids, 0))
        )
        return summed_loss(self.model, tokens, labels, position_ids, attend) / sample.num_labels

    def for_proof(self, longest: int) -> BuiltIn:
        return replace(self, window=min(self.window, max(1, longest // 4)))

    def dense_results(self, sample: Sample, *, in_fp64: bool) -> Results:
        """Attention sums in the dtype of the parameters."""
        model = copy_in_fp64(self.model) if in_fp64 else self.model
        sums = model.head.weight
        masks = layer_masks(sample.cu_seqlens.to(sums.device), self.window)
        positions = torch.arange(len(sample.tokens), device=sums.device)
        zero = torch.zeros_like(positions[:1])
        seen = {kind: mask(zero, zero, positions[:, None], positions) for kind, mask in masks.items()}

        def attend(q: Tensor, k: Tensor, v: Tensor, kind: str) -> Tensor:
            k, v = (x.to(sums.dtype).repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
            scores = q.to(sums.dtype) @ k.mT / math.sqrt(q.shape[-1])
            return (scores.masked_fill(~seen[kind], -math.inf).softmax(dim=-1) @ v).to(q.dtype)

        tokens, labels, position_ids = (x[None].to(sums.device) for x in sample[:3])
        model.zero_grad()
        loss = summed_loss(model, tokens, labels, position_ids, attend) / sample.num_labels
        loss.backward()
        return results_of(model, loss)


def summed_loss(model: Transformer, tokens: Tensor, labels: Tensor, position_ids: Tensor, attend: Attend) -> Tensor:
    """Cross entropy summed over the labels, []."""
    logits = model(tokens, position_ids, attend)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")


def results_of(model: nn.Module, loss: Tensor) -> Results:
    """After backward."""
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


def copy_in_fp64(model: Transformer) -> Transformer:
    """The same weights; matmuls and attention in fp64 as well."""
    exact = Transformer(replace(model.shape, dtype=torch.float64)).double()
    exact.load_state_dict(model.state_dict())
    return exact.to(model.head.weight.device)
