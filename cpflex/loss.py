"""The loss of a sequence shared by ranks: labels are shifted before they are sharded, counted over all ranks, and each
rank computes its share of the one mean.

Shifted after sharding, every chunk would lose the label of its last token; averaged by each rank over its own labels,
tokens of ranks with few labels would weigh more.

>>> labels = cpflex.loss.shift_labels(tokens, cu_seqlens)                      # whole, on every rank
>>> labels = plan.shard(labels, dim=1, pad_value=IGNORE_INDEX)
>>> share = cpflex.loss.cross_entropy(logits, labels, mesh["cp"])              # the ranks' shares sum to the mean

Preference losses need a number for each whole sequence instead: `sequence_log_probs`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cpflex.links.processes import Group, ProcessLinks, links_of
from cpflex.links.protocol import swap

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
    return sum_over_ranks((shifted_labels != ignore_index).sum(), group)


def cross_entropy(
    logits: Tensor,  # [..., V], this rank's, any floating dtype
    shifted_labels: Tensor,  # integers [...], this rank's
    group: Group | None,
    *,
    num_items: Tensor | int | None = None,
    averaged_over: int = 1,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
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
        label_smoothing: as of torch's `cross_entropy`: this much of each target is spread evenly over the vocabulary.
        z_loss: times the square of log Z, the log-sum-exp of a token's logits, is added to the cross entropy of each
            label that counts (PaLM, section 5, has 1e-4): it keeps logits from drifting.

    Raises:
        ValueError: shapes that do not fit, or a smoothing that is not between 0 and 1.
    """
    _check_shapes(logits, shifted_labels)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must lie between 0 and 1; got {label_smoothing}")
    if num_items is None:
        num_items = num_labels(shifted_labels, group, ignore_index=ignore_index)
    wide, flat = _wide(logits).flatten(0, -2), shifted_labels.flatten().long()
    total = F.cross_entropy(wide, flat, ignore_index=ignore_index, reduction="sum", label_smoothing=label_smoothing)
    if z_loss:
        squares = wide.logsumexp(dim=-1).square()
        total = total + z_loss * torch.where(flat != ignore_index, squares, 0.0).sum()
    return total * averaged_over / torch.as_tensor(num_items, device=total.device).clamp(min=1)


def _check_shapes(logits: Tensor, shifted_labels: Tensor) -> None:
    if logits.shape[:-1] != shifted_labels.shape:
        raise ValueError(
            "logits must have the shape of the labels and a dim of the vocabulary; "
            f"got {tuple(logits.shape)} for {tuple(shifted_labels.shape)}"
        )


def _wide(x: Tensor) -> Tensor:
    """In fp32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# -- what is a number for a whole sequence: preference losses


def sum_over_ranks(
    x: Tensor,  # any shape, floating, equal on all ranks
    group: Group | None,
) -> Tensor:  # of that shape, the same on every rank
    """The sum of the ranks' tensors, where every rank goes on to compute the same thing from it. Differentiable.

    A loss that is a nonlinear function of a sequence's log-probability, of DPO for instance, cannot be a sum of ranks'
    shares. So each rank computes the whole of it, from the same sum, and the gradient of the sum goes to each rank's
    term as it is: a rank's gradients of parameters are then those of its own tokens, to be summed over the ranks as
    always. (The backward of `torch.distributed.nn.all_reduce` sums the equal gradients of all ranks: P times too much.)

    >>> log_probs = sum_over_ranks(local_log_probs, mesh["cp"])                # [B], on every rank
    >>> loss = -F.logsigmoid(beta * log_probs[:half] - beta * log_probs[half:]).mean()
    >>> (loss * mesh["cp"].size()).backward()                                  # DDP and FSDP average

    The loss is whole on each rank, and not a share. Where gradients are summed over the ranks it is used as it is; if
    DDP or FSDP average them, it is multiplied by the ranks of one sequence, as data parallelism averages over sequences
    by itself. A log takes the value of one rank, or the mean over them.

    All ranks must call it, in one order.
    """
    return x if group is None else _SumOverRanks.apply(x, group)  # type: ignore[return-value]


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group) -> Tensor:
        links = links_of(group)
        if isinstance(links, ProcessLinks):
            dist.all_reduce(total := x.clone(memory_format=torch.contiguous_format), group=links.group)
            return total
        mine = x.contiguous()
        parts = [mine if rank == links.rank else torch.empty_like(mine) for rank in range(links.world_size)]
        swap([mine] * links.world_size, parts, links)
        return torch.stack(parts).sum(dim=0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return grad, None


def token_log_probs(
    logits: Tensor,  # [..., V], this rank's, any floating dtype
    shifted_labels: Tensor,  # integers [...], this rank's
    *,
    temperature: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:  # [...], at least fp32
    """The log-probability of each label under ``logits / temperature``; 0 where there is none. Nothing is exchanged.

    Raises:
        ValueError: shapes that do not fit, or a temperature that is not above 0.
    """
    _check_shapes(logits, shifted_labels)
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0; got {temperature}")
    wide, flat = _wide(logits).flatten(0, -2), shifted_labels.flatten().long()
    wide = wide if temperature == 1.0 else wide / temperature
    return -F.cross_entropy(wide, flat, ignore_index=ignore_index, reduction="none").view(shifted_labels.shape)


def sequence_log_probs(
    logits: Tensor,  # [B, S_local, V], this rank's, any floating dtype
    shifted_labels: Tensor,  # integers [B, S_local], this rank's
    group: Group | None,
    *,
    doc_ids: Tensor | None = None,  # integers [S_local] or [B, S_local], this rank's
    num_docs: int | None = None,
    average: bool = False,
    temperature: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:  # [B], or [num_docs] with doc_ids; at least fp32
    """The log-probability of each sequence, over the tokens of all ranks: the same on every rank, see `sum_over_ranks`
    for the gradient and for what to do with the loss.

    >>> labels = plan.shard(shift_labels(tokens, doc_ids=doc_ids), dim=1, pad_value=IGNORE_INDEX)
    >>> local_docs = plan.shard(doc_ids, dim=1, pad_value=-1)
    >>> chosen_and_rejected = sequence_log_probs(logits, labels, mesh["cp"], doc_ids=local_docs, num_docs=2 * n)

    Args:
        logits, shifted_labels: as for `cross_entropy`.
        group: the ranks that share the sequence; None is one rank.
        doc_ids: of rows with several documents in them: the number of each token's document, from 0, counted over all
            rows of the batch; below 0 for tokens of none. Sharded like the labels.
        num_docs: how many there are, on all ranks.
        average: over the labels that count, instead of their sum; 0 for a sequence without labels.

    Raises:
        ValueError: shapes that do not fit, ``doc_ids`` without ``num_docs`` or beyond it.
    """
    log_probs = token_log_probs(logits, shifted_labels, temperature=temperature, ignore_index=ignore_index)
    counts = (shifted_labels != ignore_index).to(log_probs.dtype)
    terms = torch.stack([log_probs, counts])  # one exchange for both
    if doc_ids is None:
        if num_docs is not None:
            raise ValueError("num_docs is for doc_ids: pass both, or neither")
        total, count = sum_over_ranks(terms.sum(dim=-1), group)
    else:
        docs = _checked_docs(doc_ids, shifted_labels, num_docs).flatten()
        bins = terms.new_zeros(2, (num_docs or 0) + 1)  # the last is of tokens of no document
        total, count = sum_over_ranks(bins.index_add(1, docs, terms.flatten(1)), group)[:, :-1]
    return total / count.detach().clamp(min=1) if average else total


def _checked_docs(doc_ids: Tensor, shifted_labels: Tensor, num_docs: int | None) -> Tensor:
    """Of the shape of the labels, int64; ``num_docs`` for tokens of none."""
    if num_docs is None or num_docs < 1:
        raise ValueError(f"doc_ids need num_docs, how many documents all ranks hold together; got {num_docs}")
    if doc_ids.shape not in (shifted_labels.shape, shifted_labels.shape[-1:]):
        raise ValueError(
            "doc_ids must be those of this rank's tokens, [S_local] or of the shape of the labels, "
            f"{tuple(shifted_labels.shape)}; got {tuple(doc_ids.shape)}"
        )
    if (doc_ids >= num_docs).any():
        raise ValueError(f"doc_ids must be below num_docs={num_docs}; got {int(doc_ids.max())}")
    docs = doc_ids.to(shifted_labels.device).long().expand(shifted_labels.shape)
    return torch.where(docs < 0, num_docs, docs)
