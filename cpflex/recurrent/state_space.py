"""State-space duality, the recurrence of Mamba-2 (Dao and Gu, arXiv:2405.21060), over a sharded sequence.

The state S [N, P] of a head is, token by token,

    S <- exp(dt A) S + B (dt x)^T
    y  = S^T C + D x

so a block, and a fragment, multiplies the state by one number.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from cpflex.recurrent.chain import Blocks, Chain
from cpflex.recurrent.exchange import agree
from cpflex.recurrent.places import from_blocks, to_blocks
from cpflex.recurrent.recurrence import Parts, recur
from cpflex.recurrent.scan import decays, pair_decays

# B batch, S_local tokens, H heads, P channels of a head, G groups, N numbers of a state for each channel;
# in einsum: g groups, r heads of a group, n blocks, i and j places of a block, s numbers of a state, p channels


def ssd(
    x: Tensor,  # [B, S_local, H, P]
    dt: Tensor,  # [B, S_local, H]
    A: Tensor,  # [H]
    B: Tensor,  # [B, S_local, G, N]
    C: Tensor,  # [B, S_local, G, N]
    chain: Chain,
    *,
    D: Tensor | None = None,  # [H], or [H, P]
) -> Tensor:  # [B, S_local, H, P]
    """The Mamba-2 recurrence on this rank's tokens, as if one rank had computed all of them.

    Computed in fp32, or wider if x is, and returned in the dtype of x. A token of no document gives 0.

    Args:
        dt: step sizes as they are used: bias, softplus and limits applied.
        A: negative.
        B, C: each group serves H / G consecutive heads.
        chain: from `make_chain`, of the same batch.
        D: how much of x is added; its gradient is this rank's part, to be reduced like any parameter's.

    Raises:
        ValueError, TypeError: shapes that do not fit, on every rank.
        RankMismatch: the ranks were given other shapes, dtypes or documents.
    """
    tensors = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D}
    facts = agree("ssd", chain, tensors, lambda: _check(x, dt, A, B, C, D, chain))
    return recur(partial(_parts, blocks=chain.blocks(x.device)), (x, dt, A, B, C, D), chain, facts)


def _parts(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, blocks: Blocks) -> Parts:
    inputs, steps = to_blocks(x, blocks), to_blocks(dt[..., None], blocks)
    keys, queries = (to_blocks(y, blocks) for y in (B, C))
    log_decay = (steps * A.to(steps.dtype)[:, None, None]).masked_fill(blocks.starts[..., None], 0.0)
    reach, leave, through = decays(log_decay, blocks)
    u = inputs * steps

    def by_group(y: Tensor) -> Tensor:
        return y.unflatten(2, (B.shape[2], -1))

    def finish(states: Tensor) -> Tensor:
        near = by_group(pair_decays(log_decay, blocks)) * (queries @ keys.transpose(-1, -2))[:, :, :, None]
        far = torch.einsum("bngis,bngrsp->bngrip", queries, by_group(states)).flatten(2, 3)
        y = near.flatten(2, 3) @ u + far * reach
        if D is not None:
            y = y + inputs * D.to(inputs.dtype).view(D.shape[0], 1, -1)
        return from_blocks(y, blocks, x.dtype)

    written = torch.einsum("bngjs,bngrjp->bngrsp", keys, by_group(u * leave)).flatten(2, 3)
    return through, written, finish


def _check(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, chain: Chain) -> None:
    if x.ndim != 4 or dt.shape != x.shape[:3] or A.shape != x.shape[2:3]:
        raise ValueError(
            "x must be [B, S_local, H, P], dt [B, S_local, H] and A [H]; "
            f"got {tuple(x.shape)}, {tuple(dt.shape)}, {tuple(A.shape)}"
        )
    if B.ndim != 4 or C.shape != B.shape or B.shape[:2] != x.shape[:2] or x.shape[2] % B.shape[2]:
        raise ValueError(
            f"B and C must be [B, S_local, G, N], and H={x.shape[2]} a multiple of G; "
            f"got {tuple(B.shape)} and {tuple(C.shape)}"
        )
    if D is not None and D.shape not in (x.shape[2:3], x.shape[2:]):
        raise ValueError(f"D must be [H] or [H, P], H={x.shape[2]}, P={x.shape[3]}; got {tuple(D.shape)}")
    chain.check(x.shape[0], x.shape[1])
