"""What the class of a model says about context parallelism, before anything is made of it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any

import transformers
from torch import Tensor
from transformers import PretrainedConfig
from transformers.models.auto import modeling_auto

from cpflex.integrations.transformers.alibi import REPLACED
from cpflex.integrations.transformers.recurrent import ZEROES_PADDING
from cpflex.integrations.transformers.verified import DIFFERENT_BY_RELEASE, VERIFIED_BY_RELEASE

COUNTS_TOKENS = frozenset(("biogpt", "opt"))
"""Model types whose positions, where none are given, leave out the padding on the left; biogpt's in older releases."""


def table_of(installed: str) -> str:
    """The newest release with a table that is not newer than the one that is installed; else the oldest."""

    def numbers(release: str) -> tuple[int, ...]:
        return tuple(int(part) for part in release.split(".")[:3])

    tables = sorted(VERIFIED_BY_RELEASE, key=numbers)
    return max((table for table in tables if numbers(table) <= numbers(installed)), key=numbers, default=tables[0])


VERIFIED = VERIFIED_BY_RELEASE[table_of(transformers.__version__)]
"""Model types whose loss and gradients on several ranks are those of one process, with this release or an older one."""

DIFFERENT = DIFFERENT_BY_RELEASE[table_of(transformers.__version__)]
"""Model types whose loss or gradients are not, and why."""


def ruled_out(config: PretrainedConfig) -> str | None:
    """Why a model of this config cannot be equal to one process, as far as it can be known; None is no reason.

    Of the config: losses of more than labels. Of the class: attention that cannot be replaced, positions
    that cannot be given, layers that are recurrent. And what the table found.
    """
    for name in ("z_loss_coefficient", "router_z_loss_coef", "mtp_loss_scaling_factor"):
        if getattr(config, name, None):
            return f"a loss of more than labels ({name}={getattr(config, name)}): set it to 0"
    model_class = causal_lm_class(config)
    fills_masks = type(config) in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING
    if model_class is None:
        return "an encoder, whose attention is bidirectional" if fills_masks else None
    module = vars(sys.modules[model_class.__module__])
    may_be_encoder = fills_masks or "create_bidirectional_mask" in module
    if may_be_encoder and getattr(config, "is_decoder", None) is False:
        return "an encoder, whose attention is bidirectional: set is_decoder=True if it is used as a decoder"
    if config.model_type in REPLACED:
        return None
    return DIFFERENT.get(config.model_type) or _of_class(model_class, module)


def refuse_padding(config: PretrainedConfig, padding_mask: Tensor | None) -> None:  # bool [B, S]
    """Positions of `shard_batch` count the padding, as most models do."""
    if padding_mask is not None and config.model_type in COUNTS_TOKENS and not padding_mask[:, 0].all():
        raise NotImplementedError(
            f"{config.model_type} with padding on the left is not supported: its positions count tokens alone; "
            "pad on the right"
        )


def has_recurrent_layers(config: PretrainedConfig) -> bool:
    """Whether the class of a config knows layers that mix tokens outside of attention, or is not known."""
    model_class = causal_lm_class(config)
    return model_class is None or ZEROES_PADDING in vars(sys.modules[model_class.__module__])


def causal_lm_class(config: PretrainedConfig) -> Any:
    """The class that AutoModelForCausalLM makes of a config, if it is one of transformers."""
    known = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in known:
        return None
    found = known[type(config)]
    return found[0] if isinstance(found, tuple) else found


def _of_class(model_class: Any, module: Mapping[str, Any]) -> str | None:
    if getattr(model_class, "_is_stateful", False) and "ALL_ATTENTION_FUNCTIONS" not in module:
        return "recurrent layers, and no attention that could be replaced: each rank would begin anew"
    if "ALL_ATTENTION_FUNCTIONS" not in module:
        return "attention that its class computes by itself, which attn_implementation does not reach"
    if "position_ids" not in inspect.signature(model_class.forward).parameters:
        return "positions that it counts by itself (no position_ids): each rank would count from 0"
    return None
