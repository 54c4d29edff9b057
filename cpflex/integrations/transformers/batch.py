"""shard_batch: a rank's part of a batch, as arguments of the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cpflex.integrations.transformers import multimodal, on_trees
from cpflex.integrations.transformers.attention import ALL_LOGITS
from cpflex.integrations.transformers.flash import without_flash_keywords
from cpflex.integrations.transformers.heads import (
    LANGUAGE_MODELS,
    POOLING,
    WHOLE,
    head_of,
    see_whole_sequence,
)
from cpflex.integrations.transformers.masks import documents_of, text_positions
from cpflex.integrations.transformers.planning import ModelPlan
from cpflex.loss import IGNORE_INDEX, shift_labels

# B batch, S tokens of the whole sequence, E hidden size

NEXT_TOKEN = ("labels", "shift_labels")
LABELS: dict[str | None, tuple[str, ...]] = {**dict.fromkeys(LANGUAGE_MODELS, NEXT_TOKEN), **WHOLE}
"""What heads take besides the tokens."""


def shard_batch(batch: Mapping[str, Any], plan: ModelPlan, model: Any = None) -> dict[str, Any]:
    """This rank's part of a batch that every rank holds whole: ``model(**shard_batch(batch, plan))``.

    ``labels`` are shifted before they are sharded; the last token of each document predicts nothing, nor does padding
    (in one process the last padding on the left would predict the first token). The loss that the model computes is
    this rank's share of the mean over all labels of the batch: the ranks' losses sum to the loss of one process, and so
    do their gradients. A rank without labels has the loss 0, with a graph. DDP and FSDP average gradients over their
    ranks: multiply the loss by their number. With data parallelism or gradient accumulation, give
    ``num_items_in_batch``, the labels of all batches that are summed.

    That is for a language model, which shifts labels; any other refuses the result. Give the model, and what its head
    needs is done: those for classes of tokens or sequences, rewards and answers see the whole sequence, from scores
    that are gathered in order (`cpflex.integrations.transformers.heads`). Their loss is a share as well, and their
    logits are those of one process, on every rank.

    A tree (``plan_for(tree=...)``) is a batch without labels: `cpflex.trees` knows what its tokens predict.

    Args:
        batch: ``input_ids`` [B, S] or ``inputs_embeds`` [B, S, E]; optionally ``labels`` [B, S] not shifted, or
            ``shift_labels``; ``position_ids``, also [3 or 4, B, S]; ``num_items_in_batch``; ``attention_mask``, that of
            the plan; what the processor made of images and videos, for all of them. Keywords of flash attention that
            tell of packed documents, ``cu_seq_lens_q`` and its like, must tell of the plan's. For other heads what they
            take.
        model: that will be called, wrapped or not. It gets hooks if its head sees the whole sequence, and encodes
            images and videos here; with FSDP, together with the other ranks. None is a language model without images.

    Raises:
        NotImplementedError: the model has another head.
        ValueError: what does not fit the plan, or nothing knows how to shard; on every rank.
        RankMismatch: the ranks of the sequence hold different tokens or labels (`Plan.require_same`).
    """
    try:
        local = _sharded(batch, plan, model)
    except Exception as error:
        plan.plan.refuse(error)
        raise
    compared = ("input_ids", "labels", "shift_labels", "start_positions", "end_positions", *multimodal.PIXELS.values())
    plan.plan.require_same(**{name: batch[name] for name in compared if batch.get(name) is not None})
    return local | (multimodal.encoded(batch, plan.plan, model) if multimodal.has_pixels(batch) else {})


def _sharded(batch: Mapping[str, Any], plan: ModelPlan, model: Any) -> dict[str, Any]:
    batch = without_flash_keywords(batch)
    head = "ForCausalLM" if model is None else head_of(model)
    if plan.tree is not None:
        on_trees.refuse_to_shard(batch, head)
    known = {"input_ids", "inputs_embeds", "position_ids", "num_items_in_batch", *LABELS.get(head, ())}
    multimodal.check_batch(batch, plan.token_types, plan.takes_images, model)
    known |= multimodal.inputs_of(batch, plan.token_types, model)
    if unknown := sorted(set(batch) - known - {"attention_mask"}):
        if "logits_to_keep" in unknown:
            raise NotImplementedError("logits_to_keep would keep the last tokens of each rank; leave it out")
        raise ValueError(f"shard_batch knows {sorted(known)}; got {unknown}: shard them with plan.plan.shard(x, dim)")
    _check_padding(batch.get("attention_mask"), plan)
    tokens = {name: batch[name] for name in ("input_ids", "inputs_embeds") if batch.get(name) is not None}
    if len(tokens) != 1:
        raise ValueError(f"batch must hold exactly one of input_ids and inputs_embeds; got {sorted(batch)}")
    ((name, whole),) = tokens.items()
    positions = batch.get("position_ids")
    if positions is None and multimodal.has_pixels(batch):
        positions = multimodal.positions_of(batch, model, plan.position_ids, plan.padding_mask)
    positions = _checked_positions(positions, plan).to(whole.device)
    _check_rope(positions, plan)
    local: dict[str, Any] = {
        name: plan.plan.shard(whole, dim=1, pad_value=0),
        "position_ids": plan.plan.shard(positions, dim=-1, pad_value=0),
        "attention_mask": plan.attention_mask,
        "use_cache": False,
    }
    if head in WHOLE:
        _check_one_result(head, plan)
        see_whole_sequence(model)
        return local | {key: x for key, x in batch.items() if key in {name, "num_items_in_batch", *LABELS[head]}}
    if model is None and plan.may_have_other_head:
        local["logits_to_keep"] = ALL_LOGITS
    return local | _local_labels(batch, plan)


def _check_one_result(head: str, plan: ModelPlan) -> None:
    if head in POOLING and documents_of(plan.position_ids).any():
        raise NotImplementedError(
            f"a model {head} has one result for each row of the batch, also where several documents are packed in it; "
            "give each document a row of its own, with padding"
        )


def _local_labels(batch: Mapping[str, Any], plan: ModelPlan) -> dict[str, Any]:
    """This rank's labels of next tokens, and how many there are on all ranks."""
    labels = batch.get("shift_labels")
    if labels is None and batch.get("labels") is not None:
        labels = shifted(batch["labels"], plan.position_ids, plan.padding_mask)
    if labels is None:
        return {}
    count = batch.get("num_items_in_batch")
    local_labels = plan.plan.shard(labels, dim=1, pad_value=IGNORE_INDEX)
    return {
        "labels": local_labels,
        "shift_labels": local_labels,
        "num_items_in_batch": (labels != IGNORE_INDEX).sum().clamp(min=1) if count is None else count,
    }


def shifted(
    labels: Tensor,  # [B, S]
    position_ids: Tensor | None,  # [1 or B, S]
    padding_mask: Tensor | None,  # [B, S], 0 at padding
) -> Tensor:  # [B, S]
    """Labels of a whole batch, one to the left. Nothing is predicted across documents, by padding or of padding."""
    if labels.ndim != 2:
        raise ValueError(
            f"labels of a language model must be [B, S]; got shape {tuple(labels.shape)} - for another head pass the "
            "model: shard_batch(batch, plan, model)"
        )
    documents = None
    if position_ids is not None:
        documents = documents_of(position_ids).to(labels.device).expand(labels.shape)
    if padding_mask is None:
        return shift_labels(labels, doc_ids=documents)
    padding = padding_mask.to(labels.device) == 0
    labels = labels.masked_fill(padding, IGNORE_INDEX)
    return shift_labels(labels, doc_ids=documents).masked_fill(padding, IGNORE_INDEX)


def _checked_positions(position_ids: Tensor | None, plan: ModelPlan) -> Tensor:
    """The positions that the model shall see, [1 or B, S], or [3 or 4, 1 or B, S]."""
    if position_ids is None:
        return plan.position_ids
    if plan.tree is not None:
        if not torch.equal(on_trees.positions_on(plan.tree, position_ids), plan.position_ids):
            raise ValueError(
                "position_ids begin elsewhere than the plan's; make it with plan_for(tree=, position_ids=)"
            )
        return plan.position_ids
    if position_ids.ndim == 3 and position_ids.shape[-1] == plan.plan.seq_len:
        if len(position_ids) != 3:
            _checked_positions(text_positions(position_ids), plan)
        return position_ids
    rows = position_ids if position_ids.ndim == 2 else position_ids[None]
    planned = documents_of(plan.position_ids)
    if rows.ndim != 2 or rows.shape[1] != plan.plan.seq_len:
        raise ValueError(f"position_ids must be [B, {plan.plan.seq_len}]; got shape {tuple(position_ids.shape)}")
    if plan.padding_mask is None and not (documents_of(rows.cpu()) == planned).all():
        raise ValueError("position_ids pack other documents than the plan; make it with plan_for(position_ids=...)")
    return rows


def _check_rope(position_ids: Tensor, plan: ModelPlan) -> None:
    """Each rank's RoPE looks at the longest of its own positions: all must come to the same frequencies."""
    layout = plan.plan.layout
    for rope_type, limit in plan.rope_limits:
        longest = []
        for rank in range(layout.world_size):
            held = torch.from_numpy(layout.positions(rank))
            held = held[held < layout.seq_len].to(position_ids.device)
            longest.append(int(position_ids[..., held].max()) + 1 if len(held) else 1)
        seen = {length > limit if rope_type == "longrope" else max(length, limit) for length in longest}
        if len(seen) > 1:
            raise NotImplementedError(
                f"{rope_type} RoPE is not supported when the longest document, of {max(longest)} tokens, is longer "
                f"than {limit}: its frequencies depend on the longest position, and each rank would use its own; "
                "pass shorter documents, or a config with another rope_type, for instance yarn"
            )


def _check_padding(attention_mask: object, plan: ModelPlan) -> None:
    if attention_mask is None:
        return
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        raise NotImplementedError("attention_mask must be [B, S]; the plan is made of it: plan_for(attention_mask=...)")
    planned = torch.tensor(True) if plan.padding_mask is None else plan.padding_mask
    if not (attention_mask.cpu().bool() == planned).all():
        raise ValueError("attention_mask is not that of the plan; make it with plan_for(attention_mask=...)")
