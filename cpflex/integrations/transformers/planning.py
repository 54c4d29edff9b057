"""plan_for: one plan for all kinds of layers of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig

from cpflex import Layout, Plan, balanced, make_plan
from cpflex.integrations.transformers import multimodal, on_trees
from cpflex.integrations.transformers.alibi import Alibi, alibi_of
from cpflex.integrations.transformers.attention import PlanMask
from cpflex.integrations.transformers.classes import VERIFIED, has_recurrent_layers, refuse_padding, ruled_out
from cpflex.integrations.transformers.masks import (
    MAKERS,
    attention_types,
    compose,
    positions_and_padding,
    recurrent_types,
)
from cpflex.integrations.transformers.recurrent import HYBRIDS, RecurrentMask, hands_out_masks, summary_numbers
from cpflex.links.processes import Group
from cpflex.masks import MaskFn
from cpflex.trees import Tree

# B batch, S tokens of the whole sequence


@dataclass(frozen=True)
class ModelPlan:
    """What `plan_for` decided about one batch of a model. Pickles like a `cpflex.Plan`."""

    plan: Plan
    position_ids: Tensor
    """Of the whole sequence, int64 [1 or B, S], from 0 in each document, or along each path of a tree."""
    padding_mask: Tensor | None
    """False at padding, bool [B, S]."""
    windows: Mapping[str, int | None]
    """The layer types of the model, and their sliding windows."""
    per_layer_type: bool
    """Whether the model takes a dict of masks."""
    rope_limits: tuple[tuple[str, int], ...]
    """RoPE that depends on the longest position: its type, and the length up to which it does not."""
    softcap: float | None = None
    """Of the scores of all layers."""
    token_types: Tensor | None = None
    """Of a model that sees the tokens of an image in both directions: what its masks were made of, [1 or B, S]."""
    recurrent: tuple[str, ...] = ()
    """Layer types that mix tokens outside of attention."""
    takes_images: bool = True
    """Whether the model is verified with images, or taken on the user's account."""
    may_have_other_head: bool = True
    """Whether a model of this config may be another than a language model."""
    alibi: Alibi | None = None
    """Added to the scores of all layers."""
    tree: Tree | None = None
    """What the tokens are, if not documents one after the other."""

    def __getitem__(self, layer_type: str) -> PlanMask:
        positions = None if self.tree is None else self.position_ids
        window = self.windows[layer_type]
        return PlanMask(self.plan[layer_type], layer_type, window, self.softcap, self.alibi, positions)

    @property
    def attention_mask(self) -> PlanMask | dict[str, PlanMask | RecurrentMask]:
        """What the model takes as its ``attention_mask``."""
        masks: dict[str, Any] = {layer_type: self[layer_type] for layer_type in self.windows}
        if self.recurrent:
            masks |= dict.fromkeys(self.recurrent, self.recurrent_mask)
        return masks if self.per_layer_type else next(iter(masks.values()))

    @property
    def recurrent_mask(self) -> RecurrentMask:
        """Of the layers that mix tokens outside of attention."""
        return RecurrentMask(self.plan, self.position_ids, self.padding_mask)

    def explain(self) -> str:
        """The plan in words, and what layers that mix tokens outside of attention cost beside it."""
        if not self.recurrent:
            return self.plan.explain()
        title = f"{', '.join(self.recurrent)}: outside of attention, as chosen with attach_recurrent"
        return "\n".join([self.plan.explain(), "", title, self.recurrent_mask.explain()])

    def bind(self, group: Group | None) -> ModelPlan:
        """This plan on a group, where it was made with ``rank=`` and ``world_size=``."""
        return replace(self, plan=self.plan.bind(group))


@torch.inference_mode(False)
def plan_for(
    config: PretrainedConfig,
    group: Group | None = None,
    *,
    seq_len: int | None = None,
    lengths: Sequence[int] | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,  # integers [num_docs + 1]
    doc_ids: Tensor | None = None,  # integers [S] or [B, S]
    position_ids: Tensor | None = None,  # integers [S], [B, S] or [4, B, S]
    attention_mask: Tensor | None = None,  # [B, S] of 0 and 1
    tree: Tree | None = None,
    and_mask_function: MaskFn | None = None,
    or_mask_function: MaskFn | None = None,
    token_type_ids: Tensor | None = None,  # integers [B, S]
    batch_size: int = 1,
    verified_only: bool = True,
    **options: Any,
) -> ModelPlan:
    """Plan a batch for all kinds of layers of a model, weighted by how many there are. Pure: never communicates.

    Exactly one of ``seq_len`` ... ``tree`` describes the tokens, whole, on every rank.

    Args:
        config: of the model.
        group: the ranks that share the sequence; None is one rank. ``rank=`` and ``world_size=`` work as for
            `cpflex.make_plan`.
        seq_len: one document.
        lengths: of packed documents, alike in every row of the batch; their sum is the sequence.
        cu_seqlens: the same as running sums, from 0.
        doc_ids: packed documents that may differ from row to row, each a run of equal numbers; padding is a document.
        position_ids: packed documents, each where positions begin anew, as ``DataCollatorWithFlattening`` makes them.
            With rows for time, height and width, those of the text come first.
        attention_mask: 1 at tokens and 0 at padding, left or right.
        tree: sequences that share prefixes, as `cpflex.trees.pack` stores them; with ``position_ids`` if those of its
            paths do not begin at 0. Labels are those of the packed tree, and no argument of the model.
        and_mask_function, or_mask_function: ``(batch_idx, head_idx, q_idx, kv_idx) -> bool Tensor``, joined to the
            model's masks as transformers' ``create_causal_mask`` joins them; pointwise.
        token_type_ids: ``token_type_ids`` or ``mm_token_type_ids`` of the processor, for models that see the tokens of
            an image in both directions; others ignore it.
        batch_size: rows of the batch, for these functions.
        verified_only: refuse model types that are not in `VERIFIED`. Other models may mix tokens outside of attention,
            or count the local tokens, and be silently wrong: compare losses with one process before trusting them.
        options: of `cpflex.make_plan`: ``layout``, ``schedule``, ``num_heads``, ...

    Raises:
        NotImplementedError: what this model needs and cannot get; the message names it.
        ValueError: arguments that do not fit each other.
    """
    text_config = _supported(config, verified_only)
    described = {
        "seq_len": seq_len,
        "lengths": lengths,
        "cu_seqlens": cu_seqlens,
        "doc_ids": doc_ids,
        "position_ids": position_ids,
        "attention_mask": attention_mask,
    }
    functions = {"and_mask_function": and_mask_function, "or_mask_function": or_mask_function}
    if tree is not None:
        on_trees.refuse_to_plan(tree, config, functions, token_type_ids)
        described |= {"tree": tree, "position_ids": None}
    positions, padding_mask = positions_and_padding({name: x for name, x in described.items() if x is not None})
    refuse_padding(text_config, padding_mask)
    has_functions = any(function is not None for function in functions.values())
    if has_functions and len(positions) not in (1, batch_size):
        raise ValueError(f"batch_size must be the {len(positions)} rows of the batch; got {batch_size}")
    if has_functions:
        positions = positions.expand(batch_size, -1)
    alibi = alibi_of(text_config, positions, padding_mask, is_tree=tree is not None)
    kinds = Counter(attention_types(text_config))
    token_types = multimodal.token_types_for_masks(config, token_type_ids, positions.shape[1])
    if tree is not None:
        masks = on_trees.masks_on(tree, text_config, sorted(kinds))
    elif token_types is not None and token_type_ids is not None:
        positions = multimodal.rows_for_masks(positions, token_types, has_functions)
        masks = multimodal.span_masks(config, token_types, positions, padding_mask, sorted(kinds))
    else:
        masks = {
            kind: compose(text_config, kind, positions, padding_mask, functions, one_row=not has_functions)
            for kind in sorted(kinds)
        }
    options = {"layout": _layout(text_config)} | options
    plan = make_plan(masks, positions.shape[1], group, weights=kinds, batch_size=len(positions), **options)
    return ModelPlan(
        plan,
        positions if tree is None else on_trees.positions_on(tree, position_ids),
        padding_mask,
        windows={kind: text_config.sliding_window if kind == "sliding_attention" else None for kind in masks},
        per_layer_type=getattr(text_config, "layer_types", None) is not None,
        rope_limits=tuple(_rope_limits(text_config)),
        softcap=getattr(text_config, "attn_logit_softcapping", None),
        token_types=token_types,
        recurrent=tuple(sorted(set(recurrent_types(text_config)))),
        takes_images=not verified_only or config.model_type in multimodal.VERIFIED,
        may_have_other_head=text_config is config or multimodal.has_other_heads(config),
        alibi=alibi,
        tree=tree,
    )


def _supported(config: PretrainedConfig, verified_only: bool) -> PretrainedConfig:
    """The text config.

    Raises:
        NotImplementedError: the first thing in it that cannot be honoured.
    """
    several = getattr(config, "is_encoder_decoder", False)  # it may have two text configs
    text_config = config if several else config.get_text_config()
    refused = {"an encoder and a decoder (is_encoder_decoder)": several}
    refused |= dict.fromkeys(multimodal.refused(config, verified_only), True)
    refused |= {
        "bidirectional attention": any(
            getattr(part, "use_bidirectional_attention", False) not in (None, False, "vision")
            or not getattr(part, "is_causal", True)
            for part in (config, text_config)
        ),
        "the load balancing loss of experts (output_router_logits)": any(
            getattr(part, "output_router_logits", False) for part in (config, text_config)
        ),
    }
    refused |= {f"layers of type {kind!r}": kind not in MAKERS for kind in attention_types(text_config)}
    if text_config.model_type in HYBRIDS or recurrent_types(text_config):
        older = f"layers that mix tokens outside of attention, before transformers 5 ({transformers.__version__})"
        refused[older] = not hands_out_masks()
        refused["a model without attention"] = not attention_types(text_config)
        foreign = not has_recurrent_layers(text_config)
        refused |= {f"layers of type {kind!r}": foreign for kind in recurrent_types(text_config)}
    if reason := ruled_out(text_config):
        refused[reason] = True
    if found := [name for name, is_found in refused.items() if is_found]:
        raise NotImplementedError(f"{config.model_type}: not supported with context parallelism: {', '.join(found)}")
    verified = VERIFIED | HYBRIDS | (frozenset() if text_config is config else multimodal.VERIFIED_TEXT)
    if verified_only and config.model_type not in VERIFIED and text_config.model_type not in verified:
        raise NotImplementedError(
            f"model type {text_config.model_type!r} is not among the {len(verified)} verified ones of "
            "docs/support-matrix.md; compare its loss and gradients with one process, then pass verified_only=False"
        )
    return text_config


def _layout(config: PretrainedConfig) -> Callable[..., Layout]:
    """`balanced`; beside recurrent layers it counts what their summaries take to be received."""
    if not (numbers := summary_numbers(config)):
        return balanced
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # numbers in fp32, beside a key and a value in 16 bits
    return partial(balanced, fragment_cost=numbers / (num_heads * head_dim))


def _rope_limits(config: PretrainedConfig) -> list[tuple[str, int]]:
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    limits = []
    for one in (parameters, *parameters.values()):
        rope_type = (one.get("rope_type") or one.get("type") or "") if isinstance(one, Mapping) else ""
        if "dynamic" in rope_type:
            limits.append((rope_type, config.max_position_embeddings))
        elif rope_type == "longrope":
            original = one.get("original_max_position_embeddings")
            original = original or getattr(config, "original_max_position_embeddings", None)
            limits.append((rope_type, original or config.max_position_embeddings))
    return limits
