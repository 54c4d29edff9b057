"""PagedCache: the keys and values of a model's layers in pages over many ranks, where a cache of transformers goes."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import create_causal_mask

from cpflex import DecodePlan, PagePool, Pages, make_decode_plan
from cpflex.integrations.transformers.attention import PlanMask
from cpflex.integrations.transformers.planning import ModelPlan
from cpflex.masks import MaskFn

# B rows of the batch, n new tokens of each; H query heads, G heads of keys, D head dim

HORIZON = 64
"""Steps of a token that one decode plan is made for."""

NAMES = ("cache", "past_key_values")
"""Under which models take their cache, in newer and in older releases."""


class PagedCache(Cache):
    """What `prefill` made: ``model.generate(tokens, past_key_values=cache)`` goes on from it, alike on all ranks.

    It knows what the next step is from the call of the model; every rank keeps the keys of its own pages alone.
    """

    def __init__(
        self, planned: ModelPlan, pages: Pages, masks: Mapping[str, MaskFn], num_rows: int, capacity: int
    ) -> None:
        super().__init__(layers=[])
        self.planned, self.pages, self.masks, self.num_rows = planned, pages, masks, num_rows
        self.capacity = capacity
        """Tokens that there is room for in each row."""
        self.pools: dict[int, PagePool] = {}
        """Of each layer."""
        self.num_kept = 0
        """Tokens of each row."""
        self.num_new = 0
        """Tokens of each row in the step that is under way; 0 between steps."""
        self.plan: DecodePlan | None = None
        self.num_steps = 0

    @property
    def keyword(self) -> str:
        """The name under which the models of the installed transformers take a cache."""
        return NAMES[0] if NAMES[0] in inspect.signature(create_causal_mask).parameters else NAMES[1]

    def add_layers(self, count: int) -> None:
        """As many as the model has."""
        self.layers.extend(PagedLayer(self) for _ in range(count))

    # -- a step

    def begin(self, arguments: Mapping[str, Any], input_ids: Tensor | None) -> dict[str, Any]:
        """A model is about to be called with new tokens; what it is called with instead.

        Raises:
            ValueError, NotImplementedError, RuntimeError: what does not go on from what is kept.
        """
        if self.num_new:
            raise RuntimeError("a step was left in the middle by an error; call prefill again for another cache")
        if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or arguments.get("inputs_embeds") is not None:
            raise NotImplementedError("new tokens must be input_ids [B, n]; inputs_embeds go with no cache of prefill")
        if len(input_ids) != self.num_rows:
            raise NotImplementedError(
                f"the cache has {self.num_rows} rows; got {len(input_ids)} - beam search and num_return_sequences are "
                "not supported: repeat the prompts before prefill"
            )
        plan = self._plan_of(input_ids.shape[1])
        try:
            self._check(arguments, input_ids.shape[1])
        except Exception as error:
            plan.refuse(error)
            raise
        plan.require_same(input_ids)
        self.num_new = input_ids.shape[1]
        self.num_steps += 1
        masks = {kind: PagedMask(self, kind) for kind in self.masks}
        mask = masks if self.planned.per_layer_type else next(iter(masks.values()))
        return {"attention_mask": mask}

    def end(self) -> None:
        """The model has computed the step."""
        assert self.plan is not None, "a step was begun"
        self.plan.advance()
        self.num_kept, self.num_new = self.num_kept + self.num_new, 0

    def _plan_of(self, num_new: int) -> DecodePlan:
        if self.num_kept + num_new > self.capacity:
            raise ValueError(
                f"the cache keeps {self.num_kept} tokens and has room for {self.capacity}; got {num_new} more: pass a "
                "larger max_new_tokens to prefill"
            )
        new: dict[Hashable, int] = dict.fromkeys(range(self.num_rows), num_new)
        if self.plan is None or not self.plan.fits(new):
            self.plan = make_decode_plan(self.masks, self.pages, new, horizon=HORIZON, into=self.plan)
        return self.plan

    def _check(self, arguments: Mapping[str, Any], num_new: int) -> None:
        if arguments.get("use_cache") is False:
            raise NotImplementedError("use_cache=False with the cache of prefill; leave it out")
        length, given = self.num_kept + num_new, arguments.get("attention_mask")
        padding = self.planned.padding_mask
        expected = torch.ones(self.num_rows, length, dtype=torch.bool) if padding is None else padding[:, :length]
        if isinstance(given, Tensor):
            if given.shape != expected.shape or not torch.equal(given.cpu() != 0, expected):
                raise ValueError(
                    f"attention_mask must be that of prefill, with ones for all later tokens, {tuple(expected.shape)}; "
                    f"got {tuple(given.shape)}, other padding or length - pass one and the same to prefill and generate"
                )
        elif given is not None:
            raise NotImplementedError(f"attention_mask must be [B, tokens]; got {type(given).__name__}")
        if padding is not None and (given is None or arguments.get("position_ids") is None):
            raise ValueError("prefill was given padding: pass attention_mask and position_ids, as generate does")

    # -- what transformers may ask of a cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of each row; with those of the step where the layer has them already."""
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        return layer.get_seq_length() if isinstance(layer, PagedLayer) else self.num_kept

    def activate_past_recording(self) -> NoReturn:
        self.crop(0)

    def crop(self, *_: Any, **__: Any) -> NoReturn:  # type: ignore[override]
        raise NotImplementedError(
            "assisted generation and prompt lookup are not supported with the cache of prefill: transformers gives "
            "other tokens there than without a cache; generate without them"
        )

    def reorder_cache(self, *_: Any, **__: Any) -> NoReturn:  # type: ignore[override]
        raise NotImplementedError("beam search is not supported with the cache of prefill; sample, or be greedy")

    def batch_repeat_interleave(self, *_: Any, **__: Any) -> NoReturn:  # type: ignore[override]
        self.batch_select_indices()

    def batch_select_indices(self, *_: Any, **__: Any) -> NoReturn:  # type: ignore[override]
        raise NotImplementedError("rows of the cache of prefill cannot be chosen or repeated; call prefill with others")

    def reset(self) -> NoReturn:
        raise NotImplementedError("the cache of prefill cannot be emptied; call prefill again for another")

    def __repr__(self) -> str:
        return f"PagedCache({self.num_rows} rows of {self.num_kept} tokens, room for {self.capacity}; {self.pages!r})"


class PagedLayer(CacheLayerMixin):
    """What a layer of the model takes for its part of the cache: it is told of new tokens, and gives back those alone.

    The attention keeps them, as it is given them: whatever the layer makes of its keys is done to all alike.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False

    def __init__(self, cache: PagedCache) -> None:
        super().__init__()
        self.cache = cache
        self.newest_step = 0
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.cache.num_new:
            raise RuntimeError(
                "the cache of prefill goes with the model that prefill was given; call that model itself"
            )
        if self.newest_step == self.cache.num_steps:
            raise NotImplementedError("a layer that updates its cache twice in a call is not supported")
        self.newest_step = self.cache.num_steps
        return key_states, value_states

    def get_seq_length(self, *_: Any) -> int:
        is_told = self.cache.num_new > 0 and self.newest_step == self.cache.num_steps
        return self.cache.num_kept + (self.cache.num_new if is_told else 0)

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        count = query_length if isinstance(query_length, int) else len(query_length)  # positions, before transformers 5
        return self.cache.num_kept + count, 0

    def lazy_initialization(self, *_: Any, **__: Any) -> None:
        """There is nothing to be made."""

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1


class PagedMask(PlanMask):
    """One kind of layer in one step of a `PagedCache`, in the place of an attention mask."""

    keeps_keys = True

    def __init__(self, cache: PagedCache, layer_type: str) -> None:
        assert cache.plan is not None
        planned = cache.planned
        plan: Any = cache.plan[layer_type]
        super().__init__(plan, layer_type, planned.windows[layer_type], planned.softcap)
        self.cache = cache

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.cache.num_rows, 1, self.cache.num_new, self.cache.num_kept + self.cache.num_new)

    def __getitem__(self, index: Any) -> PagedMask:
        """Layers may compute the last of the new tokens alone: here a step's attention is of all."""
        if self.cache.num_new > 1:
            super().__getitem__(index)
        return self

    def to(self, device: torch.device | str | torch.dtype, **_: Any) -> PagedMask:
        return self

    def arranged(
        self,
        module: nn.Module,
        query: Tensor,  # [B, H, n, D]
        key: Tensor,  # [B, G, n, D]
        value: Tensor,  # [B, G, n, D]
    ) -> tuple[Tensor, Tensor, Tensor]:  # [1, H, B * n, D] and the layer's pool
        pool = self.cache.pools.get(getattr(module, "layer_idx", None))  # type: ignore[arg-type]
        plan: Any = self.plan
        if pool is None or key.shape[2] != self.cache.num_new:
            error = ValueError(
                f"{type(module).__name__} {getattr(module, 'layer_idx', '')} has keys of {key.shape[2]} tokens, and "
                f"the step has {self.cache.num_new} new ones; each layer must be prefilled, and give new keys alone"
            )
            plan.refuse(error)
            raise error
        query, key, value = (packed(x) for x in (query, key, value))
        pool.assign(key, value, plan)
        return query, pool.k, pool.v

    def __repr__(self) -> str:
        return f"PagedMask(layer_type={self.layer_type}, {self.cache!r})"

    __str__ = __repr__

    def __reduce__(self) -> NoReturn:
        raise TypeError("a step of a cache cannot be pickled")


def packed(x: Tensor) -> Tensor:  # [B, H, n, D] -> [1, H, B * n, D]
    """Rows one after the other."""
    return x.transpose(0, 1).flatten(1, 2).unsqueeze(0)
