"""What models call for attention, and the plan in the place of their attention mask."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PretrainedConfig

from cpflex import DecodePlan, Plan, flex_attention, score_mod
from cpflex.attention import ScoreMod
from cpflex.integrations.transformers.masks import HYBRID, attention_types, layer_types

# B batch, S_local tokens of this rank, H query heads, G heads of keys, D head dim


class Bias(Protocol):
    """What a model adds to its scores."""

    def score_mod(self, device: torch.device | str) -> ScoreMod: ...


class PlanMask(BlockMask):
    """A plan of one mask kind in the place of an attention mask.

    Of four dimensions and a `BlockMask` by name, because that is what transformers' models hand to the attention
    untouched; nothing of torch's is inside.

    Args:
        plan: of one mask kind.
        layer_type: the layers it is for; another layer refuses it. None is any.
        window: the sliding window in the mask, if there is one; a layer with another refuses it.
        softcap: of the scores of the layers, if there is one. It is traced here: `torch.compile` takes no other.
        bias: what is added to the scores, if there is something, in the place of a softcap.
        position_ids: of the whole sequence, int64 [1, S], if a token's is not where it is stored: of a tree.
    """

    keeps_keys = False
    """Whether it is of the steps of a cache, see `prefill`."""

    def __init__(
        self,
        plan: Plan,
        layer_type: str | None = None,
        window: int | None = None,
        softcap: float | None = None,
        bias: Bias | None = None,
        position_ids: Tensor | None = None,
    ) -> None:
        self.plan = plan
        self.layer_type = layer_type
        self.window = window
        self.softcap = softcap
        self.softcap_mod = None if softcap is None else _softcap(softcap)
        self.bias = bias
        self.position_ids = position_ids
        self.bias_device = torch.device("cpu")
        self.bias_mod = None if bias is None else bias.score_mod(self.bias_device)

    def __reduce__(self):
        return PlanMask, (self.plan, self.layer_type, self.window, self.softcap, self.bias, self.position_ids)

    @property
    def shape(self) -> tuple[int, ...]:
        return (1, 1, self.plan.seq_len, self.plan.kv_seq_len)

    @property
    def ndim(self) -> int:
        return 4

    def __getitem__(self, index: Any) -> PlanMask:
        """Models that reuse keys of earlier layers cut queries and masks to ``logits_to_keep``: here to all of them."""
        if any(part != slice(None) and part != slice(0, None) for part in index):
            raise NotImplementedError(
                f"a plan cannot be cut to some tokens, as logits_to_keep does with the last of each rank; got {index}: "
                "pass logits_to_keep=0"
            )
        return self

    def dim(self) -> int:
        return 4

    def to(self, device: torch.device | str | torch.dtype, **_: Any) -> PlanMask:  # what moves batches calls it
        if not isinstance(device, torch.dtype):
            self.plan.to(device)
            self.bias_on(torch.empty(0, device=device).device)
        return self

    def arranged(
        self,
        module: nn.Module,
        query: Tensor,  # [B, H, S_local, D]
        key: Tensor,  # [B, G, S_local, D]
        value: Tensor,  # [B, G, S_local, D]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What attention is computed of: as given, unless keys are kept."""
        return query, key, value

    def bias_on(self, device: torch.device) -> ScoreMod | None:
        """What adds the bias to scores, with its tables on a device."""
        if self.bias is not None and device != self.bias_device:
            self.bias_mod, self.bias_device = self.bias.score_mod(device), device
        return self.bias_mod

    def __repr__(self) -> str:
        return f"PlanMask(layer_type={self.layer_type}, seq_len={self.plan.seq_len})"

    __str__ = __repr__


def attention_forward(
    module: nn.Module,
    query: Tensor,  # [B, H, S_local, D]
    key: Tensor,  # [B, G, S_local, D]
    value: Tensor,  # [B, G, S_local, D]
    attention_mask: PlanMask | Plan | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # [B, S_local, H, D]
    """What models call for attention.

    Raises:
        ValueError, NotImplementedError, TypeError: on every rank, before anything is exchanged.
    """
    mask = _plan_mask(attention_mask)
    try:
        _check_layer(module, mask, kwargs)
        _check_arguments(dropout, kwargs, mask.keeps_keys)
        modified = _score_mod_of(mask, kwargs.get("softcap"), query.device)
    except (ValueError, NotImplementedError) as error:
        if not torch.compiler.is_compiling():  # nothing can be sent while a graph is made
            mask.plan.refuse(error)
        raise
    sinks = kwargs.get("s_aux")
    batch_size, _, num_tokens, _ = query.shape
    query, key, value = _autocast(_with_global_temperature(module, query, mask), key, value)
    query, key, value = mask.arranged(module, query, key, value)
    out, lse = flex_attention(
        query,
        key,
        value,
        score_mod=modified,
        block_mask=mask.plan,
        scale=scaling,
        enable_gqa=True,
        return_lse=True,
    )
    if sinks is not None:  # a key of score s_aux without value: exp(lse) / (exp(lse) + exp(s_aux)) of what was there
        kept = torch.sigmoid(lse - sinks.float()[:, None])
        out = (out.float() * kept[..., None]).to(out.dtype)
    return out.transpose(1, 2).reshape(batch_size, num_tokens, *out.shape[1::2]).contiguous(), None


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As torch's own attention does: RoPE and norms leave queries and keys in fp32, beside values of fewer bits."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device_type)) for x in tensors)


# -- what models do to queries and scores


def _with_global_temperature(module: Any, query: Tensor, mask: PlanMask) -> Tensor:
    """Llama 4 scales queries of layers without RoPE by a function of their index, here the local one: that is undone,
    and they are scaled by that of their global position, or of their position on a path.
    """
    if not getattr(module, "attn_temperature_tuning", False) or module.use_rope:
        return query
    plan = mask.plan
    if isinstance(plan, DecodePlan):
        return query  # the model counts from the length of the cache
    if plan.start:
        raise NotImplementedError(
            f"this model scales queries by their index in the call, and the plan is of a chunk that starts at "
            f"{plan.start}; this is not supported - use a plan of the whole sequence"
        )

    def temperature(positions: Tensor) -> Tensor:
        steps = torch.floor((positions.float() + 1.0) / module.floor_scale)
        return torch.log1p(steps) * module.attn_scale + 1.0

    positions = plan.positions if mask.position_ids is None else plan.shard(mask.position_ids[0], dim=0, pad_value=0)
    ratio = temperature(positions.to(query.device)) / temperature(torch.arange(plan.local_len, device=query.device))
    return (query.float() * ratio[:, None]).to(query.dtype)


def _score_mod_of(mask: PlanMask, cap: float | None, device: torch.device) -> ScoreMod | None:
    if mask.bias is not None:
        if cap is not None:
            raise NotImplementedError(f"softcap={cap} of scores that have a bias of positions")
        return mask.bias_on(device)
    if cap is None:
        return None
    if cap == mask.softcap:
        return mask.softcap_mod
    if torch.compiler.is_compiling():
        raise ValueError(
            f"under torch.compile the plan must know softcap={cap}; it has {mask.softcap} - pass the plan of plan_for, "
            "made with the config of this model, or PlanMask(plan, softcap=...)"
        )
    return _softcap(cap)


@lru_cache(maxsize=16)
def _softcap(cap: float) -> ScoreMod:
    traced = score_mod(lambda score, b, h, q_idx, kv_idx: cap * torch.tanh(score / cap))
    assert isinstance(traced, ScoreMod)
    return traced


# -- refusals


TOWERS = 'Vision towers keep their own attention: from_pretrained(name, attn_implementation={"text_config": "cpflex"})'


def refuse_to_make_a_mask(*_: Any, **__: Any) -> NoReturn:
    raise ValueError(
        'attn_implementation="cpflex" cannot make a mask from the tokens of one rank; pass the plan as attention_mask: '
        "model(**shard_batch(batch, plan)) with plan = plan_for(model.config, group, ...). To generate, pass the cache "
        "of prefill(model, tokens, group, max_new_tokens=...); no other cache is supported. " + TOWERS
    )


def _plan_mask(attention_mask: object) -> PlanMask:
    if isinstance(attention_mask, Plan):
        return PlanMask(attention_mask)
    if isinstance(attention_mask, PlanMask):
        return attention_mask
    if attention_mask is None:
        refuse_to_make_a_mask()
    raise TypeError(f"attention_mask must be the plan, see shard_batch; got {type(attention_mask).__name__}. {TOWERS}")


def plan_mask_in(arguments: Mapping[str, Any]) -> PlanMask | None:
    """One of the plans that a model is called with as ``attention_mask``; None if it is called with none."""
    mask = arguments.get("attention_mask")
    mask = next(iter(mask.values())) if isinstance(mask, Mapping) else mask
    return mask if isinstance(mask, PlanMask) else None


def _check_layer(module: nn.Module, mask: PlanMask, kwargs: Mapping[str, Any]) -> None:
    """A layer must not get the plan of another kind: its window would be lost."""
    config, layer_idx = getattr(module, "config", None), getattr(module, "layer_idx", None)
    if mask.layer_type is None or config is None or layer_idx is None:
        return
    layer_type = _layer_type(config, layer_idx)
    if layer_type != mask.layer_type:
        raise ValueError(f"layer {layer_idx} is of type {layer_type!r}; it was given the plan of {mask.layer_type!r}")
    if "sliding_window" in kwargs and kwargs["sliding_window"] != mask.window:
        raise ValueError(f"layer {layer_idx} has sliding_window={kwargs['sliding_window']}; its plan has {mask.window}")


def _layer_type(config: PretrainedConfig, layer_idx: int) -> str:
    """Layers after the last, such as heads that predict several tokens, and layers that stand in several places, with
    an index of -1, are of the type of all that attend, if there is one.
    """
    known = layer_types(config)
    if 0 <= layer_idx < len(known):
        return HYBRID.get(known[layer_idx], known[layer_idx])
    attending = set(attention_types(config))
    if len(attending) > 1:
        raise ValueError(
            f"layer_idx={layer_idx} is beyond the {len(known)} layers of the config, which are of several types; pass "
            "this layer PlanMask(plan.plan[layer_type]) with the type that it is"
        )
    return attending.pop()


HONOURED = frozenset(("sliding_window", "softcap", "s_aux"))
ALL_LOGITS = slice(None)
"""What a batch for a language model has as ``logits_to_keep``, which such models take: where it comes down to the
attention, the model is none. (Those that pass the argument on by themselves have 0 there.)
"""
NOT_OF_ATTENTION = frozenset(
    ("position_ids", "cache_position", "num_items_in_batch", "labels", "shift_labels")
    + ("output_hidden_states", "return_dict")
)
"""Arguments of models that come by here on their way to other modules."""


def _check_arguments(dropout: float, kwargs: Mapping[str, Any], has_cache: bool = False) -> None:
    if dropout:
        raise NotImplementedError(
            f"attention dropout is not supported; got {dropout}: set config.attention_dropout = 0"
        )
    if kwargs.get("is_causal") is False:
        raise NotImplementedError("is_causal=False: the plan's masks are causal; or_mask_function can add to them")
    if kwargs.get("use_cache") and not has_cache:
        raise NotImplementedError(
            "a KV cache is not supported with a plan; pass use_cache=False, or generate with the cache of prefill"
        )
    keep = kwargs.get("logits_to_keep", 0)
    if keep == ALL_LOGITS:
        raise NotImplementedError(
            "a batch for a language model was given to a model with another head, or none: its labels are not the next "
            "tokens, and what it pools may be on another rank; pass the model, shard_batch(batch, plan, model)"
        )
    known = HONOURED | NOT_OF_ATTENTION | {"is_causal"} | ({"logits_to_keep"} if keep == 0 or has_cache else set())
    known |= {"use_cache"} if has_cache else set()
    for name, value in kwargs.items():
        if name not in known and value is not None and value is not False:
            raise NotImplementedError(f"the attention argument {name}= is not supported with cpflex")
