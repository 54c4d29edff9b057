"""One step on a plan: loss and gradients of a packed sequence, each rank computing the share of its own tokens."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import cpflex
from data import IGNORE, Sample
from model import Attend, Transformer


def loss_and_gradients(
    model: Transformer, sample: Sample, plan: cpflex.Plan, group: dist.ProcessGroup | None, device: torch.device
) -> Tensor:
    """Set ``.grad`` of every parameter; return the loss []. Both are of the whole sequence and equal on all ranks.

    Args:
        model: equal on all ranks.
        plan: of the model's mask kinds, on ``group``; None is one rank.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, kind: str) -> Tensor:
        out = cpflex.flex_attention(q, k, v, block_mask=plan[kind], enable_gqa=True)
        assert isinstance(out, Tensor)
        return out

    tokens, labels, position_ids = (
        plan.shard(x, dim=0, pad_value=pad_value)[None].to(device)
        for x, pad_value in ((sample.tokens, 0), (sample.labels, IGNORE), (sample.position_ids, 0))
    )
    num_labels = sum_over_ranks((labels != IGNORE).sum(), group).clamp(min=1)
    share = summed_loss(model, tokens, labels, position_ids, attend) / num_labels
    model.zero_grad()
    share.backward()
    sum_gradients(model.parameters(), group)
    return sum_over_ranks(share.detach(), group)


def summed_loss(model: Transformer, tokens: Tensor, labels: Tensor, position_ids: Tensor, attend: Attend) -> Tensor:
    """Cross entropy summed over the labels, [].

    Without labels it is 0, and still has a graph: the exchanges of backward need every rank.
    """
    logits = model(tokens, position_ids, attend)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")


def sum_gradients(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup | None) -> None:
    """Replace each gradient by the ranks' sum, as one message. Not their mean: the ranks' losses are shares of one."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    total = sum_over_ranks(torch.cat([grad.flatten() for grad in grads]), group)
    for grad, summed in zip(grads, total.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(summed.view_as(grad))


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """``x`` itself, now the sum of the ranks'."""
    if group is not None:
        dist.all_reduce(x, group=group)
    return x
