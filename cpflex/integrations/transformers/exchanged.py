"""Layers that mix tokens outside of attention, each rank on its own tokens: states are exchanged instead of tokens.

The forward of the layer's class is run as it is, with other functions under the names of those that mix tokens: a copy
of the function, whose globals are the module's but for these. Nothing of transformers is changed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from types import CodeType, FunctionType
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpflex.integrations.transformers.recurrent import ZEROES_PADDING, LayerForward, gathered, mask_of
from cpflex.recurrent import Chain, causal_conv1d, gated_delta_rule, ssd

# B batch, S_local tokens of this rank, C channels, K taps, H heads, G groups, E hidden size


def exchanged(layer: nn.Module) -> LayerForward:
    """Short convolutions, gated delta rules (with a decay of each channel, too) and Mamba-2: every rank computes its
    own tokens, and receives the states that enter its fragments and the few tokens before them that convolutions reach.

    Nothing is computed twice, and nothing grows with the whole sequence. In fp32, by cpflex's functions in plain torch.

    Raises:
        NotImplementedError: the layer mixes tokens in a way that is not known.
    """
    called = _functions(inspect.unwrap(type(layer).forward))
    unknown = sorted(called - set(MIX) - set(ONLY_WITH_A_CACHE) - {ZEROES_PADDING})
    if unknown or not called & set(MIX):
        how = f"calls {', '.join(unknown)}" if unknown else "mixes tokens in its own forward"
        raise NotImplementedError(
            f"what ranks would exchange for {type(layer).__name__} is not known: it {how}; attach_recurrent(model, "
            f"{gathered.__name__}) works for every layer"
        )
    return _exchanged


@torch.compiler.disable
def _exchanged(layer: nn.Module, hidden_states: Tensor, *arguments: Any, **keywords: Any) -> Any:
    mask = mask_of(layer, hidden_states, arguments, keywords)
    mixing = {name: partial(function, mask.chain) for name, function in MIX.items()}
    forward = _with_globals(inspect.unwrap(type(layer).forward), mixing | INSTEAD)
    return forward(layer, hidden_states)


def _with_globals(function: FunctionType, others: dict[str, Any]) -> FunctionType:
    """The function, with ``others`` under their names in the place of its module's."""
    known = {name: others[name] for name in _names(function.__code__) if name in others}
    copied = FunctionType(
        function.__code__,
        function.__globals__ | known,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def _functions(function: Any) -> set[str]:
    """Names of functions of its module that a function calls."""
    names, of_module = _names(function.__code__), function.__globals__
    return {name for name in names if callable(x := of_module.get(name)) and not isinstance(x, type)}


def _names(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, inner))


# -- with the signatures of transformers' functions


def _convolution(
    chain: Chain,
    hidden_states: Tensor,  # [B, C, S_local]
    weight: Tensor,  # [C, K]
    bias: Tensor | None = None,  # [C]
    activation: str | None = None,
) -> Tensor:  # [B, C, S_local]
    return causal_conv1d(hidden_states, weight, bias, chain, activation=activation)


def _delta_rule(
    chain: Chain,
    query: Tensor,  # [B, S_local, H, D]
    key: Tensor,  # [B, S_local, H, D]
    value: Tensor,  # [B, S_local, H, Dv]
    g: Tensor,  # [B, S_local, H], or [B, S_local, H, D]
    beta: Tensor,  # [B, S_local, H]
    chunk_size: int = 64,
    initial_state: None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: None = None,
) -> tuple[Tensor, None]:  # [B, S_local, H, Dv]
    return gated_delta_rule(query, key, value, g, beta, chain, use_qk_l2norm=use_qk_l2norm_in_kernel), None


def _state_space(
    chain: Chain,
    hidden_states: Tensor,  # [B, S_local, H, P]
    dt: Tensor,  # [B, S_local, H]
    A: Tensor,  # [H]
    B: Tensor,  # [B, S_local, G, N]
    C: Tensor,  # [B, S_local, G, N]
    chunk_size: int,
    D: Tensor | None = None,  # [H]
    z: None = None,
    dt_bias: Tensor | None = None,  # [H]
    initial_states: None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
) -> Tensor:  # [B, S_local, H, P], fp32
    dt = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    return ssd(hidden_states.float(), dt, A, B, C, chain, D=D)


def _not_fused(*_: Any, **__: Any) -> None:
    """As where the kernel is not installed."""


def _tokens(hidden_states: Tensor, _: Any) -> Tensor:
    """Padding is in no document of the chain."""
    return hidden_states


def _never(*_: Any, **__: Any) -> NoReturn:
    raise AssertionError("only with a cache, which is refused")


MIX: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": _convolution,
    "torch_chunk_gated_delta_rule": _delta_rule,
    "chunk_kimi_delta_attention": _delta_rule,
    "mamba2_chunk_scan": _state_space,
}
"""What mixes tokens in transformers' layers, and what does it here, with a chain as its first argument."""

ONLY_WITH_A_CACHE = (
    *("causal_conv1d_update", "torch_recurrent_gated_delta_rule", "recurrent_kimi_delta_attention"),
    *("mamba2_selective_state_update", "mamba2_split_conv1d_scan_combined"),
)
INSTEAD = dict.fromkeys(ONLY_WITH_A_CACHE, _never) | {
    "mamba2_split_conv1d_scan_combined": _not_fused,
    ZEROES_PADDING: _tokens,
}
