"""Small models with recurrent or convolutional layers beside attention, and the truth about them: each document by
itself, since packed documents leak in these layers where their kernels are not installed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from hf_models import Architecture
from hf_runs import IGNORE, TOKENS, Case, averaged, gradients
from torch import Tensor

from cpflex.integrations.transformers import attach_recurrent, shard_batch

LINEAR = ["linear_attention", "full_attention", "linear_attention"]
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6, "linear_value_head_dim": 5}
DELTA |= {"rms_norm_eps": 1e-2}
"""With less, the norm of what a query recalls of an almost orthogonal key multiplies rounding by ten and more."""
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SHARED_EXPERT = EXPERTS | {"shared_expert_intermediate_size": 24}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 6, "mamba_chunk_size": 16}

HYBRIDS: dict[str, Architecture] = {
    "qwen3_next": Architecture("Qwen3Next", 3, DELTA | SHARED_EXPERT | {"layer_types": LINEAR}),
    "qwen3_5_text": Architecture("Qwen3_5", 3, DELTA | {"layer_types": LINEAR}, config_name="Qwen3_5TextConfig"),
    "qwen3_5_moe_text": Architecture(
        "Qwen3_5Moe", 3, DELTA | SHARED_EXPERT | {"layer_types": LINEAR}, config_name="Qwen3_5MoeTextConfig"
    ),
    "olmo_hybrid": Architecture("OlmoHybrid", 3, DELTA | {"layer_types": LINEAR}),
    "kimi_linear": Architecture(
        "KimiLinear",
        3,
        {"layer_types": LINEAR, "mlp_layer_types": ["dense", "sparse", "sparse"], "num_local_experts": 4}
        | {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "kv_lora_rank": 10, "qk_rope_head_dim": 4}
        | {"qk_nope_head_dim": 6, "v_head_dim": 5, "linear_head_dim": 6, "linear_num_heads": 3}
        | {"num_key_value_heads": 4},
    ),
    "minimax": Architecture(
        "MiniMax",
        3,
        {"layer_types": LINEAR, "num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 16}
        | {"linear_attn_alpha_factor": 1.3, "full_attn_beta_factor": 0.7},
    ),
    "granitemoehybrid": Architecture(
        "GraniteMoeHybrid",
        3,
        MAMBA2
        | {"layer_types": LINEAR, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 24}
        | {"attention_multiplier": 0.3, "position_embedding_type": "rope"},
    ),
    "bamba": Architecture("Bamba", 3, MAMBA2 | {"attn_layer_indices": [1]}),
    "falcon_h1": Architecture(
        "FalconH1",
        2,
        MAMBA2 | {"mamba_d_ssm": 64, "mamba_rms_norm": True, "ssm_multipliers": [0.9, 0.8, 1.1, 1.2, 0.7]},
    ),
    "nemotron_h": Architecture(
        "NemotronH",
        4,
        {"layers_block_type": ["linear_attention", "moe", "full_attention", "linear_attention"], "chunk_size": 16}
        | {"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 6, "n_routed_experts": 4}
        | {"moe_intermediate_size": 24, "moe_shared_expert_intermediate_size": 24},
    ),
    "jamba": Architecture(
        "Jamba",
        3,
        {"attn_layer_period": 3, "attn_layer_offset": 1, "num_experts": 4, "mamba_d_state": 6, "mamba_dt_rank": 5},
    ),
    "zamba": Architecture(
        "Zamba",
        4,
        {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"], "num_key_value_heads": 4}
        | {"mamba_d_state": 6, "mamba_dt_rank": 5, "attention_hidden_size": 64, "attention_head_dim": 16},
    ),
    "zamba2": Architecture(
        "Zamba2",
        4,
        {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"], "num_key_value_heads": 4}
        | {"mamba_d_state": 6, "n_mamba_heads": 8, "mamba_ngroups": 2, "chunk_size": 16, "use_mem_rope": True},
    ),
    "lfm2": Architecture("Lfm2", 3, {"layer_types": ["conv", "full_attention", "conv"], "conv_bias": True}),
    "lfm2_moe": Architecture("Lfm2Moe", 3, EXPERTS | {"layer_types": ["conv", "full_attention", "conv"]}),
}


def hybrid_model(case: Case, attention: str, how: Any = None) -> Any:
    """With states that last for tens of tokens."""
    model = HYBRIDS[case.architecture].model(attention, **dict(case.changes))
    decay_slowly(model)
    if how is not None:
        attach_recurrent(model, how)
    return model


@torch.no_grad()
def decay_slowly(model: Any) -> None:
    """Give recurrent layers states that last for tens of tokens."""
    random = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith(("A_log", "dt_bias", "dt_proj.bias")):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random) - (2 if "A_log" in name else 1))


def documents_alone(case: Case, dtype: torch.dtype = torch.float32) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients as transformers computes them on one document after the other, with eager attention."""
    model, tokens = hybrid_model(case, "eager").to(dtype), TOKENS[case.tokens]
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # the others multiply no such numbers
    batch = tokens.batch()
    numbers = tokens.documents.expand(tokens.batch_size, -1)
    total, num_labels = torch.zeros((), dtype=dtype), 0
    for ids, labels, documents in zip(batch["input_ids"], batch["labels"], numbers, strict=True):
        for number in documents.unique():
            if number < 0:
                continue
            inside = documents == number
            logits = model(input_ids=ids[inside][None], use_cache=False).logits[0, :-1]
            wanted = labels[inside][1:]
            total = total + F.cross_entropy(logits, wanted, ignore_index=IGNORE, reduction="sum")
            num_labels += int((wanted != IGNORE).sum())
    loss = total / num_labels
    loss.backward()
    return float(loss.detach()), gradients(model)


def hybrid_on_rank(group: Any, case: Case, how: Any) -> tuple[float, dict[str, Tensor]]:
    """This rank's share of the loss and of the gradients."""
    model = hybrid_model(case, "cpflex", how)
    loss = model(**shard_batch(TOKENS[case.tokens].batch(), case.plan(model.config, group))).loss
    loss.backward()
    return float(loss.detach()), gradients(model)


def wrapped_hybrid_on_rank(group: Any, case: Case, wrap: str, how: Any) -> tuple[float, dict[str, Tensor]]:
    """With every layer recomputed in backward."""
    model = hybrid_model(case, "cpflex", how)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return averaged(group, wrap, model, model.model.layers, TOKENS[case.tokens].batch(), case.plan(model.config, group))


def assert_equal_to_documents_alone(shares: list[tuple[float, dict[str, Tensor]]], case: Case) -> None:
    """To 1e-5 as elsewhere, or to three times the rounding of one process: see `DELTA`."""
    expected_loss, expected = documents_alone(case)
    losses, grads = zip(*shares, strict=True)
    assert abs(sum(losses) - expected_loss) <= 1e-5 * abs(expected_loss), (sum(losses), expected_loss)
    summed = {name: torch.stack([grad[name] for grad in grads]).sum(dim=0) for name in expected}
    errors = {name: relative(summed[name], wanted) for name, wanted in expected.items()}
    if max(errors.values()) <= 1e-5:
        return
    _, exact = documents_alone(case, torch.float64)
    rounding = max(relative(expected[name], exact[name]) for name in expected)
    for name, error in errors.items():
        assert error <= max(1e-5, 3 * rounding), f"{name}: {error}, and of one process in fp32 {rounding}"


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-12))
