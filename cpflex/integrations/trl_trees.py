"""Batches of TRL whose rows begin alike, as completions of one prompt do: as trees, while a model is called.

TRL calls a model with rows of prompts and completions, and takes log-probabilities and entropies of labelled tokens,
[B, S - 1]. Those are computed of one tree of all rows, and put where TRL expects them: what it makes of them, whatever
the loss, is its own code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from trl.trainer.utils import FusedCausalLMOutput

from cpflex.integrations.transformers import ModelPlan, plan_for, shard_batch
from cpflex.integrations.transformers.alibi import REPLACED
from cpflex.integrations.transformers.classes import COUNTS_TOKENS
from cpflex.integrations.transformers.masks import recurrent_types
from cpflex.links.processes import Group
from cpflex.loss import IGNORE_INDEX, sum_over_ranks
from cpflex.trees import PackedTree, TreeShard, pack_sequences

# B rows of the batch, S their tokens with padding; N terms of the tree, labelled tokens of all rows; of a rank S_local
# tokens, N_local terms, E predictions

ROTARY = ("rope_parameters", "rope_theta", "rotary_dim")
"""What configs have whose models see how far tokens are apart, and not where they are."""


@dataclass(frozen=True, eq=False)
class TreeCall:
    """A call of a model with a batch, as one with a tree."""

    packed: PackedTree
    plan: ModelPlan
    shard: TreeShard
    group: Group | None
    is_term: Tensor
    """Where TRL expects a number, bool [B, S - 1]: row by row, in the order of the terms."""

    def arguments(self, model: Any) -> dict[str, Any]:
        """For this rank's tokens; the head is called with the predictions in their place, see `predicting`."""
        device = self.is_term.device
        local = shard_batch({"input_ids": self.packed.tokens[None].to(device)}, self.plan, model)
        targets = self.shard.targets if len(self.shard.targets) else torch.tensor([IGNORE_INDEX], device=device)
        return local | {"shift_labels": targets[None], "fused_lm_head": True}

    def predicting(
        self,
        hidden: Tensor,  # [1, S_local, C]
    ) -> Tensor:  # [1, E, C], one if there is none
        """The hidden states that predict: several times those of a token with several continuations."""
        predictors = self.shard.predictors
        return hidden.index_select(1, predictors if len(predictors) else predictors.new_zeros(1))

    def gathered(self, outputs: FusedCausalLMOutput, names: tuple[str, ...]) -> Any:
        """What the head gave for each prediction, [1, E], for the rows of the batch, [B, S - 1]. Differentiable: as
        each rank goes on to compute the same loss, whose gradients are averaged over the ranks, that of a number counts
        once for each of them.
        """
        local = {name: x for name in names if (x := getattr(outputs, name)) is not None}
        numbers = torch.stack([x[0].to(torch.promote_types(x.dtype, torch.float32)) for x in local.values()])
        terms = numbers.index_select(1, self.shard.predictions)
        if terms.requires_grad:
            terms.register_hook(lambda grad: grad * self.plan.plan.world_size)
        whole = terms.new_zeros(len(local), self.packed.num_terms).index_copy(1, self.shard.term_idx, terms)
        whole = sum_over_ranks(whole, self.group)
        rows = whole.new_zeros(len(local), *self.is_term.shape)
        rows = rows.masked_scatter(self.is_term.expand_as(rows), whole)
        fields = {name: x.clone().to(local[name].dtype) for name, x in zip(local, rows, strict=True)}
        return FusedCausalLMOutput(**fields)


def tree_call(
    call: Mapping[str, Any], config: PretrainedConfig, group: Group | None, options: Mapping[str, Any]
) -> TreeCall | None:
    """The call with a tree, if rows begin alike and it says the same as they do one by one; else None.

    Args:
        call: the arguments of the model.
        options: of `plan_for`.
    """
    given = {name for name, x in call.items() if x is not None}
    labels, mask = call.get("labels"), call.get("attention_mask")
    asked = {"input_ids", "attention_mask", "labels", "fused_lm_head", "use_cache"}
    if not call.get("fused_lm_head") or labels is None or mask is None or given - asked:
        return None
    mask, is_term = mask.bool().cpu(), (labels[:, 1:] != IGNORE_INDEX)
    padding = mask.long().argmax(dim=1)  # on the left
    if not _is_supported(config, options, mask, padding) or not _are_labelled_behind(labels.cpu(), mask, padding):
        return None
    rows = zip(call["input_ids"].cpu(), labels.cpu(), mask, strict=True)
    sequences, learned = zip(*((ids[here], said[here] != IGNORE_INDEX) for ids, said, here in rows), strict=True)
    packed = pack_sequences(sequences, learned=learned)
    if packed.seq_len == int(mask.sum()):
        return None
    positions = packed.position_ids + (padding[0] if padding.unique().numel() == 1 else 0)
    plan = plan_for(config, group, tree=packed.tree, position_ids=positions, **options)
    if any(limit < mask.shape[1] for _, limit in plan.rope_limits):  # the longest row counts, with its padding
        return None
    shard = packed.shard(plan.plan).to(labels.device)
    return TreeCall(packed, plan, shard, group, is_term)


def _is_supported(config: PretrainedConfig, options: Mapping[str, Any], mask: Tensor, padding: Tensor) -> bool:
    """Whether a tree says what the rows say: of text, to a model that does not see the padding before them."""
    text_config = config.get_text_config()
    if text_config is not config or recurrent_types(config) or {"and_mask_function", "or_mask_function"} & set(options):
        return False
    if config.model_type in COUNTS_TOKENS and padding.any():
        return False
    if (padding == padding[0]).all():
        return True
    sees_distances = any(getattr(config, name, None) for name in ROTARY) or config.model_type in REPLACED
    return sees_distances and not getattr(config, "attn_temperature_tuning", False)


def _are_labelled_behind(labels: Tensor, mask: Tensor, padding: Tensor) -> bool:
    """Whether each row is one run of tokens, of which the first has no label."""
    first = torch.arange(len(mask)), padding
    runs = mask.diff(dim=1, prepend=mask.new_zeros(len(mask), 1)).sum(dim=1)  # changes: in, and out if padded behind
    is_run = mask[first] & (runs == 1 + (~mask[:, -1]).long())
    return bool(is_run.all() and (labels[first] == IGNORE_INDEX).all() and (labels == IGNORE_INDEX)[~mask].all())
