"""The loss of a sequence shared by ranks: labels are shifted before they are sharded, counted over all ranks, and each
rank computes its share of the one mean.

Shifted after sharding, every chunk would lose the label of its last token; averaged by each rank over its own labels,
tokens of ranks with few labels would weigh more.

>>> labels = cpflex.loss.shift_labels(tokens, cu_seqlens)                      # whole, on every rank
>>> labels = plan.shard(labels, dim=1, pad_value=IGNORE_INDEX)
>>> share = cpflex.loss.cross_entropy(logits, labels, mesh["cp"])              # the ranks' shares sum to the mean
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from cpflex.links.processes import Group, ProcessLinks, links_of

# B batch, S tokens of the whole sequence, V vocabulary; "..." are the local tokens, [S_local] or [B, S_local]

IGNORE_INDEX = -100
"""The label of a token that predicts nothing: the default ``ignore_index`` of torch and of Hugging Face."""


def shift_labels(
    labels: Tensor,  # integers [S] or [B, S], of the whole sequence
    cu_seqlens: Tensor | Sequence[int] | None = None,  # integers [num_docs + 1]
    *,
    doc_ids: Tensor | None = None,  # integers [S] or [B, S]
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """The label of the next token at each position; ``ignore_index`` at the end and at the last token of each document.

    Labels that are ``ignore_index`` already, those of a prompt for instance, stay so.

    >>> shift_labels(torch.tensor([1, 2, 3, 4, 5]), cu_seqlens=[0, 2, 5]).tolist()
    [2, -100, 4, 5, -100]

    Args:
        labels: not sharded and not shifted: usually the tokens themselves.
        cu_seqlens: where documents start, and S; alike in all rows of a batch. What `cpflex.document` takes.
        doc_ids: instead of ``cu_seqlens``: equal within a document; [B, S] if rows are packed differently.

    Returns:
        Of the shape and dtype of ``labels``: what models call ``shift_labels``, still to be sharded.

    Raises:
        ValueError: shapes that do not fit, ``cu_seqlens`` that does not rise from 0 to S, or both of the two.
    """
    if labels.ndim not in (1, 2) or labels.dtype == torch.bool or labels.is_floating_point() or labels.numel() == 0:
        raise ValueError(f"labels must be integers [S] or [B, S]; got {labels.dtype} {tuple(labels.shape)}")
    if cu_seqlens is not None and doc_ids is not None:
        raise ValueError("pass cu_seqlens or doc_ids, not both")
    shifted = labels.roll(-1, dims=-1)
    shifted[..., -1] = ignore_index
    if cu_seqlens is not None:
        shifted[..., _last_tokens(cu_seqlens, labels)] = ignore_index
    if doc_ids is not None:
        if doc_ids.shape not in (labels.shape, labels.shape[-1:]):
            raise ValueError(
                f"doc_ids must be [S] or have the shape of labels, {tuple(labels.shape)}; got {tuple(doc_ids.shape)}"
            )
        ends = doc_ids[..., 1:] != doc_ids[..., :-1]
        shifted[..., :-1].masked_fill_(ends.to(labels.device), ignore_index)
    return shifted


def _last_tokens(cu_seqlens: Tensor | Sequence[int], labels: Tensor) -> Tensor:
    """Positions of the last tokens of documents that are not empty, int64 [at most num_docs]."""
    starts, seq_len = torch.as_tensor(cu_seqlens, device=labels.device).long(), labels.shape[-1]
    is_list = starts.ndim == 1 and starts.numel() > 1
    if not is_list or starts[0] != 0 or starts[-1] != seq_len or (starts.diff() < 0).any():
        raise ValueError(f"cu_seqlens must rise from 0 to the {seq_len} tokens of labels; got {cu_seqlens}")
    return starts[1:][starts.diff() > 0] - 1


def num_labels(
    shifted_labels: Tensor,  # integers [...], this rank's
    group: Group | None,
    *,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:  # int64 []
    """Labels that count, over all ranks of ``group``: one all-reduce, without waiting for it on the host.

    Args:
        group: all ranks whose tokens are in the mean: those of the sequence, or of data and context parallelism
            together, ``mesh["dp", "cp"]._flatten("dp_cp")``. None is one rank.
    """
    count = (shifted_labels != ignore_index).sum()
    if group is None:
        return count
    links = links_of(group)
    if isinstance(links, ProcessLinks):
        dist.all_reduce(count, group=links.group)
        return count
    return count.new_tensor(links.all_gather_number(int(count), "labels")).sum()


def cross_entropy(
    logits: Tensor,  # [..., V], this rank's, any floating dtype
    shifted_labels: Tensor,  # integers [...], this rank's
    group: Group | None,
    *,
    num_items: Tensor | int | None = None,
    averaged_over: int = 1,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:  # [], at least fp32
    """This rank's share of the mean cross entropy over all ranks' labels; the shares of all ranks sum to that mean.

    Gradients are therefore to be summed over the ranks. DDP and FSDP average them: say over how many ranks, and the
    share is multiplied by that number.

    >>> dp_cp = mesh["dp", "cp"]._flatten("dp_cp")                             # the mesh given to fully_shard
    >>> cross_entropy(logits, labels, dp_cp, averaged_over=dp_cp.size()).backward()

    A rank without labels gets 0 with a graph, and so do all ranks if nobody has any: the exchanges of backward need
    every rank. Computed in fp32, also from bf16 logits. As fp32 logits are large, the loss of a large vocabulary can be
    the sum of calls on slices of the tokens, each with ``num_items``.

    Args:
        logits: not shifted: position i predicts ``shifted_labels[i]``.
        shifted_labels: from `shift_labels`, then sharded with ``pad_value=ignore_index``.
        group: as for `num_labels`; not used if ``num_items`` is given.
        num_items: labels in the mean, if known: `num_labels`, summed over the microbatches of a step, so that all of
            them weigh alike.
        averaged_over: size of the group over which gradients will be averaged; 1 if they will be summed.

    Raises:
        ValueError: shapes that do not fit.
    """
    if logits.shape[:-1] != shifted_labels.shape:
        raise ValueError(
            "logits must have the shape of the labels and a dim of the vocabulary; "
            f"got {tuple(logits.shape)} for {tuple(shifted_labels.shape)}"
        )
    if num_items is None:
        num_items = num_labels(shifted_labels, group, ignore_index=ignore_index)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
    total = F.cross_entropy(wide, shifted_labels.flatten().long(), ignore_index=ignore_index, reduction="sum")
    return total * averaged_over / torch.as_tensor(num_items, device=total.device).clamp(min=1)
