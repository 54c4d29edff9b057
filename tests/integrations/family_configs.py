"""Every causal language model family of the installed transformers, made small by one recipe.

A config is made of the names of its attributes: sizes are small and odd, windows and chunks far below the length of
the sequence, nothing is dropped, each type of layer occurs. What one family alone needs is in `SPECIAL`.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cpflex.integrations.transformers import replace_attention
from cpflex.integrations.transformers.alibi import REPLACED

VOCAB = 61
WINDOW = 13
CHUNK = 24
MOST_PARAMETERS = 2_500_000

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "unpadded_vocab_size": VOCAB,
    "hidden_size": 32,
    "d_model": 32,
    "embedding_size": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "ffn_hidden_size": 48,
    "dff": 48,
    "dim_ff": 48,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "n_inner": 48,
    "intermediate_size_mlp": 48,
    "num_attention_heads": 4,
    "attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "max_seq_len": 512,
    "type_vocab_size": 2,
    "num_hidden_layers": 2,
    # windows
    "sliding_window": WINDOW,
    "sliding_window_size": WINDOW,
    "use_sliding_window": True,
    "window_size": WINDOW,
    "max_window_layers": 1,
    "local_attention": 2 * WINDOW,
    "keep_window_size": 512,
    "attention_chunk_size": CHUNK,
    # multi-head latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 12,
    "v_head_dim": 8,
    "o_lora_rank": 8,
    "o_groups": 2,
    # experts
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "moe_intermediate_size": 24,
    "expert_ffn_hidden_size": 24,
    "shared_expert_intermediate_size": 24,
    "shared_experts_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "dense_intermediate_size": 48,
    "moe_num_shared_experts": 1,
    "num_shared_experts": 1,
    "n_shared_experts": 1,
    "zero_expert_num": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": 9,
    "num_nextn_predict_layers": 0,
    "decoder_sparse_step": 1,
    "interleave_moe_layer_step": 2,
    # recurrent layers
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "mamba_d_ssm": 64,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "mamba_headdim": 8,
    "n_mamba_heads": 8,
    "ssm_state_size": 8,
    "chunk_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    # others
    "query_pre_attn_scalar": 11,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 5.0,
    "no_rope_layer_interval": 2,
    "floor_scale": 16,
    "attn_scale": 0.5,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 8,
    "num_kv_shared_layers": 0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 16,
    "use_mambapy": True,
    "rotary_dim": 4,
    "d_rel": 4,
    "rel_extent": 16,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "number_of_conv_states": 4,
    "use_bidirectional_attention": None,
    "pronunciation_vocab_size": 7,
    "pronunciation_embed_dim": 8,
    "shape_vocab_size": 7,
    "shape_embed_dim": 8,
    "concat_input": False,
    "is_decoder": True,
    "tie_word_embeddings": False,
}
"""Of every attribute of that name."""

IF_ASKED = ("q_lora_rank", "n_inner", "use_bidirectional_attention")
"""Attributes that change what a model does, left alone where a family does without them."""

NOT_DROPPED = ("dropout", "pdrop", "layerdrop", "drop_prob", "dropout_prob", "jitter_noise", "dropout_p")
"""How names of attributes end that drop or disturb something at random."""

TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWER |= {"image_size": 28, "crop_size": 28, "patch_size": 14}
"""Of images or sounds, of which there are none."""

SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "num_hidden_layers": 3},
    "cohere_compass_text": {
        "rope_parameters": {
            layer_type: {"rope_type": "default", "rope_theta": 10000.0}
            for layer_type in ("full_attention", "sliding_attention")
        },
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "num_hidden_layers": 3,
    },
    "cpmant": {"vocab_size": VOCAB, "prompt_types": 2, "prompt_length": 2, "segment_types": 2},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 2.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dory": {
        "n_input_layers": 1,
        "n_recurrent_layers": 1,
        "n_output_layers": 1,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "num_hidden_layers": 3,
    },
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1, "num_hidden_layers": 3},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_hidden_layers": 2},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "longcat_flash": {"head_dim": 4},
    "minimax": {"sliding_window": None},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "linear_attention"],
        "num_hidden_layers": 4,
    },
    "phi4_multimodal": {
        "audio_config": TOWER
        | {"ext_pw_out_channel": 16, "depthwise_separable_out_channel": 16, "nemo_conv_channels": 8, "num_blocks": 2},
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention"],
        "num_hidden_layers": 3,
        "attention_head_dim": 16,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention"], "num_hidden_layers": 3},
    "zaya": {"num_experts_per_tok": 1},
}
"""What one family needs besides."""

OWN_WEIGHTS = {"dory"}
"""Families that other weights than their own make chaotic: fp32 and fp64 then have nothing in common."""


def model_types() -> list[str]:
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def model_class_name(model_type: str) -> str:
    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]


def default_config(model_type: str) -> Any:
    return CONFIG_MAPPING[model_type]()


def config_of(model_type: str, **changes: Any) -> Any:
    """A small config in which every type of layer occurs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _small(CONFIG_MAPPING[model_type], SPECIAL.get(model_type, {}) | changes)


def _small(make: Any, special: dict[str, Any]) -> Any:
    given = _sizes(make()) | special
    many = make(**given | {"num_hidden_layers": 12} | special)
    return make(**given | _layers(many) | special)


def _sizes(default: Any) -> dict[str, Any]:
    """Values of the recipe for the attributes that a config has, and small configs for those in it."""
    sizes = {name: value for name, value in SIZES.items() if _is_given(default, name)}
    sizes |= {name: 0.0 for name in vars(default) if name.endswith(NOT_DROPPED)}
    if hasattr(default, "linear_value_head_dim") or hasattr(default, "linear_head_dim"):
        sizes["rms_norm_eps"] = 1e-2  # less multiplies the rounding of what a query recalls of an orthogonal key
    if hasattr(default, "qk_nope_head_dim"):
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
        sizes.pop("head_dim", None)
    sizes = {name: value for name, value in sizes.items() if name not in IF_ASKED or getattr(default, name) is not None}
    for name in ("text_config", "vision_config", "audio_config"):
        if isinstance(part := getattr(default, name, None), transformers.PretrainedConfig):
            of_the_part = SPECIAL.get(part.model_type, {})
            sizes[name] = _small(type(part), of_the_part) if name == "text_config" else TOWER
    return sizes


def _is_given(default: Any, name: str) -> bool:
    """Whether a config has an attribute that it does not make of others."""
    stored = default.attribute_map.get(name, name)
    return stored in vars(default) or (
        isinstance(getattr(type(default), stored, None), property) and (getattr(type(default), stored).fset is not None)
    )


def _layers(many: Any) -> dict[str, Any]:
    """The fewest layers in which each type occurs, and more than one."""
    kinds = list(dict.fromkeys(getattr(many, "layer_types", None) or ["any"]))
    kinds = (kinds + kinds[:1])[: max(3, len(kinds))] if len(kinds) > 1 else kinds * 2
    layers: dict[str, Any] = {"num_hidden_layers": len(kinds)}
    if _is_given(many, "layer_types") and getattr(many, "layer_types", None):
        layers["layer_types"] = kinds
    if isinstance(feed_forward := getattr(many, "mlp_layer_types", None), list):
        found = list(dict.fromkeys(feed_forward))
        layers["mlp_layer_types"] = [found[min(i, len(found) - 1)] for i in range(len(kinds))]
    return layers


def model_of(model_type: str, attention: str, seed: int = 0, **changes: Any) -> Any:
    """Equal weights for equal seeds, whatever the attention; larger than usual, so that attention is not flat."""
    config = config_of(model_type, **changes)
    model_class = getattr(transformers, model_class_name(model_type))
    if not isinstance(config, model_class.config_class):
        config = config.get_text_config()
    replaced = attention == "cpflex" and model_type in REPLACED
    config._attn_implementation = "eager" if replaced else attention
    if attention == "eager":  # grouped matrix products know no fp64
        config._experts_implementation = "eager"
    with contextlib.suppress(NotImplementedError), torch.device("meta"):  # some classes read what they make
        num_parameters = sum(p.numel() for p in model_class(config).parameters())
        assert num_parameters < MOST_PARAMETERS, f"the recipe gives {model_type} {num_parameters:,} parameters"
    torch.manual_seed(seed)
    model = model_class(config)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in () if model_type in OWN_WEIGHTS else model.parameters():
            noise = torch.randn(parameter.shape, generator=random)
            parameter.copy_(1 + 0.1 * noise if parameter.ndim == 1 else 0.15 * noise)
    return (replace_attention(model) if replaced else model).train()
