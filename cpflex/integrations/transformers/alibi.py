"""ALiBi (arXiv:2108.12409): scores minus a slope per head times the distance, as Bloom, MPT and Falcon have it.

Their classes compute attention by themselves, so that ``attn_implementation="cpflex"`` does not reach them. A model of
theirs is prepared once, then it is used as any other:

>>> model = replace_attention(AutoModelForCausalLM.from_pretrained("bigscience/bloom-560m"))
>>> plan = plan_for(model.config, mesh["cp"], cu_seqlens=cu_seqlens)
>>> loss = model(**shard_batch({"input_ids": tokens, "labels": tokens}, plan)).loss
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from cpflex import score_mod
from cpflex.attention import ScoreMod
from cpflex.integrations.transformers.attention import attention_forward

IMPLEMENTATION = "cpflex-replaced"
"""Of a model that was prepared: ``attn_implementation="cpflex"`` alone changes nothing in these classes."""

# B batch, S tokens of the whole sequence, S_local tokens of this rank, E hidden size, H heads, G heads of keys, D dim


@dataclass(frozen=True)
class Alibi:
    """Slopes of the heads, and how a model computes the bias."""

    slopes: tuple[float, ...]
    positions: Tensor | None = None
    """In each document, or along each path of a tree, int64 [1 or B, S]. None if distances are those in storage."""
    scale: float | None = None
    """Of a bias that is slope * position, rounded to bf16: it differs from document to document. None where it is not
    rounded: the distance is all that counts.
    """

    def score_mod(self, device: torch.device | str) -> ScoreMod:
        slopes = torch.tensor(self.slopes, dtype=torch.float32, device=device)
        if self.positions is None:
            traced = score_mod(lambda score, b, h, q_idx, kv_idx: score - slopes[h] * (q_idx - kv_idx).float())
        elif self.scale is None:
            at = self.positions[0].to(device)
            traced = score_mod(lambda score, b, h, q_idx, kv_idx: score - slopes[h] * (at[q_idx] - at[kv_idx]).float())
        else:
            rounded, positions, scale = slopes.bfloat16(), self.positions.bfloat16().to(device), self.scale
            row = positions[0] if len(positions) == 1 else None

            def biased(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
                position = row[kv_idx] if row is not None else positions[b, kv_idx]
                return score + (rounded[h] * position).float() * scale

            traced = score_mod(biased)
        assert isinstance(traced, ScoreMod)
        return traced


def alibi_of(
    config: PretrainedConfig,
    position_ids: Tensor,  # [1 or B, S]
    padding_mask: Tensor | None,  # bool [B, S]
    is_tree: bool = False,
) -> Alibi | None:
    """The bias of a model, if it has ALiBi.

    Raises:
        NotImplementedError: its attention was not replaced.
    """
    if config.model_type not in REPLACED:
        return None
    if getattr(config, "_attn_implementation", None) != IMPLEMENTATION:
        raise NotImplementedError(
            f"{config.model_type} computes attention by itself; pass the config of a model that was prepared: "
            "model = cpflex.integrations.transformers.replace_attention(model), then plan_for(model.config, ...)"
        )
    depths = position_ids if is_tree else None
    if config.model_type == "bloom":
        return Alibi(slopes(config.n_head), depths)
    if config.model_type == "mpt":
        return Alibi(slopes(config.n_heads, config.attn_config.alibi_bias_max), depths)
    if not config.alibi:
        return None
    positions = position_ids if padding_mask is None else (padding_mask.cumsum(dim=1) - 1) * padding_mask
    num_heads = config.num_attention_heads
    return Alibi(slopes(num_heads), positions, 1 / math.sqrt(config.hidden_size // num_heads))


def slopes(num_heads: int, bias_max: float = 8) -> tuple[float, ...]:
    """2^(-bias_max i / n) for i = 1 ... n, where n is the number of heads or the next power of two; of those, every
    second one first if there are too many.
    """
    n = 2 ** math.ceil(math.log2(num_heads))
    all_of_them = [2 ** (-bias_max * i / n) for i in range(1, n + 1)]
    return tuple((all_of_them if n == num_heads else all_of_them[1::2] + all_of_them[::2])[:num_heads])


def replace_attention(model: Any) -> Any:
    """Have a model of Bloom, MPT or Falcon, with any head, ask cpflex for attention. In place; parameters stay.

    Raises:
        NotImplementedError: another model, or a release of transformers that makes the masks of these otherwise.
    """
    config = model.config
    if config.model_type not in REPLACED:
        raise NotImplementedError(
            f"replace_attention is for {sorted(REPLACED)}; got {config.model_type!r}: "
            'pass attn_implementation="cpflex" where the model is made'
        )
    name, forward = REPLACED[config.model_type]
    found = [module for module in model.modules() if type(module).__name__ == name]
    if not found or "create_causal_mask" not in vars(sys.modules[type(model).__module__]):
        raise NotImplementedError(f"no {name} that takes a plan for its mask; it needs transformers 5.24")
    for module in found:
        module.forward = partial(forward, module)
    for module in model.modules():
        if hasattr(module, "build_alibi_tensor"):  # Bloom's, of the mask
            module.build_alibi_tensor = _nothing
        if hasattr(module, "use_alibi"):  # Falcon's
            module.use_alibi = False
    config._attn_implementation = IMPLEMENTATION
    return model


def _nothing(*_: Any, **__: Any) -> None:
    """In the place of a bias of the local tokens."""


def _bloom(self: Any, hidden_states: Tensor, residual: Tensor, attention_mask: Any, **_: Any) -> tuple[Tensor, None]:
    q, k, v = self._reshape(self.query_key_value(hidden_states))
    out = _attend(self, q, k, v, attention_mask, self.inv_norm_factor, self.attention_dropout.p)
    return residual + nn.functional.dropout(self.dense(out), self.hidden_dropout, self.training), None


def _mpt(self: Any, hidden_states: Tensor, attention_mask: Any, **_: Any) -> tuple[Tensor, None]:
    mixed = self.Wqkv(hidden_states)
    if self.clip_qkv:
        mixed = mixed.clamp(-self.clip_qkv, self.clip_qkv)
    q, k, v = (x.unflatten(-1, (self.n_heads, self.head_dim)).transpose(1, 2) for x in mixed.chunk(3, dim=-1))
    return self.out_proj(_attend(self, q, k, v, attention_mask, self.softmax_scale, self.attn_dropout_p)), None


def _falcon(
    self: Any, hidden_states: Tensor, alibi: None, attention_mask: Any, position_embeddings: Any = None, **_: Any
) -> tuple[Tensor, None]:
    q, k, v = (x.transpose(1, 2) for x in self._split_heads(self.query_key_value(hidden_states)))
    if not self.config.alibi:
        rotate = vars(sys.modules[type(self).__module__])["apply_rotary_pos_emb"]
        q, k = rotate(q, k, *position_embeddings)
    dropout = self.attention_dropout.p if self.config.alibi else 0.0  # without ALiBi it has none
    return self.dense(_attend(self, q, k, v, attention_mask, self.inv_norm_factor, dropout)), None


def _attend(
    module: Any,
    q: Tensor,  # [B, H, S_local, D]
    k: Tensor,  # [B, G, S_local, D]
    v: Tensor,  # [B, G, S_local, D]
    mask: Any,
    scale: float,
    dropout: float,
) -> Tensor:  # [B, S_local, E]
    out, _ = attention_forward(module, q, k, v, mask, scale, dropout if module.training else 0.0)
    return out.flatten(2)


REPLACED: dict[str, tuple[str, Callable[..., Any]]] = {
    "bloom": ("BloomAttention", _bloom),
    "mpt": ("MptAttention", _mpt),
    "falcon": ("FalconAttention", _falcon),
}
"""Model types, the attention of their layers, and what takes the place of its forward."""
