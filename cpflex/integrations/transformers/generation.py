"""prefill: a prompt that is sharded like training, kept where it was computed, for ``model.generate``."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig

from cpflex import Layout, Pages, balanced, mask_mod
from cpflex.integrations.transformers.alibi import IMPLEMENTATION, alibi_of
from cpflex.integrations.transformers.attention import PlanMask
from cpflex.integrations.transformers.batch import shard_batch
from cpflex.integrations.transformers.masks import attention_types, compose
from cpflex.integrations.transformers.paged_cache import PagedCache, cache_in, caller
from cpflex.integrations.transformers.planning import ModelPlan, plan_for
from cpflex.integrations.transformers.states import PrefillStates, add_layers, keep_states, require_kept
from cpflex.links.processes import Group
from cpflex.masks import is_count

# B rows, S tokens of the prompts

PAGE_SIZE = 64

PLACEHOLDER = re.compile(r"(image|video|audio|speech)_token_(id|index)")
"""How configs call the tokens in the places of other things than text."""


@torch.no_grad()
def prefill(
    model: Any,
    tokens: Tensor,  # integers [B, S]
    group: Group | None = None,
    *,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,  # [B, S] of 0 and 1
    page_size: int = PAGE_SIZE,
    verified_only: bool = True,
    **options: Any,
) -> PagedCache:
    """Compute prompts over the ranks of a group, and keep the keys of all tokens but the last where they were computed.

    Then ``model.generate(tokens, past_key_values=cache, ...)`` on every rank goes on as in one process, greedy or
    sampled; ranks must sample alike, from equal generators: `RankMismatch` says where they did not. Newer releases of
    transformers call the argument ``cache``; ``**{cache.keyword: cache}`` suits all. Rows of several lengths are padded
    on the left. `generate` may go on from the cache again, with all its tokens and further ones of the user.

    Args:
        model: a language model with ``attn_implementation="cpflex"``.
        tokens: whole, the same on every rank; at least 2 of each row.
        group: the ranks that share them; None is one rank.
        max_new_tokens: room for so many tokens of each row, sampled or given later.
        attention_mask: 0 at padding on the left.
        page_size: tokens of a page, at most: pages divide the chunks of the layout.
        options: of `plan_for`: ``layout``, ``schedule``, ...

    >>> cache = prefill(model, tokens, mesh["cp"], max_new_tokens=256)
    >>> text = model.generate(tokens, past_key_values=cache, max_new_tokens=256)

    Raises:
        NotImplementedError: what cannot be equal to one process; the message names it.
        ValueError: arguments that do not fit each other.
    """
    _check_arguments(model, tokens, attention_mask, max_new_tokens, page_size)
    described: dict[str, Any] = (
        {"seq_len": tokens.shape[1]} if attention_mask is None else {"attention_mask": attention_mask}
    )
    options = {"layout": balanced} | options
    planned = plan_for(model.config, group, **described, verified_only=verified_only, **options)
    _check_model(model, planned, tokens.shape[1] + max_new_tokens)
    config = model.config.get_text_config()
    cache = _empty_cache(config, planned, group, tokens, max_new_tokens, page_size)
    add_layers(cache, config)
    batch: dict[str, Any] = {"input_ids": tokens}
    if planned.padding_mask is not None:  # as generate counts them
        counted = planned.padding_mask.long().cumsum(1) - 1
        batch["position_ids"] = counted.masked_fill(~planned.padding_mask, 0).to(tokens.device)
    local = shard_batch(batch, planned, model)
    masks: dict[str, Any] = {kind: PrefillMask(planned, kind, cache) for kind in planned.windows}
    if planned.recurrent:
        keep_states(model)
        states = PrefillStates(planned.plan, planned.position_ids, planned.padding_mask, cache)
        masks |= dict.fromkeys(planned.recurrent, states)
    local["attention_mask"] = masks if planned.per_layer_type else next(iter(masks.values()))
    model.base_model(**local)
    for row in range(len(tokens)):
        cache.pages.fill(row, tokens.shape[1] - 1)
    cache.num_kept = tokens.shape[1] - 1
    _watch(model)
    return cache


class PrefillMask(PlanMask):
    """The plan of one kind of layer, while the keys that its layers compute are kept."""

    def __init__(self, planned: ModelPlan, layer_type: str, cache: PagedCache) -> None:
        window = planned.windows[layer_type]
        super().__init__(planned.plan[layer_type], layer_type, window, planned.softcap, planned.alibi)
        self.cache = cache

    def arranged(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        try:
            self._keep(module, key, value)
        except Exception as error:
            self.plan.refuse(error)
            raise
        return query, key, value

    def _keep(self, module: nn.Module, key: Tensor, value: Tensor) -> None:
        cache = self.cache
        pool = cache.pages.pool(key.shape[1], key.shape[3], value.shape[3], dtype=key.dtype, device=key.device)
        cache.pools.append(pool)
        cache.callers.append(caller(module))
        positions = self.plan.positions.cpu()
        kept = torch.nonzero(positions < self.plan.seq_len - 1).flatten()
        for row in range(cache.num_rows):
            k, v = (x[row : row + 1].index_select(2, kept.to(x.device)) for x in (key, value))
            pool.store(k, v, row, positions[kept])


def _empty_cache(
    config: PretrainedConfig,
    planned: ModelPlan,
    group: Group | None,
    tokens: Tensor,
    max_new_tokens: int,
    page_size: int,
) -> PagedCache:
    """Pages for the prompts, on the ranks that compute them, and for all new tokens, in turn."""
    batch_size, seq_len = tokens.shape
    layout = planned.plan.layout
    page_size = math.gcd(page_size, layout.chunk_len)
    owners = _owners(layout, page_size, seq_len - 1)
    later = -(-(seq_len + max_new_tokens) // page_size) - len(owners)
    in_turn = batch_size * -(-later // layout.world_size)
    num_pages = int(np.bincount(owners, minlength=layout.world_size).max()) * batch_size + in_turn
    pages = Pages(max(num_pages, 1), page_size, group)
    for row in range(batch_size):
        pages.reserve(row, seq_len - 1, owners=owners)
        pages.reserve(row, seq_len + max_new_tokens)
    reached = pages.capacity(0)  # plans reach to the end of a page
    padding = planned.padding_mask
    if padding is not None:
        padding = torch.cat([padding, padding.new_ones(batch_size, reached - seq_len)], dim=1)
    positions = torch.arange(reached).expand(1 if padding is None else batch_size, -1)
    no_functions = {"and_mask_function": None, "or_mask_function": None}
    masks = {
        kind: mask_mod(compose(config, kind, positions, padding, no_functions, one_row=True))
        for kind in sorted(set(attention_types(config)))
    }
    alibi = alibi_of(config, positions, padding)
    planned = replace(planned, position_ids=positions, padding_mask=padding, alibi=alibi)
    return PagedCache(planned, pages, masks, batch_size, seq_len + max_new_tokens)


def _owners(layout: Layout, page_size: int, num_tokens: int) -> list[int]:
    """The rank that computes each page of the prompt."""
    first = np.arange(-(-num_tokens // page_size)) * page_size
    return layout.owner[first // layout.chunk_len].tolist()


# -- the calls of the model


def _watch(model: nn.Module) -> None:
    """Let a model tell its cache when a step begins and ends."""
    if not any(hook is _begin for hook in model._forward_pre_hooks.values()):
        model.register_forward_pre_hook(_begin, with_kwargs=True)
        model.register_forward_hook(_end, with_kwargs=True)


def _begin(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    if (cache := cache_in(kwargs)) is None:
        return None
    input_ids = args[0] if args else kwargs.get("input_ids")
    if cache.planned.recurrent:
        require_kept(model)
    return args, kwargs | cache.begin(kwargs, input_ids)


def _end(model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    if (cache := cache_in(kwargs)) is not None:
        cache.end()


# -- refusals


def _check_arguments(
    model: Any, tokens: Tensor, attention_mask: Tensor | None, max_new_tokens: int, page_size: int
) -> None:
    from cpflex.integrations.transformers import NAME

    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if implementation not in (NAME, IMPLEMENTATION) or not model.can_generate():
        raise ValueError(
            f'model must be a language model with attn_implementation="{NAME}"; got {type(model).__name__} with '
            f"{implementation!r}"
        )
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.shape[1] < 2 or not len(tokens):
        raise ValueError(f"tokens must be [B, S], S at least 2; got {tuple(getattr(tokens, 'shape', ()))}")
    for name, count in (("max_new_tokens", max_new_tokens), ("page_size", page_size)):
        if not is_count(count, 1):
            raise ValueError(f"{name} must be an integer of at least 1; got {count!r}")
    placeholders = [value for name, value in vars(model.config).items() if PLACEHOLDER.fullmatch(name)]
    if torch.isin(tokens, torch.tensor([x for x in placeholders if isinstance(x, int)], device=tokens.device)).any():
        raise NotImplementedError("tokens hold places of images, videos or sounds; prefill is of text alone")
    if attention_mask is None:
        return
    if attention_mask.shape != tokens.shape:
        raise ValueError(f"attention_mask must be {tuple(tokens.shape)}, as tokens; got {tuple(attention_mask.shape)}")
    if (attention_mask[:, 1:] < attention_mask[:, :-1]).any() or not attention_mask[:, -1].all():
        raise NotImplementedError(
            "attention_mask must hold padding on the left alone: what is generated follows the last token of every row"
        )


def _check_model(model: Any, planned: ModelPlan, capacity: int) -> None:
    config = model.config.get_text_config()
    refused: dict[str, bool] = {
        "a cache of its class": not model._supports_default_dynamic_cache(),
        "loops that read the keys of the last one (recurrent_kv_cache_mode)": (
            getattr(config, "recurrent_kv_cache_mode", "") == "last_loop"
        ),
        "keys shared between layers, before transformers 5": bool(getattr(config, "num_kv_shared_layers", 0))
        and int(transformers.__version__.split(".")[0]) < 5,
    }
    for rope_type, limit in planned.rope_limits:
        is_short, is_long = capacity <= limit, planned.plan.seq_len > limit
        refused[f"{rope_type} RoPE that changes at {limit} tokens, and room for {capacity}"] = not is_short and (
            not is_long or rope_type != "longrope"
        )
    if found := [name for name, is_found in refused.items() if is_found]:
        raise NotImplementedError(f"{config.model_type}: not supported with the cache of prefill: {', '.join(found)}")
