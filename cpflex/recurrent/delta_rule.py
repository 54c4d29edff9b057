"""The gated delta rule (Gated DeltaNet, Yang et al., arXiv:2412.06464), and with a decay for each channel Kimi Delta
Attention (arXiv:2510.26692), over a sharded sequence.

The state S [Dk, Dv] of a head is, token by token,

    S <- diag(exp g) S              decay
    S <- S + beta k (v - S^T k)^T   what k recalls is replaced by v
    o  = S^T q scale

In a block, let u_i be what token i writes beside k_i, and d(i, j) the decay between two tokens. Then

    u_i + sum over j < i of beta_i (k_i d(i, j) k_j) u_j = beta_i v_i - beta_i (k_i d(i, entry))^T S_entry

is a triangular system (the UT transform of DeltaNet, arXiv:2406.06484), solved once for both right-hand sides: u = u0 -
w S_entry. So a block, and a fragment, maps the state linearly.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from cpflex.recurrent.chain import Blocks, Chain
from cpflex.recurrent.exchange import agree
from cpflex.recurrent.places import from_blocks, to_blocks
from cpflex.recurrent.recurrence import Parts, recur
from cpflex.recurrent.scan import decays, pair_decays, sum_of_later

# B batch, S_local tokens, H heads of values, Hk of keys, N blocks, C places of a block

EPS = 1e-6
"""Added to the squared length of q and k, as in flash-linear-attention and transformers."""


def gated_delta_rule(
    q: Tensor,  # [B, S_local, Hk, Dk]
    k: Tensor,  # [B, S_local, Hk, Dk]
    v: Tensor,  # [B, S_local, H, Dv]
    g: Tensor,  # [B, S_local, H], or [B, S_local, H, Dk]
    beta: Tensor,  # [B, S_local, H]
    chain: Chain,
    *,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
) -> Tensor:  # [B, S_local, H, Dv]
    """The gated delta rule on this rank's tokens, as if one rank had computed all of them.

    Computed in fp32, or wider if v is, and returned in the dtype of v. A token of no document gives 0.

    Args:
        q, k: each head serves H / Hk consecutive heads of v.
        g: log of the decay, at most 0; one number for a head, or one for each channel of the keys.
        chain: from `make_chain`, of the same batch.
        scale: of q; 1 / sqrt(Dk) if None.
        use_qk_l2norm: bring q and k to length 1 first.

    Raises:
        ValueError, TypeError: shapes that do not fit, on every rank.
        RankMismatch: the ranks were given other shapes, dtypes or documents.
    """
    tensors = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
    facts = agree("gated_delta_rule", chain, tensors, lambda: _check(q, k, v, g, beta, chain))
    options = {"scale": k.shape[-1] ** -0.5 if scale is None else scale, "use_qk_l2norm": use_qk_l2norm}
    parts = partial(_parts, blocks=chain.blocks(v.device), **options)
    return recur(parts, (q, k, v, g, beta), chain, facts)


def _parts(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, blocks: Blocks, scale: float, use_qk_l2norm: bool
) -> Parts:
    keys, queries = (to_blocks(x, blocks) for x in (k, q))
    if use_qk_l2norm:
        keys, queries = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPS) for x in (keys, queries))
    groups = v.shape[2] // k.shape[2]
    keys, queries = (x.repeat_interleave(groups, dim=2) for x in (keys, queries * scale))
    log_decay = to_blocks(g if g.ndim == 4 else g[..., None], blocks).masked_fill(blocks.starts[..., None], 0.0)
    values, rate = to_blocks(v, blocks), to_blocks(beta[..., None], blocks)
    reach, leave, through = decays(log_decay, blocks)
    recalled, seen = _products(keys * rate, queries, keys, log_decay, blocks)
    right = torch.cat([values * rate, keys * rate * reach], dim=-1)
    solved = torch.linalg.solve_triangular(recalled.tril(-1), right, upper=False, unitriangular=True)
    u0, w = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    leaving = (keys * leave).transpose(-1, -2)
    kept = through.transpose(-1, -2) * torch.eye(k.shape[-1], dtype=w.dtype, device=w.device)

    def finish(states: Tensor) -> Tensor:
        return from_blocks((queries * reach) @ states + seen @ (u0 - w @ states), blocks, v.dtype)

    return kept - leaving @ w, leaving @ u0, finish


def _products(a: Tensor, b: Tensor, k: Tensor, log_decay: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Of each place, a and b times the decayed keys of that place and those before it, in one document: [B, N, H, C, C]
    each.
    """
    if log_decay.shape[-1] == 1:
        decay = pair_decays(log_decay, blocks)
        return a @ k.transpose(-1, -2) * decay, b @ k.transpose(-1, -2) * decay
    return tuple(by_channel(x, k, log_decay).masked_fill(~blocks.pairs, 0.0) for x in (a, b))  # type: ignore


def by_channel(
    a: Tensor,  # [..., C, Dk]
    k: Tensor,  # [..., C, Dk]
    log_decay: Tensor,  # [..., C, Dk]
) -> Tensor:  # [..., C, C]
    """``sum over d of a_id k_jd exp(sum of log_decay_d over (j, i])`` for j <= i, else 0.

    Halved again and again: between a place of the second half and one of the first, the decay is one factor up to the
    border and one from it, both at most 1, so that nothing overflows however strong it is.
    """
    size = a.shape[-2]
    if size == 1:
        return (a * k).sum(dim=-1, keepdim=True)
    # both halves at once, along a new dim
    a2, k2, decay2 = (x.unflatten(-2, (2, size // 2)) for x in (a, k, log_decay))
    diagonal = by_channel(a2, k2, decay2)
    until_border = sum_of_later(decay2[..., 0, :, :])
    from_border = decay2[..., 1, :, :].cumsum(dim=-2)
    lower = (a2[..., 1, :, :] * from_border.exp()) @ (k2[..., 0, :, :] * until_border.exp()).transpose(-1, -2)
    upper = torch.cat([diagonal[..., 0, :, :], torch.zeros_like(lower)], dim=-1)
    return torch.cat([upper, torch.cat([lower, diagonal[..., 1, :, :]], dim=-1)], dim=-2)


def _check(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, chain: Chain) -> None:
    if k.ndim != 4 or v.ndim != 4 or q.shape != k.shape or k.shape[:2] != v.shape[:2] or v.shape[2] % k.shape[2]:
        raise ValueError(
            "q and k must be [B, S_local, Hk, Dk] and v [B, S_local, H, Dv], H a multiple of Hk; "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if beta.shape != v.shape[:3] or g.shape not in (v.shape[:3], (*v.shape[:3], k.shape[-1])):
        raise ValueError(
            f"beta must be {tuple(v.shape[:3])}, and g too or with a last dim of {k.shape[-1]}; "
            f"got {tuple(beta.shape)} and {tuple(g.shape)}"
        )
    chain.check(v.shape[0], v.shape[1])
