"""PagedCache: the keys and values of a model's layers in pages over many ranks, where a cache of transformers goes."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import create_causal_mask

from cpflex import DecodePlan, PagePool, Pages, make_decode_plan
from cpflex.attention import ScoreMod
from cpflex.integrations.transformers.attention import PlanMask
from cpflex.integrations.transformers.multimodal import TOKEN_TYPES
from cpflex.integrations.transformers.planning import ModelPlan
from cpflex.masks import MaskFn

OF_OTHERS = ("pixel_values", "image_", "video_", "audio_", "input_features", "mm_encoder_outputs")
"""How arguments begin that tell of more than text."""

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
        self.pools: list[PagePool] = []
        """Of each attention of the model, in the order in which it computes them."""
        self.callers: list[tuple[str, Any]] = []
        """Who computes each."""
        self.num_calls = 0
        """Attentions so far in the step that is under way."""
        self.biases: dict[torch.device, ScoreMod] = {}
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

    def bias_on(self, device: torch.device) -> ScoreMod | None:
        """What the model adds to its scores, traced once for all steps."""
        if self.planned.alibi is not None and device not in self.biases:
            self.biases[device] = self.planned.alibi.score_mod(device)
        return self.biases.get(device)

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
        self.num_steps, self.num_calls = self.num_steps + 1, 0
        masks: dict[str, PagedMask | None] = {kind: PagedMask(self, kind) for kind in self.masks}
        masks |= dict.fromkeys(self.planned.recurrent)  # no new token is padding
        mask = masks if self.planned.per_layer_type else next(iter(masks.values()))
        return {"attention_mask": mask}

    def end(self) -> None:
        """The model has computed the step."""
        assert self.plan is not None, "a step was begun"
        if self.num_calls != len(self.pools):
            raise NotImplementedError(
                f"the model computed {self.num_calls} attentions, and {len(self.pools)} with the prompt; layers that "
                "are computed now and then are not supported"
            )
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
            raise NotImplementedError(
                "use_cache=False with the cache of prefill; leave it out, or pass use_cache=True where the config of "
                "the model says otherwise"
            )
        refuse_more_than_text(arguments)
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
        no_positions = arguments.get("position_ids") is None and self.planned.alibi is None
        if padding is not None and (given is None or no_positions):
            raise ValueError("prefill was given padding: pass attention_mask and position_ids, as generate does")

    # -- what transformers may ask of a cache

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        while len(self.layers) <= layer_idx:  # of layers that are gone through several times
            self.layers.append(PagedLayer(self))
        return cast(PagedLayer, self.layers[layer_idx]).update(key_states, value_states)

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

    def __deepcopy__(self, _: Any) -> PagedLayer:  # of layers that are gone through several times
        return PagedLayer(self.cache)

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
        self.cache, self.bias = cache, planned.alibi

    def bias_on(self, device: torch.device) -> ScoreMod | None:
        return self.cache.bias_on(device)

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
        cache, plan = self.cache, cast(DecodePlan, self.plan)
        index, called = cache.num_calls, caller(module)
        if cache.callers[index : index + 1] != [called] or key.shape[2] != cache.num_new:
            error = ValueError(
                f"{called[0]} {called[1]} has keys of {key.shape[2]} tokens, and the step has {cache.num_new} new "
                f"ones; attention {index} of the prompt was that of {cache.callers[index : index + 1]}: each layer "
                "must be prefilled, in the same order, and give new keys alone"
            )
            plan.refuse(error)
            raise error
        cache.num_calls, pool = index + 1, cache.pools[index]
        query, key, value = (packed(x) for x in (query, key, value))
        pool.assign(key, value, plan)
        return query, pool.k, pool.v

    def __repr__(self) -> str:
        return f"PagedMask(layer_type={self.layer_type}, {self.cache!r})"

    __str__ = __repr__

    def __reduce__(self) -> NoReturn:
        raise TypeError("a step of a cache cannot be pickled")


def refuse_more_than_text(arguments: Mapping[str, Any]) -> None:
    """
    Raises:
        NotImplementedError: what tells of images, videos or sounds.
    """
    types = {name: x for name, x in arguments.items() if name in TOKEN_TYPES and x is not None and x.any()}
    others = {name for name, x in arguments.items() if name.startswith(OF_OTHERS) and x is not None and x != {}}
    if found := sorted(others | set(types)):
        raise NotImplementedError(
            f"the cache of prefill is of text alone; got {', '.join(found)}: nothing else is supported"
        )


def caller(module: nn.Module) -> tuple[str, Any]:
    """Who computes an attention."""
    return type(module).__name__, getattr(module, "layer_idx", None)


def cache_in(arguments: Mapping[str, Any]) -> PagedCache | None:
    """What a model, or a layer, is called with."""
    found = next((arguments[name] for name in NAMES if arguments.get(name) is not None), None)
    return found if isinstance(found, PagedCache) else None


def packed(x: Tensor) -> Tensor:  # [B, H, n, D] -> [1, H, B * n, D]
    """Rows one after the other."""
    return x.transpose(0, 1).flatten(1, 2).unsqueeze(0)
