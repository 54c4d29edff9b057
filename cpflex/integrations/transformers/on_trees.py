"""Sequences that share prefixes, stored once as a tree: the masks of a model's layers by depth, and what is refused.

A model sees the tokens of a path as it sees those of a sequence that is alone: windows and chunks count along the path,
positions are depths. What mixes tokens in the order in which they are stored cannot be exact, and is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from cpflex import document, sliding_window, tree
from cpflex.integrations.transformers import classes, multimodal
from cpflex.integrations.transformers.heads import WHOLE
from cpflex.integrations.transformers.masks import recurrent_types
from cpflex.masks import MaskMod
from cpflex.trees import Tree

# S tokens of the tree


def masks_on(found: Tree, config: PretrainedConfig, layer_types: Collection[str]) -> dict[str, MaskMod]:
    """The mask of each layer type, which along each path is the one that transformers makes for a sequence alone."""
    path, depths = tree(found), found.depths
    masks = {}
    for layer_type in layer_types:
        masks[layer_type] = path
        if layer_type == "sliding_attention":
            masks[layer_type] = path & sliding_window(config.sliding_window, positions=depths)
        if layer_type == "chunked_attention":
            masks[layer_type] = path & document(depths // config.attention_chunk_size)
    return masks


def positions_on(found: Tree, position_ids: Tensor | None) -> Tensor:  # integers [S] or [1, S] -> int64 [1, S]
    """Depths; or the positions that were given, where a path need not begin at 0.

    Raises:
        ValueError: positions that do not count on along each path.
        NotImplementedError: positions of time, height and width.
    """
    depths = found.depths[None]
    if position_ids is None:
        return depths
    if position_ids.ndim == 3:
        raise NotImplementedError("positions of time, height and width are not supported on a tree: it holds text")
    rows = position_ids.reshape(1, -1).cpu().long() if position_ids.ndim < 2 else position_ids.cpu().long()
    begins = rows[:, found.starts[found.roots]] if rows.shape == depths.shape else rows
    if rows.shape != depths.shape or not (rows - begins == depths).all():
        raise ValueError(
            f"on a tree position_ids must be [1, {found.num_tokens}], counting on along each path as depths do; got "
            f"shape {tuple(position_ids.shape)}: pass tree.depths, or leave them out"
        )
    return rows


def refuse_to_plan(
    found: Any, config: PretrainedConfig, functions: Mapping[str, Any], token_type_ids: Tensor | None
) -> None:
    """Raise what cannot be exact.

    Raises:
        ValueError: no `Tree`.
        NotImplementedError: layers that mix tokens outside of attention; models of more than text that were not
            compared on trees; functions of pairs; images.
    """
    if not isinstance(found, Tree):
        raise ValueError(f"tree must be a cpflex.trees.Tree, as packed.tree is; got {type(found).__name__}")
    if kinds := sorted(set(recurrent_types(config.get_text_config()))):
        raise NotImplementedError(
            f"{config.model_type}: layers that mix tokens outside of attention, {kinds}, are not supported on a tree: "
            "to them the token before is the one that is stored before, of a sibling; pass a document for each "
            "sequence, as lengths="
        )
    if config.get_text_config() is not config and config.model_type not in classes.VERIFIED:
        raise NotImplementedError(
            f"{config.model_type}: a model of more than text, whose positions may have three dimensions, is not "
            "supported on a tree; pass a document for each sequence, as lengths="
        )
    if given := sorted(name for name, function in functions.items() if function is not None):
        raise NotImplementedError(f"{given} are not supported on a tree: transformers knows no depths")
    if token_type_ids is not None and token_type_ids.any():
        raise NotImplementedError("images are not supported on a tree, and token_type_ids tell of some")


def refuse_to_shard(batch: Mapping[str, Any], head: str | None) -> None:
    """Raise what a batch of a tree cannot hold: labels of tokens, images, a head that sees the whole sequence."""
    if multimodal.has_pixels(batch) or any(
        batch.get(name) is not None and batch[name].any() for name in multimodal.TOKEN_TYPES
    ):
        raise NotImplementedError("images are not supported on a tree: it holds text")
    if head in WHOLE:
        raise NotImplementedError(
            f"a model {head} is not supported on a tree: it would see the sequence that is stored, and not the paths"
        )
    if batch.get("labels") is not None:
        raise NotImplementedError(
            "labels are not supported on a tree, where a token with several continuations predicts all of them; leave "
            "them out, and compute the loss of packed.shard(plan.plan).log_probs(logits), see cpflex.trees"
        )
