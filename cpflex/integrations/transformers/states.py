"""Layers that mix tokens outside of attention, beside the cache of `prefill`: every rank keeps their states whole.

A prompt's tokens are gathered for these layers, and every rank runs them on all tokens but the last, as one process
would; they leave their states in the cache. After that every rank has all new tokens: transformers' own layers go on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache as once
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, cache_utils

from cpflex.integrations.transformers.masks import HYBRID, RECURRENT, layer_types
from cpflex.integrations.transformers.paged_cache import NAMES, PagedCache, PagedLayer, cache_in
from cpflex.integrations.transformers.recurrent import (
    RecurrentMask,
    agree,
    alone,
    attach_recurrent,
    recurrent_layers,
)

# B batch, n new tokens, S_local tokens of this rank, E hidden size


@dataclass(frozen=True, eq=False)
class PrefillStates(RecurrentMask):
    """What such a layer is told of a prompt whose states are kept."""

    cache: PagedCache


def add_layers(cache: PagedCache, config: PretrainedConfig) -> None:
    """As many as the model has: of pages where a layer attends, of transformers where it has states.

    Raises:
        NotImplementedError: this transformers keeps states elsewhere.
    """
    kinds: list[str] = layer_types(config) if cache.planned.recurrent else []
    theirs: Any = cache_utils.DynamicCache(config=config).layers if kinds else []
    for index in range(config.num_hidden_layers):
        if not kinds or kinds[index] not in RECURRENT:
            cache.layers.append(PagedLayer(cache))
        elif not isinstance(theirs[index], kept := getattr(cache_utils, "LinearAttentionLayer", ())):
            raise NotImplementedError(
                f"{config.model_type}: the cache of this transformers knows no states of a layer of type "
                f"{kinds[index]!r}; install a release of the support matrix"
            )
        elif kinds[index] in HYBRID:
            cache.layers.append(_with_states(kept)(cache, theirs[index].number_of_states))
        else:
            cache.layers.append(theirs[index])


@once
def _with_states(states: Any) -> Any:
    """The class of a layer that attends and has states."""

    class PagedHybridLayer(states, PagedLayer):
        is_compileable = False
        is_croppable = False

        def __init__(self, cache: PagedCache, number_of_states: int) -> None:
            PagedLayer.__init__(self, cache)
            states.__init__(self, number_of_states=number_of_states)

    return PagedHybridLayer


def keep_states(model: nn.Module) -> None:
    """Let the layers of a model that mix tokens outside of attention leave their states in the cache of `prefill`."""
    attach_recurrent(model, _keeping)


def _keeping(layer: nn.Module) -> Kept:
    before = vars(layer).get("forward")
    func = getattr(before, "func", None)
    return func if isinstance(func, Kept) else Kept(before)


@dataclass(frozen=True)
class Kept:
    """The forward of such a layer: with a cache of `prefill` as told above, else what it was before."""

    before: Callable[..., Any] | None
    """What was attached; None is the layer's own."""

    def __call__(self, layer: nn.Module, /, hidden_states: Tensor, *arguments: Any, **keywords: Any) -> Any:
        own = type(layer).forward
        given = inspect.signature(own).bind_partial(layer, hidden_states, *arguments, **keywords).arguments
        if isinstance(mask := given.get("attention_mask"), PrefillStates):
            return _of_a_prompt(layer, mask, hidden_states)
        cache = cache_in(given)
        if cache is None and self.before is not None:
            return self.before(hidden_states, *arguments, **keywords)
        if cache is not None and hidden_states.shape[1] > 1:
            return _one_by_one(layer, cache, hidden_states)
        return own(layer, hidden_states, *arguments, **keywords)


def _of_a_prompt(layer: nn.Module, mask: PrefillStates, hidden_states: Tensor) -> Any:  # [B, S_local, E]
    """Of the last token nothing is computed: it is a new one of the first step."""
    agree(mask, layer, hidden_states)
    seq_len = mask.plan.seq_len - 1
    whole = mask.plan.unshard(hidden_states, dim=1)[:, :seq_len]
    padding = None if mask.padding_mask is None else mask.padding_mask[:, :seq_len].long().to(whole.device)
    out, others = alone(layer, whole, attention_mask=padding, **_named(layer, mask.cache))
    local = mask.plan.shard(nn.functional.pad(out, (0, 0, 0, 1)), dim=1, pad_value=0)
    return (local, *others) if others else local


def _one_by_one(layer: nn.Module, cache: PagedCache, hidden_states: Tensor) -> Any:  # [B, n, E]
    """Some layers of transformers begin anew where they are given several tokens at once."""
    outputs = [alone(layer, x, **_named(layer, cache)) for x in hidden_states.split(1, dim=1)]
    out, others = torch.cat([out for out, _ in outputs], dim=1), outputs[0][1]
    return (out, *others) if others else out


def _named(layer: nn.Module, cache: PagedCache) -> dict[str, PagedCache]:
    """As the argument that a layer takes a cache as.

    Raises:
        NotImplementedError: there is none.
    """
    taken = inspect.signature(type(layer).forward).parameters
    if not (names := [name for name in NAMES if name in taken]):
        raise NotImplementedError(f"{type(layer).__name__} takes no cache as {' or '.join(NAMES)}")
    return {names[0]: cache}


def require_kept(model: nn.Module) -> None:
    """
    Raises:
        NotImplementedError: what prefill attached was replaced, or detached.
    """
    layers = recurrent_layers(model).values()
    if not all(isinstance(getattr(vars(layer).get("forward"), "func", None), Kept) for layer in layers):
        raise NotImplementedError(
            "attach_recurrent or detach_recurrent was called after prefill; it goes before, or the last cache was made"
        )
