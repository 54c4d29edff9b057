"""The short causal convolution before a recurrence, over a sharded sequence.

Only the K - 1 tokens before each fragment are exchanged, none across the start of a document.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cpflex.recurrent.chain import Chain, Halo
from cpflex.recurrent.exchange import Facts, again, agree, swap

# B batch, C channels, S_local tokens, K taps; tap 0 weighs the token itself, the last column of the weights

ACTIVATIONS = {None: lambda y: y, "silu": F.silu, "swish": F.silu}


def causal_conv1d(
    x: Tensor,  # [B, C, S_local]
    weight: Tensor,  # [C, K]
    bias: Tensor | None,  # [C]
    chain: Chain,
    *,
    activation: str | None = None,
) -> Tensor:  # [B, C, S_local]
    """Depthwise causal convolution along the sequence, as if one rank had computed all of it.

    Summed in fp32, or wider if x is, and returned in the dtype of x. A token of no document gives 0, bias or not. The
    gradients of weight and bias are this rank's part, to be reduced like any parameter's.

    Args:
        weight: of the token K - 1 places before first, of the token itself last; ``conv1d.weight.squeeze(1)``.
        activation: "silu" (or "swish"), or None.

    Raises:
        ValueError, TypeError: shapes that do not fit, on every rank.
        RankMismatch: the ranks were given other shapes, dtypes or documents.
    """
    tensors = {"x": x, "weight": weight, "bias": bias}
    facts = agree("causal_conv1d", chain, tensors, lambda: _check(x, weight, bias, activation, chain))
    return ACTIVATIONS[activation](_convolve(x, weight, bias, chain, facts))


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, chain: Chain, facts: Facts) -> Tensor:
        halo = chain.halo(weight.shape[1] - 1, x.device)
        known = torch.cat([x, *_from_others(x, halo, chain)], dim=2)
        ctx.save_for_backward(known, weight)
        ctx.halo, ctx.chain, ctx.facts, ctx.kinds = (
            halo,
            chain,
            facts,
            (x.dtype, weight.dtype, None if bias is None else bias.dtype),
        )
        out = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
        for tap in range(weight.shape[1]):
            out += _before(known, halo, tap).to(out.dtype) * _tap(weight, tap, out.dtype)
        if bias is not None:
            out += bias.to(out.dtype)[:, None]
        return out.masked_fill_(~halo.reach[0], 0.0).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        known, weight = ctx.saved_tensors
        halo, (x_dtype, weight_dtype, bias_dtype) = ctx.halo, ctx.kinds
        grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
        grad_known = torch.zeros_like(known, dtype=grad.dtype)
        grad_weight = torch.empty_like(weight, dtype=grad.dtype)
        for tap in range(weight.shape[1]):
            reached = grad.masked_fill(~halo.reach[tap], 0.0)
            grad_weight[:, -1 - tap] = (reached * _before(known, halo, tap).to(grad.dtype)).sum(dim=(0, 2))
            grad_known.index_add_(2, halo.taps[tap], reached * _tap(weight, tap, grad.dtype))
        grad_bias = None
        if bias_dtype is not None:
            grad_bias = grad.masked_fill(~halo.reach[0], 0.0).sum(dim=(0, 2)).to(bias_dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            again(ctx.facts, ctx.chain, grad.device)
            grad_x = _to_owners(grad_known, grad.shape[2], halo, ctx.chain).to(x_dtype)
        return grad_x, grad_weight.to(weight_dtype), grad_bias, None, None


@torch._disable_dynamo  # type: ignore[attr-defined]
def _convolve(*args: Any) -> Tensor:
    return _Convolution.apply(*args)  # type: ignore[return-value]


def _tap(weight: Tensor, tap: int, dtype: torch.dtype) -> Tensor:
    return weight[:, -1 - tap, None].to(dtype)


def _before(known: Tensor, halo: Halo, tap: int) -> Tensor:
    """What lies ``tap`` places before each token, [B, C, S_local]; 0 if that is not in its document."""
    return known.index_select(2, halo.taps[tap]).masked_fill(~halo.reach[tap], 0.0)


def _from_others(x: Tensor, halo: Halo, chain: Chain) -> list[Tensor]:
    """The tokens before this rank's fragments, rank by rank, each [B, C, count]."""
    received = [x.new_empty(*x.shape[:2], count) for count in halo.counts]
    swap([x.index_select(2, tokens).contiguous() for tokens in halo.sends], received, chain.plan)
    return received


def _to_owners(grad: Tensor, local_len: int, halo: Halo, chain: Chain) -> Tensor:
    """The gradient of the local tokens, with what other ranks found for them, [B, C, S_local]."""
    mine, *others = grad.split([local_len, *halo.counts], dim=2)
    received = [grad.new_empty(*grad.shape[:2], len(tokens)) for tokens in halo.sends]
    swap([x.contiguous() for x in others], received, chain.plan)
    for tokens, part in zip(halo.sends, received, strict=True):
        mine = mine.index_add(2, tokens, part)
    return mine


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Any, chain: Chain) -> None:
    if x.ndim != 3 or weight.ndim != 2 or weight.shape[0] != x.shape[1] or weight.shape[1] < 1:
        raise ValueError(f"x must be [B, C, S_local] and weight [C, K]; got {tuple(x.shape)} and {tuple(weight.shape)}")
    if bias is not None and bias.shape != x.shape[1:2]:
        raise ValueError(f"bias must be [C], C={x.shape[1]}; got {tuple(bias.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f'activation must be "silu" or None; got {activation!r} - apply it to the result')
    chain.check(x.shape[0], x.shape[2])
