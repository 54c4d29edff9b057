"""Layers that mix tokens outside of attention: recurrent and convolutional ones, on sequences that ranks share.

Such a layer needs the tokens before its own, which other ranks may hold. How they get there is chosen once a model:

>>> model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="cpflex")
>>> attach_recurrent(model, exchanged)                                                # or gathered

The plan travels to these layers in the place of their padding mask, as it does to attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from transformers import masking_utils

from cpflex import Plan
from cpflex.integrations.transformers.masks import documents_of, recurrent_types
from cpflex.recurrent import Chain, make_chain

# B batch, S tokens of the whole sequence, S_local of this rank, E hidden size

ZEROES_PADDING = "apply_mask_to_padding_states"
"""What the layers that are meant call first, and no other layer of transformers does."""

HYBRIDS = frozenset(
    ("bamba", "falcon_h1", "granitemoehybrid", "jamba", "kimi_linear", "lfm2", "lfm2_moe", "minimax", "nemotron_h")
    + ("olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "zamba", "zamba2")
)
"""Model types with such layers whose loss and gradients on several ranks are tested against one process."""

LayerForward = Callable[..., Any]


class Run(NamedTuple):
    """Consecutive tokens of a row: a document, which hears of no other, or padding."""

    num_tokens: int
    is_heard: bool
    """Whether it is a document with tokens on this rank."""


@dataclass(frozen=True, eq=False)
class RecurrentMask:
    """What a layer that mixes tokens outside of attention needs to know, in the place of its padding mask."""

    plan: Plan
    position_ids: Tensor
    """Of the whole sequence, int64 [1 or B, S]."""
    padding_mask: Tensor | None
    """False at padding, bool [B, S]."""

    @cached_property
    def documents(self) -> Tensor:
        """int64 [1 or B, S]: equal numbers in a row are a document, -1 is padding."""
        documents = documents_of(self.position_ids)
        return documents if self.padding_mask is None else torch.where(self.padding_mask, documents, -1)

    @cached_property
    def runs(self) -> tuple[tuple[Run, ...], ...]:
        """Of each row, or of all rows if they are equal. At least one is heard, whatever this rank holds, so that every
        parameter has a gradient on every rank.
        """
        held = torch.zeros(self.plan.seq_len, dtype=torch.bool)
        held[self.plan.positions[self.plan.positions < self.plan.seq_len]] = True
        rows = []
        for documents in self.documents:
            numbers, lengths = documents.unique_consecutive(return_counts=True)
            parts = zip(numbers.tolist(), held.split(lengths.tolist()), strict=True)
            rows.append([Run(len(here), number >= 0 and bool(here.any())) for number, here in parts])
        if not any(run.is_heard for row in rows for run in row):
            rows[0][0] = rows[0][0]._replace(is_heard=True)
        return tuple(map(tuple, rows))

    @cached_property
    def chain(self) -> Chain:
        """The order of the ranks' fragments, and where states are forgotten."""
        return make_chain(self.plan, position_ids=self.position_ids, padding_mask=self.padding_mask)

    def explain(self) -> str:
        """In words, what the ways of `attach_recurrent` cost on this rank."""
        plan, rows = self.plan, len(self.runs)
        computed = sum(run.num_tokens for row in self.runs for run in row if run.is_heard)
        held = int((plan.positions < plan.seq_len).sum())
        return (
            f"  gathered   {plan.local_len * (plan.world_size - 1):,} tokens received in each such layer, "
            f"{plan.seq_len:,} held; {computed / rows:,.0f} computed, of which {held:,} belong to rank {plan.rank}\n"
            f"  exchanged  {self.chain.num_fragments:,} states received in each such layer; nothing else is held, or "
            "computed twice"
        )

    def to(self, *_: Any, **__: Any) -> RecurrentMask:  # what moves batches to devices calls it
        return self

    def __getitem__(self, _: Any) -> NoReturn:  # a layer that takes it for a tensor
        error = NotImplementedError(
            "this model has layers that mix tokens outside of attention, which needs those of other ranks; choose how "
            "with attach_recurrent(model, exchanged), or attach_recurrent(model, gathered) if the layers exchange no "
            "states, of cpflex.integrations.transformers"
        )
        self.plan.refuse(error)
        raise error


DELTA_RULES = (
    ("linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
    ("linear_num_heads", "linear_head_dim", "linear_head_dim"),
)
MAMBA2 = (
    ("mamba_n_heads", "mamba_d_state", "mamba_d_head"),
    ("mamba_num_heads", "ssm_state_size", "mamba_head_dim"),
    ("n_mamba_heads", "mamba_d_state", "mamba_headdim"),
)
"""What configs call the heads of a recurrent layer, the rows of their state and its columns."""


def summary_numbers(config: Any) -> int:
    """Numbers that ranks exchange for each run of consecutive tokens, in all layers together (docs/recurrent.md); 0
    where nothing but the tokens before it is exchanged, or it is not known.
    """

    def sizes(names: tuple[tuple[str, str, str], ...]) -> list[tuple[int, int, int]]:
        found = [tuple(getattr(config, name, None) for name in three) for three in names]
        return [three for three in found if all(isinstance(x, int) for x in three)]  # type: ignore[misc]

    of_layer = [heads * rows * (rows + columns) for heads, rows, columns in sizes(DELTA_RULES)]
    of_layer += [heads * (rows * columns + 1) for heads, rows, columns in sizes(MAMBA2)]
    return len(recurrent_types(config)) * max(of_layer, default=0)


def hands_out_masks() -> bool:
    """Whether this transformers gives these layers a mask of their own, which the plan can take the place of."""
    return hasattr(masking_utils, "create_recurrent_attention_mask")


# -- which layers, and how


def attach_recurrent(model: nn.Module, how: Callable[[nn.Module], LayerForward]) -> list[str]:
    """Let the layers of a model that mix tokens outside of attention work on sequences that ranks share.

    Args:
        model: unmodified, of transformers. Its layers keep their classes, parameters and names; calling it again, with
            another way, replaces the first.
        how: `exchanged`, where it is known for these layers, or `gathered`.

    Returns:
        The names of the layers.

    Raises:
        NotImplementedError: ``how`` is not known for one of the layers, or not all are found; none is changed then.
        ValueError: the model has no such layers.
    """
    if not (layers := recurrent_layers(model)):
        config: Any = model.config
        raise ValueError(f"{config.model_type} has no layers that mix tokens outside of attention: nothing to attach")
    forwards = {name: how(layer) for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.forward = partial(forwards[name], layer)
    return list(layers)


def detach_recurrent(model: nn.Module) -> None:
    """Undo `attach_recurrent`, for instance to generate on one rank."""
    for module in model.modules():
        if mixes_tokens(module):
            vars(module).pop("forward", None)


def recurrent_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Those of a model that mix tokens outside of attention, by name.

    Raises:
        NotImplementedError: not all are found.
    """
    layers = {name: module for name, module in model.named_modules() if mixes_tokens(module)}
    config: Any = model.config
    expected = len(recurrent_types(config.get_text_config()))
    if len(layers) != expected:
        raise NotImplementedError(
            f"{config.model_type} has {expected} layers that mix tokens outside of attention, by its layer_types; "
            f"cpflex finds {len(layers)}: {sorted(layers)}"
        )
    return layers


def mixes_tokens(module: nn.Module) -> bool:
    """Whether a module is a recurrent or a convolutional layer of transformers."""
    return ZEROES_PADDING in getattr(inspect.unwrap(type(module).forward), "__code__", _NO_CODE).co_names


_NO_CODE = (lambda: None).__code__


def gathered(layer: nn.Module) -> LayerForward:
    """Any layer: its input is gathered from all ranks, the layer runs on every document that has tokens on this rank,
    from beginning to end, and its output is sharded again.

    Exact for whatever the layer does. Each rank receives and holds the input of one layer for the whole sequence, B S E
    numbers, and documents on several ranks are computed on each of them.
    """
    return _gathered


@torch.compiler.disable
def _gathered(layer: nn.Module, hidden_states: Tensor, *arguments: Any, **keywords: Any) -> Any:
    mask = mask_of(layer, hidden_states, arguments, keywords)
    agree(mask, layer, hidden_states)
    whole = mask.plan.unshard(hidden_states, dim=1)
    rows = whole.split(1) if len(mask.runs) > 1 else (whole,)
    pieces = [row.split([run.num_tokens for run in runs], dim=1) for row, runs in zip(rows, mask.runs, strict=True)]
    outputs = [
        [alone(layer, piece) if run.is_heard else None for piece, run in zip(row, runs, strict=True)]
        for row, runs in zip(pieces, mask.runs, strict=True)
    ]
    like, others = next(output for row in outputs for output in row if output is not None)
    out = torch.cat(
        [
            torch.cat([like.new_zeros(p.shape) if o is None else o[0] for p, o in zip(*row, strict=True)], dim=1)
            for row in zip(pieces, outputs, strict=True)
        ]
    )
    local = mask.plan.shard(out, dim=1, pad_value=0)
    return (local, *others) if others else local


def agree(mask: RecurrentMask, layer: nn.Module, hidden_states: Tensor) -> None:
    """With the other ranks, before tokens are sent."""
    tokens = f"{str(hidden_states.dtype).removeprefix('torch.')} {tuple(hidden_states.shape)}"
    facts = {"direction": "forward", "layer": f"{type(layer).__name__}, gathered", "tokens": tokens}
    mask.plan.agree(facts, hidden_states.device)


def alone(layer: nn.Module, hidden_states: Tensor, **given: Any) -> tuple[Tensor, tuple[None, ...]]:
    """The layer's own forward on a document: the tokens, and None for whatever else it returns."""
    out = type(layer).forward(layer, hidden_states, **_nothing(type(layer)) | given)
    return (out[0], (None,) * (len(out) - 1)) if isinstance(out, tuple) else (out, ())


@cache
def _nothing(kind: type[nn.Module]) -> dict[str, None]:
    """Arguments that a layer requires beside the tokens. Of other ranks' tokens there are none, and none are read."""
    _, _, *others = inspect.signature(kind.forward).parameters.values()
    return {x.name: None for x in others if x.default is x.empty and x.kind is x.POSITIONAL_OR_KEYWORD}


def mask_of(
    layer: nn.Module, hidden_states: Tensor, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> RecurrentMask:
    """What a call of an attached layer was given as its mask.

    Raises:
        ValueError: no `RecurrentMask`.
        NotImplementedError: a cache.
    """
    given = inspect.signature(type(layer).forward).bind_partial(layer, hidden_states, *arguments, **keywords).arguments
    mask = given.get("attention_mask")
    if not isinstance(mask, RecurrentMask):
        raise ValueError(
            f"{type(layer).__name__} works on sequences that ranks share, and must get the plan as attention_mask, see "
            f"shard_batch; got {type(mask).__name__}. To use the model on one rank: detach_recurrent(model)"
        )
    if given.get("cache") is not None or given.get("past_key_values") is not None:
        error = NotImplementedError("a cache is not supported; pass use_cache=False")
        mask.plan.refuse(error)
        raise error
    return mask
