"""Small models of the architectures of transformers: unmodified classes, random weights, odd sizes.

Windows, chunks and RoPE limits are far below the sequence lengths of the tests, so that each of them matters.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn

VOCAB = 61
WINDOW = 13
CHUNK = 24
HEADS = {"vocab_size": VOCAB, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
SMALL = HEADS | {"intermediate_size": 48, "max_position_embeddings": 512, "attention_dropout": 0.0}
SMALL |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
HYBRID = ["sliding_attention", "full_attention", "sliding_attention"]


@dataclass(frozen=True)
class Architecture:
    """A model class of transformers, and what is special about it."""

    prefix: str
    """Of the names of its classes: ``{prefix}Config`` and ``{prefix}ForCausalLM``."""
    num_layers: int = 2
    special: Mapping[str, Any] = field(default_factory=dict)
    features: tuple[str, ...] = ()
    config_name: str = ""

    def config(self, **changes: Any) -> Any:
        make = getattr(transformers, self.config_name or f"{self.prefix}Config")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make(**SMALL | {"num_hidden_layers": self.num_layers} | dict(self.special) | changes)

    def model(self, attention: str, seed: int = 0, **changes: Any) -> nn.Module:
        """Equal weights for equal seeds, whatever the attention; larger than usual, so that attention is not flat."""
        config = self.config(**changes)
        config._attn_implementation = attention
        torch.manual_seed(seed)
        model = getattr(transformers, f"{self.prefix}ForCausalLM")(config)
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=random)
                parameter.copy_(1 + 0.1 * noise if parameter.ndim == 1 else 0.15 * noise)
        return model.train()


ARCHITECTURES = {
    "llama": Architecture("Llama"),
    "mistral": Architecture("Mistral", special={"sliding_window": WINDOW}, features=("window",)),
    "qwen2": Architecture(
        "Qwen2",
        3,
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        ("window in some layers",),
    ),
    "qwen3": Architecture("Qwen3", features=("normalised q and k",)),
    "gemma2": Architecture(
        "Gemma2",
        3,
        {
            "sliding_window": WINDOW,
            "layer_types": HYBRID,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0,
            "query_pre_attn_scalar": 11,
        },
        ("window in some layers", "softcap", "scaling of its own"),
    ),
    "gemma3_text": Architecture(
        "Gemma3",
        3,
        {"sliding_window": WINDOW, "layer_types": HYBRID, "query_pre_attn_scalar": 11},
        ("window in some layers", "RoPE per kind of layer", "normalised q and k"),
        config_name="Gemma3TextConfig",
    ),
    "gpt_oss": Architecture(
        "GptOss",
        2,
        EXPERTS | {"sliding_window": WINDOW, "layer_types": HYBRID[:2], "initial_context_length": 32},
        ("window in some layers", "sinks", "experts"),
    ),
    "llama4_text": Architecture(
        "Llama4",
        4,
        EXPERTS
        | {
            "intermediate_size_mlp": 48,
            "attention_chunk_size": CHUNK,
            "interleave_moe_layer_step": 2,
            "no_rope_layers": [1, 0, 1, 0],
            "layer_types": ["chunked_attention", "full_attention"] * 2,
            "floor_scale": 16,
            "attn_scale": 0.5,
            "attn_temperature_tuning": True,
        },
        ("chunked attention", "layers without RoPE", "temperature by position", "experts"),
        config_name="Llama4TextConfig",
    ),
    "cohere2": Architecture(
        "Cohere2",
        3,
        {"sliding_window": WINDOW, "layer_types": HYBRID, "logit_scale": 0.3},
        ("window in some layers", "layers without RoPE", "parallel blocks"),
    ),
    "olmo3": Architecture(
        "Olmo3", 3, {"sliding_window": WINDOW, "layer_types": HYBRID}, ("window in some layers", "normalised q and k")
    ),
    "granite": Architecture(
        "Granite",
        special={"attention_multiplier": 0.3, "residual_multiplier": 0.5, "logits_scaling": 2.0},
        features=("scaling of its own",),
    ),
    "ministral": Architecture(
        "Ministral", 3, {"sliding_window": WINDOW, "layer_types": HYBRID}, ("window in some layers",)
    ),
    "mixtral": Architecture("Mixtral", special=EXPERTS | {"sliding_window": WINDOW}, features=("window", "experts")),
    "olmo2": Architecture("Olmo2", features=("normalised q and k",)),
    "phi3": Architecture(
        "Phi3", special={"sliding_window": WINDOW, "original_max_position_embeddings": 512}, features=("window",)
    ),
    "qwen3_moe": Architecture(
        "Qwen3Moe",
        special={"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        features=("normalised q and k", "experts"),
    ),
    "smollm3": Architecture("SmolLM3", 4, {"no_rope_layer_interval": 2}, ("layers without RoPE",)),
}
