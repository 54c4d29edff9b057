"""Masks of a model's layers, as transformers composes them for a whole sequence, and what describes its documents."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig
from transformers.masking_utils import (
    and_masks,
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
    find_packed_sequence_indices,
    padding_mask_function,
)

from cpflex.masks import MaskFn

# B batch, S tokens of the whole sequence

COMPOSE = "cpflex-compose"
"""The attention implementation under which transformers hands over what its masks are made of."""

MAKERS: dict[str, Callable[..., Any]] = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
    "chunked_attention": create_chunked_causal_mask,
}
"""Layer types, and what transformers makes their masks with."""


HYBRID = {"hybrid": "full_attention"}
"""Layer types that attend and also mix tokens in another way, and the layer type whose mask their attention takes."""

RECURRENT = {"linear_attention": "linear_attention", "conv": "conv", "hybrid": "linear_attention"}
"""Layer types that mix tokens outside of attention, and the name under which they are told of padding."""

MIX_NOTHING = frozenset(("mlp", "moe"))
"""Layer types in which each token is by itself."""


def layer_types(config: PretrainedConfig) -> list[str]:
    """Of each layer, by the rule by which transformers chooses masks."""
    if (layer_types := getattr(config, "layer_types", None)) is not None:
        return list(layer_types)
    if getattr(config, "sliding_window", None) is not None:
        return ["sliding_attention"] * config.num_hidden_layers
    if getattr(config, "attention_chunk_size", None) is not None:
        return ["chunked_attention"] * config.num_hidden_layers
    return ["full_attention"] * config.num_hidden_layers


def attention_types(config: PretrainedConfig) -> list[str]:
    """Of each layer that attends, the layer type whose mask it takes."""
    others = MIX_NOTHING | set(RECURRENT) - set(HYBRID)
    return [HYBRID.get(layer_type, layer_type) for layer_type in layer_types(config) if layer_type not in others]


def recurrent_types(config: PretrainedConfig) -> list[str]:
    """Of each layer that mixes tokens outside of attention, the name under which it is told of padding."""
    return [RECURRENT[layer_type] for layer_type in layer_types(config) if layer_type in RECURRENT]


def compose(
    config: PretrainedConfig,
    layer_type: str,
    position_ids: Tensor,  # [1 or B, S]
    padding_mask: Tensor | None,  # bool [B, S]
    functions: Mapping[str, MaskFn | None],
    one_row: bool,
) -> MaskFn:
    """The mask of a layer type as transformers composes it for the whole sequence."""
    mask = called(MAKERS[layer_type], for_whole_sequence(config, position_ids, padding_mask) | dict(functions))
    if len(position_ids) > 1 or not one_row:
        return mask
    first = torch.zeros((), dtype=torch.int64)  # what one row holds is meant for every row
    return lambda b, h, q_idx, kv_idx: mask(first, h, q_idx, kv_idx)


def for_whole_sequence(
    config: PretrainedConfig,
    position_ids: Tensor,  # [1 or B, S]
    padding_mask: Tensor | None,  # bool [B, S]
) -> dict[str, Any]:
    """What transformers' makers of masks take, in any version."""
    config = copy.deepcopy(config)
    config._attn_implementation = COMPOSE
    sizes = torch.empty(*position_ids.shape, 0)
    return {
        "config": config,
        "inputs_embeds": sizes,
        "input_embeds": sizes,
        "attention_mask": padding_mask,
        "cache_position": torch.arange(position_ids.shape[1]),
        "past_key_values": None,  # before transformers 5.24
        "cache": None,
        "position_ids": position_ids,
    }


def called(maker: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """What a maker of masks gives, of the arguments that it takes."""
    taken = inspect.signature(maker).parameters
    required = {name for name, parameter in taken.items() if parameter.default is parameter.empty}
    required -= {name for name, parameter in taken.items() if parameter.kind is parameter.VAR_KEYWORD}
    if unknown := sorted(required - set(arguments)):
        raise NotImplementedError(
            f"{maker.__name__} of transformers {transformers.__version__} needs {unknown}, which cpflex does not know; "
            "install a release of the support matrix"
        )
    return maker(**{name: value for name, value in arguments.items() if name in taken})


def composed(mask_function: MaskFn, attention_mask: Tensor | None = None, **_: Any) -> MaskFn:
    """In the place of a mask: what it would be made of. Offsets are 0, as there is no cache."""
    if attention_mask is None:
        return mask_function
    return and_masks(mask_function, padding_mask_function(attention_mask))


# -- what describes the tokens


def positions_and_padding(described: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """position_ids int64 [1 or B, S] and padding mask bool [B, S]."""
    if len(described) != 1:
        raise ValueError(
            "the tokens are described by exactly one of seq_len, lengths, cu_seqlens, doc_ids, position_ids, "
            f"attention_mask and tree; got {sorted(described)}"
        )
    ((name, value),) = described.items()
    if name == "tree":
        return value.depths[None], None
    if name == "seq_len":
        return torch.arange(value)[None], None
    if name in ("lengths", "cu_seqlens"):
        cu_seqlens = torch.as_tensor(value).cpu().long()
        sizes = cu_seqlens if name == "lengths" else cu_seqlens.diff()
        if sizes.ndim != 1 or sizes.numel() == 0 or (sizes < 0).any() or (name == "cu_seqlens" and cu_seqlens[0] != 0):
            raise ValueError(
                f"{name} must be {'numbers of tokens' if name == 'lengths' else 'sums from 0'}; got {value}"
            )
        return torch.cat([torch.arange(int(size)) for size in sizes])[None], None
    if name == "position_ids" and isinstance(value, Tensor) and value.ndim == 3:
        value = text_positions(value)
    if not isinstance(value, Tensor) or value.ndim not in (1, 2):
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise NotImplementedError(
            f"{name} must be [B, S]; got {shape}. Write a mask of pairs as and_mask_function or or_mask_function"
        )
    rows = (value if value.ndim == 2 else value[None]).cpu()
    if name == "attention_mask":
        if not ((rows == 0) | (rows == 1)).all():
            raise NotImplementedError("attention_mask must hold 0 and 1; pass packed documents as doc_ids=")
        positions = torch.arange(rows.shape[1]).expand(rows.shape)
        return (positions, rows.bool()) if not rows.all() else (positions[:1], None)
    if name == "position_ids":
        return rows.long(), None
    starts = torch.ones_like(rows, dtype=torch.bool)
    starts[:, 1:] = rows[:, 1:] != rows[:, :-1]
    index = torch.arange(rows.shape[1]).expand(rows.shape)
    return index - torch.where(starts, index, 0).cummax(dim=1).values, None


def text_positions(
    position_ids: Tensor,  # [4, B, S]
) -> Tensor:  # [B, S]
    """Where documents begin is in the first of four rows: those of time, height and width do not tell."""
    if len(position_ids) != 4:
        raise ValueError(
            "position_ids of time, height and width, [3, B, S], do not tell documents apart; put the text's before "
            f"them, [4, B, S], or describe documents otherwise, as lengths=; got shape {tuple(position_ids.shape)}"
        )
    return position_ids[0]


def documents_of(position_ids: Tensor) -> Tensor:  # [1 or B, S] -> [1 or B, S]
    """Documents as transformers sees them in positions: a new one wherever the next position does not follow."""
    documents = find_packed_sequence_indices(position_ids)
    return torch.zeros_like(position_ids) if documents is None else documents
