"""Models of text and images: their masks, and what a vision tower made of the images for the tokens of one rank.

Every rank holds the images whole and encodes all of them, with the model's own functions; of the features it keeps the
rows of its own image tokens. So the whole sequence's embeddings are nowhere, and the ranks' gradients of the vision
tower sum to those of one process as all others do.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import PretrainedConfig

from cpflex import Plan
from cpflex.integrations.transformers import classes
from cpflex.integrations.transformers.masks import called, documents_of, for_whole_sequence
from cpflex.masks import MaskFn

# B batch, S tokens of the whole sequence, E hidden size, N image tokens of the batch, n those of this rank

VERIFIED = frozenset(
    ("aya_vision", "cohere2_vision", "gemma3", "gemma4", "glm46v", "glm4v", "glm4v_moe", "got_ocr2", "idefics3")
    + ("internvl", "kimi_k25", "lighton_ocr", "llava", "llava_next", "llava_onevision", "mistral3", "paddleocr_vl")
    + ("qwen2_vl", "qwen2_5_vl", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe", "smolvlm", "vipllava")
)
"""Types of models of text and images whose loss and gradients, with images and without, are those of one process."""

VERIFIED_TEXT = frozenset(
    ("deepseek_v3", "gemma4_text", "glm4v_moe_text", "glm4v_text", "paddleocr_vl_text", "qwen2_vl_text")
    + ("qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text")
)
"""Types of text models that are tested inside of them; others there are those of `planning.VERIFIED`."""

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
"""Modalities, and what their encoders are given."""

TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
"""What processors say about tokens, [B, S]: not 0 where one is of an image or video."""

FEATURES = ("pooler_output", "last_hidden_state", "deepstack_features", "hidden_states", "attentions")
"""What encoders may put out: models take their features from the first that is there, and from the third."""

PREENCODED = "mm_encoder_outputs"
"""The argument by which models take what their vision tower made before."""


# -- masks


def class_of(config: PretrainedConfig) -> Any:
    """The model class of text and images that a config belongs to, or None."""
    return transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)


def has_other_heads(config: PretrainedConfig) -> bool:
    """Whether transformers has classes of the config that give no logits of next tokens."""
    mappings = (
        transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
        transformers.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    )
    return any(type(config) in mapping for mapping in mappings)


def refused(config: PretrainedConfig, verified_only: bool) -> list[str]:
    """What is wrong with a model of more than text, whatever the batch."""
    if getattr(config, "is_encoder_decoder", False) or config.get_text_config() is config:
        return []
    found = []
    if verified_only and config.model_type not in VERIFIED | classes.VERIFIED:
        found.append("a model of more than text that is not among the verified ones of docs/support-matrix.md")
    model_class = class_of(config)
    if model_class is not None and PREENCODED not in inspect.signature(model_class.forward).parameters:
        found.append(
            f"a model of more than text in transformers {transformers.__version__}, where {model_class.__name__} takes "
            f"no {PREENCODED} (5.24 does)"
        )
    return found


def token_types_for_masks(config: PretrainedConfig, token_types: Tensor | None, seq_len: int) -> Tensor | None:
    """[1 or B, S] for a model whose masks depend on them, None for others."""
    if not _types_in_masks(config):
        return None
    if token_types is None:
        return torch.zeros(1, seq_len, dtype=torch.int64)
    if token_types.ndim != 2 or token_types.shape[1] != seq_len:
        raise ValueError(f"token_type_ids must be [B, {seq_len}]; got shape {tuple(token_types.shape)}")
    return token_types.cpu()


def rows_for_masks(positions: Tensor, token_types: Tensor, has_functions: bool) -> Tensor:  # [1 or B, S] -> [B, S]
    """Positions for each row of token types.

    Raises:
        ValueError: another number of rows.
        NotImplementedError: functions of the user, or packed documents: transformers looks the images up by the
            position in the document.
    """
    if len(positions) not in (1, len(token_types)):
        raise ValueError(f"token_type_ids must have the {len(positions)} rows of the batch; got {len(token_types)}")
    if has_functions:
        raise NotImplementedError("token_type_ids are not supported with and_mask_function or or_mask_function")
    if documents_of(positions).any() and token_types.any():
        raise NotImplementedError(
            "images that are seen in both directions are not supported in packed documents; plan one document a row, "
            "with seq_len= or attention_mask="
        )
    return positions.expand(len(token_types), -1)


def span_masks(
    config: PretrainedConfig,
    token_types: Tensor,  # [B, S]
    position_ids: Tensor,  # [B, S]
    padding_mask: Tensor | None,  # bool [B, S]
    layer_types: Collection[str],
) -> dict[str, MaskFn]:
    """The masks of layer types, where images are seen in both directions, as the model's class makes them."""
    maker = class_of(config).create_masks_for_generate
    arguments = for_whole_sequence(config, position_ids, padding_mask) | {"is_first_iteration": True}
    made = called(maker, arguments | dict.fromkeys(_types_in_masks(config), token_types))
    return {layer_type: made[layer_type] if isinstance(made, Mapping) else made for layer_type in layer_types}


def _types_in_masks(config: PretrainedConfig) -> set[str]:
    """The name by which the class makes masks of token types, if it does."""
    maker = getattr(class_of(config), "create_masks_for_generate", None)
    taken = {} if maker is None else inspect.signature(maker).parameters
    return {name for name in TOKEN_TYPES if name in taken}


# -- batches


def has_pixels(batch: Mapping[str, Any]) -> bool:
    return any(batch.get(name) is not None for name in PIXELS.values())


def check_batch(batch: Mapping[str, Any], planned: Tensor | None, takes_images: bool, model: Any) -> None:
    """
    Args:
        planned: `ModelPlan.token_types`.
        takes_images: `ModelPlan.takes_images`.

    Raises:
        NotImplementedError: images for a model that is verified with text alone.
        ValueError: images without a model, or without tokens; a plan with other images in its masks.
    """
    if has_pixels(batch) and model is None:
        raise ValueError(
            "the batch holds images or videos, which the model encodes before tokens are sharded; pass the model: "
            "shard_batch(batch, plan, model)"
        )
    if has_pixels(batch) and not takes_images:
        raise NotImplementedError(
            f"images or videos are verified for {sorted(VERIFIED)}, this model with text alone; compare its loss and "
            "gradients with one process, then pass verified_only=False to plan_for"
        )
    if has_pixels(batch) and batch.get("input_ids") is None:
        raise ValueError("images or videos need input_ids, which say where they are; got inputs_embeds")
    for name in TOKEN_TYPES:
        if planned is not None and batch.get(name) is not None and not (batch[name].cpu() == planned).all():
            raise ValueError(f"{name} are not those of the plan; make it with plan_for(token_type_ids=batch[{name!r}])")


def inputs_of(batch: Mapping[str, Any], planned: Tensor | None, model: Any) -> set[str]:
    """What a batch may hold for masks, encoders and positions. Token types of text alone say nothing."""
    if not has_pixels(batch):
        types = {name: batch[name] for name in TOKEN_TYPES if batch.get(name) is not None}
        return {name for name, x in types.items() if planned is not None or not x.any()}
    taken = {name for encoder in _encoders(model).values() for name in encoder.taken}
    if (compute := _positions_function(model)) is not None:
        taken |= set(inspect.signature(compute).parameters)
    return taken | set(TOKEN_TYPES)


def encoded(
    batch: Mapping[str, Any],
    plan: Plan,
    model: Any,
) -> dict[str, Any]:
    """What the model's vision tower makes of the images of a batch, for the image tokens of this rank.

    Raises:
        ValueError: other images than image tokens.
    """
    encoders, outputs = _encoders(model), {}
    for modality in (modality for modality, name in PIXELS.items() if batch.get(name) is not None):
        encoder = encoders[modality]
        output = encoder.encode(
            **{name: batch[name] for name in encoder.taken if batch.get(name) is not None}, return_dict=True
        )
        outputs[modality] = _rows_of_rank(output, batch["input_ids"] == encoder.token_id, plan, modality)
    return {PREENCODED: outputs}


def positions_of(
    batch: Mapping[str, Any],
    model: Any,
    text_positions: Tensor,  # [1 or B, S]
    padding_mask: Tensor | None,  # bool [B, S]
) -> Tensor | None:  # [3, B, S]
    """Positions in time, height and width of each document, by the model's own function; None for a model without them.

    Raises:
        NotImplementedError: videos in packed documents.
    """
    compute = _positions_function(model)
    if compute is None:
        return None
    given = dict(batch) | {"inputs_embeds": None, "cache": None, "attention_mask": None}
    taken = inspect.signature(compute).parameters
    if padding_mask is not None:
        given["attention_mask"] = padding_mask.to(batch["input_ids"].device).long()
    elif (documents := documents_of(text_positions)).any():
        return _positions_in_documents(compute, {name: given.get(name) for name in taken}, documents)
    return compute(**{name: given.get(name) for name in taken})


def _positions_in_documents(
    compute: Callable[..., Tensor | None],
    given: Mapping[str, Any],
    documents: Tensor,  # [1 or B, S]
) -> Tensor | None:  # [3, B, S]
    """As ``compute`` gives for each document alone. It takes an image for each run of image tokens; so does this."""
    types, grids = given.get("mm_token_type_ids"), given.get("image_grid_thw")
    if types is None or grids is None or given.get("video_grid_thw") is not None:
        raise NotImplementedError(
            "in packed documents, positions are made of mm_token_type_ids and image_grid_thw alone, not of videos; "
            "pass position_ids [4, B, S]: the text's, from 0 in each document, then those of time, height and width"
        )
    rows, first = [], 0
    for row, ids in enumerate(documents.expand(types.shape).tolist()):
        lengths = [len(list(run)) for _, run in itertools.groupby(ids)]
        parts = []
        for tokens, kinds in zip(given["input_ids"][row].split(lengths), types[row].split(lengths), strict=True):
            count = sum(kind == 1 for kind, _ in itertools.groupby(kinds.tolist()))
            document = {"input_ids": tokens[None], "mm_token_type_ids": kinds[None]}
            parts.append(compute(**dict(given) | document | {"image_grid_thw": grids[first : first + count]}))
            first += count
        rows.append(torch.cat(parts, dim=-1))
    return torch.cat(rows, dim=1)


@dataclass(frozen=True)
class Encoder:
    """``get_image_features`` or ``get_video_features`` of a model, which may be wrapped."""

    encode: Callable[..., Any]
    taken: Collection[str]
    """Names of its arguments."""
    token_id: int
    """In the place of each feature."""


def _encoders(model: Any) -> dict[str, Encoder]:
    encoders, is_fsdp = {}, isinstance(model, FSDPModule)
    for modality in PIXELS:
        name = f"get_{modality}_features"
        owner = next((module for module in model.modules() if hasattr(type(module), name)), None)
        token_id = None if owner is None else getattr(owner.config, f"{modality}_token_id", None)
        if owner is None or token_id is None:
            continue
        taken = inspect.signature(getattr(type(owner), name)).parameters
        if is_fsdp and name not in vars(model):
            register_fsdp_forward_method(model, name)  # gathers parameters as forward does
        encode = getattr(model if is_fsdp else owner, name)
        encoders[modality] = Encoder(encode, taken.keys() - {"self", "kwargs"}, token_id)
    return encoders


def _positions_function(model: Any) -> Callable[..., Tensor | None] | None:
    for module in model.modules():
        if hasattr(module, "compute_3d_position_ids"):
            return module.compute_3d_position_ids
    return None


def _rows_of_rank(
    output: Any,
    is_placeholder: Tensor,  # bool [B, S]
    plan: Plan,
    modality: str,
) -> Any:
    """An encoder's output with the rows of this rank's tokens: the i-th row is of the i-th placeholder of the batch.

    Raises:
        NotImplementedError: an output of more than features.
    """
    if unknown := sorted(name for name, x in output.items() if name not in FEATURES and x is not None):
        raise NotImplementedError(f"{type(output).__name__}: the encoder's {unknown} are not known to be features")
    index = (is_placeholder.flatten().cumsum(0) - 1).view_as(is_placeholder).masked_fill(~is_placeholder, -1)
    rows = plan.shard(index, dim=1, pad_value=-1)
    rows = rows[rows >= 0]
    name = "last_hidden_state" if output.get("pooler_output") is None else "pooler_output"
    picked = {name: _picked(output[name], rows, int(is_placeholder.sum()), modality)}
    if output.get("deepstack_features") is not None:
        picked["deepstack_features"] = [
            _picked(features, rows, int(is_placeholder.sum()), modality) for features in output["deepstack_features"]
        ]
    return type(output)(**picked)


def _picked(features: Any, rows: Tensor, count: int, modality: str) -> Any:
    """``rows`` of features [images, N / images, E], or of one tensor [.., E] for each image, in the same form."""
    flat = torch.cat([x.reshape(-1, x.shape[-1]) for x in features])
    if len(flat) != count:
        raise ValueError(
            f"the batch must hold a token for each feature; got {count} {modality} tokens and {len(flat)} features"
        )
    return flat[rows][None] if isinstance(features, Tensor) else [flat[rows]]
