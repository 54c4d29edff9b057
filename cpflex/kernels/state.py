"""The running softmax of the local queries: begun empty, continued in place by every step, finished once.

It is carried unnormalised: dividing at each step would lose precision as ranks grow.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class State:
    """Over the keys seen so far, with s the score of a pair: m = max s, l = sum exp(s - m), acc = sum exp(s - m) v."""

    acc: Tensor  # [B, Hq, S, Dv] fp32
    m: Tensor  # [B, Hq, S] fp32, natural log; -inf before the first key
    l: Tensor  # [B, Hq, S] fp32  # noqa: E741


def empty(q: Tensor, v_dim: int) -> State:
    """The state of queries [B, Hq, S, D] that have seen no key."""
    rows = q.shape[:-1]
    return State(
        acc=torch.zeros(*rows, v_dim, dtype=torch.float32, device=q.device),
        m=torch.full(rows, -torch.inf, dtype=torch.float32, device=q.device),
        l=torch.zeros(rows, dtype=torch.float32, device=q.device),
    )


def finish(state: State, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """out [B, Hq, S, Dv] in ``dtype`` and lse [B, Hq, S] fp32; 0 and -inf for a query that saw no key."""
    saw_a_key = state.l != 0  # also true for NaN, which must not be hidden
    out = state.acc / torch.where(saw_a_key, state.l, 1.0).unsqueeze(-1)
    return out.to(dtype), state.m + state.l.log()
