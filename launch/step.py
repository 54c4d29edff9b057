"""One step on a plan: loss and gradients of a sequence, each rank computing the share of its own tokens."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

import cpflex
from data import Sample
from trainee import Trainee


def loss_and_gradients(
    trainee: Trainee, sample: Sample, plan: cpflex.Plan, group: dist.ProcessGroup | None, device: torch.device
) -> Tensor:
    """Set ``.grad`` of every parameter; return the loss []. Both are of the whole sequence and equal on all ranks.

    Args:
        trainee: equal on all ranks.
        plan: of its planner, on ``group``; None is one rank.
    """
    return gradients_of(trainee.share_of_loss(sample, plan, device), trainee.model, group)


def gradients_of(share: Tensor, model: nn.Module, group: dist.ProcessGroup | None) -> Tensor:
    """Set ``.grad`` of every parameter, and return the loss, from this rank's ``share`` of it; equal on all ranks."""
    model.zero_grad()
    share.backward()
    sum_gradients(model.parameters(), group)
    return sum_over_ranks(share.detach(), group)


def sum_gradients(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup | None) -> None:
    """Replace each gradient by the ranks' sum, as one message. Not their mean: the ranks' losses are shares of one."""
    learnt = [parameter for parameter in parameters if parameter.requires_grad]
    # an expert that no token of this rank went to has no gradient here
    grads = [torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in learnt]
    total = sum_over_ranks(torch.cat([grad.flatten() for grad in grads]), group)
    for parameter, summed in zip(learnt, total.split([grad.numel() for grad in grads]), strict=True):
        parameter.grad = summed.view_as(parameter)


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """``x`` itself, now the sum of the ranks'."""
    if group is not None:
        dist.all_reduce(x, group=group)
    return x
